"""Compiles a training step for another machine, and reads its memory and time."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.extend.core import jaxprs_in_params

from xsmae.errors import UserError, memory_shortage
from xsmae.ops.attention.api import CAPABILITIES
from xsmae.planning.collectives import Collective, read_collectives
from xsmae.planning.topology import Chip, Topology
from xsmae.trainer import Trainer, batch_shapes, create_trainer


class KernelError(UserError):
    """The chip cannot run a kernel, with any batch."""


def multiplications(jaxpr: Any) -> float:
    """Floating-point operations of the matrix products in a traced function.

    A multiplication and an addition count as two. Loops count as often as they run.
    Everything except products is left out.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inside = [multiplications(j) for j in jaxprs_in_params(eqn.params)]
        branches = eqn.primitive.name == "cond"
        total += times * (max(inside) if branches else sum(inside))
    return total


def used_memory(compiled: Any) -> dict[str, int]:
    """Bytes per device: state and batch, temporary memory of a step, and the total."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return {
        "arguments": kept,
        "temporary": temporary,
        "all": kept + results + temporary + memory.generated_code_size_in_bytes,
    }


def attention_on(attention: str, chip: Chip) -> str:
    """The `model.attention` that a run on the chip uses.

    `auto` normally asks the GPU, but here there is none. Raises UserError for the fused
    kernel on a GPU that cannot run it.
    """
    capability = chip.capability
    if attention == "auto" and capability and capability not in CAPABILITIES:
        return "xla"
    if attention == "pallas" and capability and float(capability) < 8:
        raise KernelError(
            "model.attention=pallas needs an NVIDIA GPU with compute capability 8.0 or "
            f"higher, but this one has {capability}: give --config.model.attention=auto"
        )
    return attention


def trainer_for(
    config: ml_collections.ConfigDict, topology: Topology, batch_size: int
) -> tuple[ml_collections.ConfigDict, Trainer]:
    """The config with another batch size, and its trainer on the topology's devices."""
    config = copy.deepcopy(config)
    config.batch_size = batch_size
    config.model.attention = attention_on(config.model.attention, topology.chip)
    # The number of images decides only the schedule.
    return config, create_trainer(
        config, num_images=1000 * batch_size, devices=topology.devices
    )


def compile_step(
    config: ml_collections.ConfigDict, topology: Topology, batch_size: int
) -> Any:
    """Compile the step.

    Raises UserError if the batch does not fit, and KernelError if a kernel needs more
    shared memory than a core has: a smaller batch does not help then.
    """
    config, trainer = trainer_for(config, topology, batch_size)
    lowered = trainer.step.lower(trainer.state_shapes(), batch_shapes(config))
    with (
        memory_shortage(f"batch_size={batch_size} does not fit, lower it"),
        _kernel_too_large(),
        # Kernels of a divided batch are lowered now, and ask the mesh for the GPU.
        jax.sharding.use_abstract_mesh(trainer.mesh.abstract_mesh),
    ):
        return lowered.compile()


@contextlib.contextmanager
def _kernel_too_large() -> Iterator[None]:
    """Turn XLA's shortage of shared memory into a KernelError.

    XLA reports this and a shortage of device memory as the same RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "shared memory" not in reason.lower():
            raise
        raise KernelError(
            f"a kernel needs more shared memory than the GPU has ({reason[:200]}), "
            "with any batch_size: give --config.model.attention=xla"
        ) from None


def largest_batch(
    config: ml_collections.ConfigDict, topology: Topology, used: int
) -> int:
    """The largest batch whose step fits, 0 if none does.

    Memory grows linearly with the batch. The estimate comes from the config's batch
    (`used` bytes) and half of it. It is compiled, and lowered in steps of one eighth
    until it fits. Raises UserError if memory does not grow with the batch.
    """
    devices, parts = len(topology.devices), config.optim.accumulation_steps
    unit = devices * parts
    half = max(unit, config.batch_size // 2 // unit * unit)
    if half >= config.batch_size:
        half = 2 * config.batch_size
    try:
        other = used_memory(compile_step(config, topology, half))["all"]
    except KernelError:
        raise
    except UserError:
        if half > config.batch_size and used <= topology.chip.memory:
            return config.batch_size  # one unit fits, two do not
        raise
    slope = (used - other) / (config.batch_size - half)
    if slope <= 0:
        raise UserError(
            f"batches of {config.batch_size} and {half} take {used / 1e9:.2f} and "
            f"{other / 1e9:.2f} GB, but memory should grow with the batch: raise "
            "--config.batch_size"
        )
    fixed = used - slope * config.batch_size
    most = int((topology.chip.memory - fixed) / slope)
    batches = (most * eighths // 8 // unit * unit for eighths in range(8, 0, -1))
    for batch in dict.fromkeys(batches):
        if batch > 0 and _fits(config, topology, batch):
            return batch
    return 0


def _fits(
    config: ml_collections.ConfigDict, topology: Topology, batch_size: int
) -> bool:
    try:
        needed = used_memory(compile_step(config, topology, batch_size))["all"]
    except KernelError:
        raise
    except UserError:
        return False
    return needed <= topology.chip.memory


def _largest_or_reason(
    config: ml_collections.ConfigDict, topology: Topology, used: int
) -> tuple[int | None, str | None]:
    """The largest batch, or None and the reason why it is unknown."""
    try:
        return largest_batch(config, topology, used), None
    except UserError as error:
        return None, str(error)


def make_plan(
    config: ml_collections.ConfigDict, topology: Topology, *, largest: bool
) -> dict[str, Any]:
    """The cost of a step, by name, for `table`. largest: find the largest batch too."""
    chip, devices = topology.chip, len(topology.devices)
    start = time.monotonic()
    compiled = compile_step(config, topology, config.batch_size)
    seconds = time.monotonic() - start
    exchanged = read_collectives(compiled.as_text(), devices, topology.a_host)
    memory = used_memory(compiled)
    flops = products(config, topology) / devices
    arithmetic = flops / chip.flops
    network = sum(c.sent / topology.bandwidth(c.hosts, c.cards) for c in exchanged)
    batch, reason = None, None
    if largest:
        batch, reason = _largest_or_reason(config, topology, memory["all"])
    return {
        "devices": devices,
        "batch_size": config.batch_size,
        "networks": networks_of(config.model),
        "compile_seconds": round(seconds, 1),
        "memory": memory,
        "memory_there": chip.memory,
        "flops": flops,
        "peak": {"flops": chip.flops, "of": chip.products},
        "arithmetic_seconds": arithmetic,
        "network_seconds": network,
        "network_share": network / (network + arithmetic),
        "collectives": [vars(c) for c in exchanged],
        "largest_batch": batch,
        "largest_batch_unknown": reason,
    }


def products(config: ml_collections.ConfigDict, topology: Topology) -> float:
    """Floating-point operations of a step's products, over all devices."""
    plain = copy.deepcopy(config)
    plain.model.attention = "xla"  # same products, but none hidden in a kernel
    plain, trainer = trainer_for(plain, topology, config.batch_size)
    traced = trainer.step.trace(trainer.state_shapes(), batch_shapes(plain))
    return multiplications(traced.jaxpr.jaxpr)


def networks_of(model: Mapping[str, Any]) -> dict[str, list[int]]:
    """Width, blocks and heads of the encoder and, if there is one, the decoder."""
    sizes = ("embed_dim", "depth", "num_heads")
    return {
        name: [model[f"{prefix}{size}"] for size in sizes]
        for name, prefix in (("encoder", ""), ("decoder", "decoder_"))
        if f"{prefix}depth" in model
    }


def table(plan: dict[str, Any]) -> str:
    """A plan as a Markdown table."""
    memory = {name: value / 1e9 for name, value in plan["memory"].items()}
    peak = f"{plan['peak']['flops'] / 1e12:g} TFLOPS of {plan['peak']['of']}"
    rows = [
        ("devices", plan["devices"]),
        ("batch, over all", plan["batch_size"]),
        *(
            (f"{name}: width, blocks, heads", ", ".join(map(str, sizes)))
            for name, sizes in plan["networks"].items()
        ),
        ("state and batch per device", f"{memory['arguments']:.2f} GB"),
        ("temporary, in a step", f"{memory['temporary']:.2f} GB"),
        ("total", f"{memory['all']:.2f} of {plan['memory_there'] / 1e9:.0f} GB"),
        ("products per device", f"{plan['flops'] / 1e12:.3g} TFLOP"),
        (
            f"at the published peak, {peak}",
            f"{1e3 * plan['arithmetic_seconds']:.2f} ms",
        ),
        ("network at its published rate", f"{1e3 * plan['network_seconds']:.2f} ms"),
        ("network's share, if nothing overlaps", f"{plan['network_share']:.1%}"),
        ("time to compile", f"{plan['compile_seconds']} s"),
    ]
    if plan["largest_batch"] is not None:
        rows.append(("largest batch that fits, over all", plan["largest_batch"]))
    elif plan["largest_batch_unknown"]:
        reason = f"unknown: {plan['largest_batch_unknown']}"
        rows.append(("largest batch that fits, over all", reason))
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    if plan["collectives"]:
        lines += ["", "| exchange | devices | hosts | times | MB | sent by each |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
    for one in (Collective(**c) for c in plan["collectives"]):
        lines.append(
            f"| {one.kind} | {one.group} | {one.hosts} | {one.count} | "
            f"{one.size / 1e6:.1f} | {one.sent / 1e6:.1f} MB |"
        )
    return "\n".join(lines)

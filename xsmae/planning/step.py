"""What a training step takes on a machine that is elsewhere."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import jax
import ml_collections
from jax.extend.core import jaxprs_in_params

from xsmae.errors import UserError, memory_shortage
from xsmae.planning.collectives import Collective, read_collectives
from xsmae.planning.topology import Topology
from xsmae.trainer import Trainer, batch_shapes, create_trainer


def multiplications(jaxpr: Any) -> float:
    """Floating-point operations of the products in a traced function, loops included.

    Two for each multiplication and addition; what is not a product is left out.
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
    """Bytes of a device: the state and batch, what is beside them in a step, all."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return {
        "arguments": kept,
        "temporary": temporary,
        "all": kept + results + temporary + memory.generated_code_size_in_bytes,
    }


def trainer_for(
    config: ml_collections.ConfigDict, topology: Topology, batch_size: int
) -> tuple[ml_collections.ConfigDict, Trainer]:
    """The run's trainer on the topology's devices with another batch."""
    config = copy.deepcopy(config)
    config.batch_size = batch_size
    # The number of images decides the schedule alone.
    return config, create_trainer(
        config, num_images=1000 * batch_size, devices=topology.devices
    )


def compile_step(
    config: ml_collections.ConfigDict, topology: Topology, batch_size: int
) -> Any:
    """The compiled step; raises UserError where the compiler finds no room for it."""
    config, trainer = trainer_for(config, topology, batch_size)
    lowered = trainer.step.lower(trainer.state_shapes(), batch_shapes(config))
    with (
        memory_shortage(f"batch_size={batch_size} does not fit, lower it"),
        # Kernels of a divided batch are lowered now: they ask it which GPU it is for.
        jax.sharding.use_abstract_mesh(trainer.mesh.abstract_mesh),
    ):
        return lowered.compile()


def largest_batch(
    config: ml_collections.ConfigDict, topology: Topology, used: int
) -> int:
    """The largest batch whose step fits, in eighths of a device's first estimate.

    Memory grows evenly with the batch: from that of `used` bytes and of one half as
    large follows the largest, which is compiled, and made smaller where it is too much.
    0 if none fits. Raises UserError where the memory of two batches does not tell.
    """
    devices, parts = len(topology.devices), config.optim.accumulation_steps
    unit = devices * parts
    half = max(unit, config.batch_size // 2 // unit * unit)
    if half >= config.batch_size:
        half = 2 * config.batch_size
    try:
        other = used_memory(compile_step(config, topology, half))["all"]
    except UserError:
        if half > config.batch_size and used <= topology.chip.memory:
            return config.batch_size  # one unit, and two do not fit
        raise
    slope = (used - other) / (config.batch_size - half)
    if slope <= 0:
        raise UserError(
            f"batches of {config.batch_size} and {half} take {used / 1e9:.2f} and "
            f"{other / 1e9:.2f} GB, which does not grow with the batch: raise "
            "--config.batch_size"
        )
    fixed = used - slope * config.batch_size
    most = int((topology.chip.memory - fixed) / slope)
    batches = (most * eighths // 8 // unit * unit for eighths in range(8, 0, -1))
    for batch in dict.fromkeys(batches):
        if batch > 0 and _fits(config, topology, batch):
            return batch
    return 0


def _fits(config, topology, batch_size) -> bool:
    try:
        needed = used_memory(compile_step(config, topology, batch_size))["all"]
    except UserError:
        return False
    return needed <= topology.chip.memory


def _largest_or_reason(
    config: ml_collections.ConfigDict, topology: Topology, used: int
) -> tuple[int | None, str | None]:
    """The largest batch, or None and why it is not known."""
    try:
        return largest_batch(config, topology, used), None
    except UserError as error:
        return None, str(error)


def make_plan(
    config: ml_collections.ConfigDict, topology: Topology, *, largest: bool
) -> dict[str, Any]:
    """What the step takes, by name; see `table`."""
    chip, devices = topology.chip, len(topology.devices)
    start = time.monotonic()
    compiled = compile_step(config, topology, config.batch_size)
    seconds = time.monotonic() - start
    exchanged = read_collectives(compiled.as_text(), devices, topology.a_host)
    memory = used_memory(compiled)
    plain = copy.deepcopy(config)
    plain.model.attention = "xla"  # the same products, and nothing hidden in a kernel
    plain, trainer = trainer_for(plain, topology, config.batch_size)
    traced = trainer.step.trace(trainer.state_shapes(), batch_shapes(plain))
    flops = multiplications(traced.jaxpr.jaxpr) / devices
    batch, reason = None, None
    if largest:
        batch, reason = _largest_or_reason(config, topology, memory["all"])
    network = sum(c.sent / topology.bandwidth(c.hosts, c.cards) for c in exchanged)
    return {
        "devices": devices,
        "batch_size": config.batch_size,
        "compile_seconds": round(seconds, 1),
        "memory": memory,
        "memory_there": chip.memory,
        "flops": flops,
        "arithmetic_seconds": flops / chip.flops,
        "network_seconds": network,
        "network_share": network / (network + flops / chip.flops),
        "collectives": [vars(c) for c in exchanged],
        "largest_batch": batch,
        "largest_batch_unknown": reason,
    }


def table(plan: dict[str, Any]) -> str:
    """A plan as Markdown."""
    memory = {name: value / 1e9 for name, value in plan["memory"].items()}
    rows = [
        ("devices", plan["devices"]),
        ("batch, over all", plan["batch_size"]),
        ("state and batch a device", f"{memory['arguments']:.2f} GB"),
        ("beside them in a step", f"{memory['temporary']:.2f} GB"),
        ("in all, of", f"{memory['all']:.2f} of {plan['memory_there'] / 1e9:.0f} GB"),
        ("products a device", f"{plan['flops'] / 1e12:.3g} TFLOP"),
        ("at the published peak", f"{1e3 * plan['arithmetic_seconds']:.2f} ms"),
        ("network at its published rate", f"{1e3 * plan['network_seconds']:.2f} ms"),
        ("network's share, if nothing overlaps", f"{plan['network_share']:.1%}"),
        ("compiling", f"{plan['compile_seconds']} s"),
    ]
    if plan["largest_batch"] is not None:
        rows.append(("largest batch that fits, over all", plan["largest_batch"]))
    elif plan["largest_batch_unknown"]:
        reason = f"not known: {plan['largest_batch_unknown']}"
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

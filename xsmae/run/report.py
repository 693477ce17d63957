"""Reports about a run: before it starts, at its end, and of a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from xsmae.data.catalogue import build_source, missing_arguments
from xsmae.data.pipeline import check_bands, check_batch_size, draws_of
from xsmae.data.records import Source
from xsmae.ops.attention.api import choose
from xsmae.process.files import read_jsonl
from xsmae.run.choices import image_shapes, settle
from xsmae.run.knn import create_monitors
from xsmae.trainer import (
    Trainer,
    batch_shapes,
    batches_of,
    create_sampler,
    create_trainer,
)

DRAWS = 500  # samples drawn to estimate how many views are upsampled
SHOWN_SHARE = 0.01  # smallest share of upsampled views that is reported


def describe(
    config: ml_collections.ConfigDict, trainer: Trainer, source: Source
) -> str:
    """What a run is about to do, in a few lines."""
    total = count_parameters(jax.eval_shape(trainer.initial_state).params)
    schedule = trainer.schedule
    return (
        f"{config.method}, {total / 1e6:.2f} M parameters; {source!r}\n"
        f"{schedule.num_steps} steps of {config.batch_size} samples "
        f"({schedule.num_steps / schedule.steps_per_epoch:.1f} epochs), learning rate "
        f"{schedule.learning_rate:g}, warm-up {schedule.warmup_steps} steps\n"
        + execution(config, trainer)
        + finer_views(config, source)
        + "".join(f"\n{note}" for note in source.notes())
    )


def execution(config: ml_collections.ConfigDict, trainer: Trainer) -> str:
    """One line about the devices and how they compute."""
    model, mesh = config.model, trainer.mesh
    device = mesh.devices.flat[0]
    part = config.batch_size // mesh.size
    kind = dict.fromkeys((device.platform, device.device_kind))
    blocks = "scanned" if model.scan else "unrolled"
    return (
        f"{mesh.size} x {' '.join(kind)}, {part} samples each, {model.dtype}, "
        f"{_attention(config, part)}, remat {model.remat}, blocks {blocks}"
    )


def _attention(config: ml_collections.ConfigDict, samples: int) -> str:
    """The implementation of the encoder's attention, and the reason for it."""
    model = config.model
    if model.attention != "auto":
        return f"attention {model.attention}"
    device = jax.local_devices()[0]
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version else "cuda"
    patches = (config.views.size // model.patch_size) ** 2
    patches *= len(model.get("channel_groups", ())) or 1
    tokens = 1 + int(patches * (1 - model.get("mask_ratio", 0)))
    name, reason = choose(
        (samples, tokens, 3 * model.embed_dim),
        model.dtype,
        num_heads=model.num_heads,
        platform=platform,
        capability=getattr(device, "compute_capability", None),
    )
    return f"attention {name} ({reason})"


def finer_views(config: ml_collections.ConfigDict, source: Source) -> str:
    """A line if views are finer than their source images, otherwise "".

    Estimated from the run's first samples and the sizes of some images.
    """
    sampler, shapes = create_sampler(config), image_shapes(source)
    finer = np.zeros(sampler.num_views)
    for position in range(DRAWS):
        drawn = sampler.draw(
            shapes[position % len(shapes)],
            **draws_of(config.seed, position, batch_size=config.batch_size),
        )
        finer += [box.height * box.width < sampler.size**2 for box in drawn.boxes]
    shares = [f"{share:.0%} of view {i}" for i, share in enumerate(finer / DRAWS, 1)]
    if finer.max() / DRAWS < SHOWN_SHARE:
        return ""
    larger = " or a larger --config.views.area" if sampler.area[1] < 1 else ""
    return (
        f"\nviews finer than their images are upsampled: {' and '.join(shares)}; to "
        f"have fewer, give a smaller --config.views.size{larger}"
    )


def summary(workdir: Path) -> str:
    """The table at the end of a run, from its `metrics.jsonl`."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    losses = [row for row in rows if "loss" in row]
    lines = []
    if losses:  # empty if the file was lost or damaged
        lines += ["", f"{'':32}{'first':>10}{'last':>10}"]
        for name in losses[-1]:
            if name == "loss" or (name.startswith("loss/") and "_view" not in name):
                first, last = (row.get(name) for row in (losses[0], losses[-1]))
                lines.append(f"{name:32}{_cell(first):>10}{_cell(last):>10}")
    knn = {}
    for prefix in ("knn_full/", "knn/"):
        values = [
            (k, v) for row in rows for k, v in row.items() if k.startswith(prefix)
        ]
        if values:
            knn = {name.removeprefix(prefix): value for name, value in values}
            break
    if knn:
        lines += ["", f"{'kNN accuracy':32}{'cls':>10}{'mean':>10}"]
        for title, name in (
            ("this encoder", "accuracy"),
            ("the same encoder, untrained", "random_encoder"),
        ):
            cells = [_percent(knn.get(f"{name}_{f}")) for f in ("cls", "mean")]
            lines.append(f"{title:32}{cells[0]:>10}{cells[1]:>10}")
        cell = _percent(knn.get("image_statistics"))
        lines.append(f"{'image statistics alone':32}{cell:>10}")
    lines += ["", "figures:"]
    lines += [f"  {path}" for path in sorted((workdir / "figures").glob("*.png"))]
    return "\n".join([*lines, f"encoder: {workdir / 'encoder'}"])


def dry_run(config: ml_collections.ConfigDict) -> str:
    """Build and compile everything without training; returns a report.

    Works without data. The report then says which data fields are not set.
    """
    missing = missing_arguments(config.data)
    source = None if missing else build_source(config.data)
    if source is not None:
        check_bands(source, config)
    config, chosen = settle(config, source)
    sampler = create_sampler(config)
    unknown = config.num_steps is None and source is None
    # Without data the number of steps is unknown, but the step compiles the same.
    num_images = len(source) if source else 1000 * config.batch_size
    trainer = create_trainer(config, num_images=num_images)
    state = jax.eval_shape(trainer.initial_state)
    model = nnx.merge(trainer.graphdef, state.params, state.batch_stats)
    parts = {
        name: count_parameters(nnx.state(part, nnx.Param))
        for name, part in model.parts().items()
    }
    lines = [
        *chosen,
        f"method: {config.method}",
        f"parameters: {count_parameters(state.params) / 1e6:.2f} M in total",
        _encoder_and_decoder(parts),
        *(
            f"  {count / 1e6:.2f} M {name}"
            for name, count in parts.items()
            if name not in ("encoder", "decoder")
        ),
    ]
    if source is None:
        lines.append(f"data: {', '.join(f'data.{n}' for n in missing)} not set yet")
        batch = batch_shapes(config)
    else:
        lines.append(f"data: {source!r}")
        check_batch_size(source, config.batch_size)
        create_monitors(config, source)
        batch = next(batches_of(config, source, sampler, 0, 1))
    schedule = trainer.schedule
    if unknown:
        lines.append(f"steps: {config.num_epochs:g} epochs of data that is not set yet")
    else:
        lines.append(
            f"steps: {schedule.num_steps}, {schedule.warmup_steps} of them warm-up; "
            f"learning rate {schedule.learning_rate:g}"
        )
    lines.append("one batch:")
    lines += [f"  {k}: {v.dtype} {list(v.shape)}" for k, v in batch.items()]
    memory = trainer.step.lower(state, batch_shapes(config)).compile().memory_analysis()
    gib = {
        "state and batch": memory.argument_size_in_bytes / 2**30,
        "temporary": memory.temp_size_in_bytes / 2**30,
    }
    lines.append(
        f"memory per device ({jax.devices()[0].device_kind}): "
        + ", ".join(f"{v:.2f} GiB {k}" for k, v in gib.items())
    )
    return "\n".join(lines)


def _encoder_and_decoder(parts: Mapping[str, int]) -> str:
    line = f"  {parts['encoder'] / 1e6:.2f} M encoder"
    if "decoder" not in parts:
        return line
    both = parts["encoder"] + parts["decoder"]
    return (
        f"{line}, {parts['decoder'] / 1e6:.2f} M decoder: {both / 1e6:.2f} M in "
        "encoder + decoder"
    )


def count_parameters(params: nnx.State) -> int:
    """The number of parameters in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

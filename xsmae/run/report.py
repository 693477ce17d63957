"""What a run says about itself: before it starts, at its end, and instead of it."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_collections
from flax import nnx

from xsmae.data.catalogue import build_source, missing_arguments
from xsmae.data.pipeline import check_bands, check_batch_size
from xsmae.data.records import Source
from xsmae.process.files import read_jsonl
from xsmae.run.knn import create_monitors
from xsmae.trainer import (
    Trainer,
    batch_shapes,
    batches_of,
    create_sampler,
    create_trainer,
)


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
        f"{schedule.learning_rate:g}, warm-up {schedule.warmup_steps} steps, "
        f"{trainer.mesh.size} device(s)"
        + "".join(f"\n{note}" for note in source.notes())
    )


def summary(workdir: Path) -> str:
    """The table at the end of a run, from its `metrics.jsonl`."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    losses = [row for row in rows if "loss" in row]
    lines = []
    if losses:  # none are left if the file was lost or damaged
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
    """Build and compile everything and train nothing; returns the report.

    Data that is not given yet is left out, and said to be.
    """
    missing = missing_arguments(config.data)
    sampler = create_sampler(config)
    source = None if missing else build_source(config.data)
    unknown = config.num_steps is None and source is None
    # Without data the number of steps is not known; the step's program is the same.
    num_images = len(source) if source else 1000 * config.batch_size
    trainer = create_trainer(config, num_images=num_images)
    state = jax.eval_shape(trainer.initial_state)
    model = nnx.merge(trainer.graphdef, state.params, state.batch_stats)
    parts = {
        name: count_parameters(nnx.state(part, nnx.Param))
        for name, part in model.parts().items()
    }
    lines = [
        f"method: {config.method}",
        f"parameters: {count_parameters(state.params) / 1e6:.2f} M in all",
        f"  {parts['encoder'] / 1e6:.2f} M encoder, {parts['decoder'] / 1e6:.2f} M "
        f"decoder: {(parts['encoder'] + parts['decoder']) / 1e6:.2f} M in encoder + "
        "decoder",
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
        check_bands(source, config.bands)
        check_batch_size(source, config.batch_size)
        create_monitors(config, source)
        batch = next(batches_of(config, source, sampler, 0, 1))
    schedule = trainer.schedule
    if unknown:
        lines.append(f"steps: {config.num_epochs:g} epochs of the data, when it is set")
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


def count_parameters(params: nnx.State) -> int:
    """The number of numbers in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

"""What a run measures of itself as it goes: the kNN of its features, and controls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from xsmae.process.files import read_jsonl
from xsmae.train_state import TrainState

if TYPE_CHECKING:
    from xsmae.run.run import Run


def due_every(step: int, every: int) -> bool:
    """Whether what happens every so many steps, 0 or -1 for never, does after this."""
    return every > 0 and step % every == 0


def is_due(run: Run, step: int) -> bool:
    """Whether the kNN monitor is due after `step`."""
    last = step == run.trainer.schedule.num_steps
    return run.monitor is not None and (due_every(step, run.config.knn.every) or last)


def at_the_start(run: Run, state: TrainState, start: int) -> None:
    """The controls where the run has none yet; the accuracy that a stop left out."""
    if run.monitor is None:
        return
    rows = read_jsonl(run.workdir / "metrics.jsonl")
    # A resumed run has none where the monitor was off until now.
    if start == 0 or not any("knn/image_statistics" in row for row in rows):
        # Not of `state`, which may hold the weights of `config.init`.
        untrained = run.trainer.initial_params()
        encode = functools.partial(run.trainer.encode, untrained)
        run.writer.write(start, _named("knn/", run.monitor.controls(encode)))
    if start > 0 and is_due(run, start):
        done = {row["step"] for row in rows if "knn/accuracy_cls" in row}
        if start not in done:
            after_step(run, state, start)


def after_step(run: Run, state: TrainState, step: int) -> None:
    """Measure now; where a signal stops it, the next start makes up for it."""
    encode = functools.partial(run.trainer.encode, state.params)
    try:
        accuracy = run.monitor.accuracy(encode)
    except KeyboardInterrupt:
        if run.stop.signal is None:
            raise
        return  # the run saves its state and stops
    run.writer.write(step, _named("knn/accuracy_", accuracy))
    shares = ", ".join(
        f"{name} {100 * value:.1f} %" for name, value in accuracy.items()
    )
    print(f"step {step}/{run.trainer.schedule.num_steps}  kNN {shares}", flush=True)


def at_the_end(run: Run, state: TrainState) -> None:
    """The accuracy of all labelled images and its controls, once."""
    rows = read_jsonl(run.workdir / "metrics.jsonl")
    monitor, trainer = run.full_monitor, run.trainer
    if monitor is None or any("knn_full/accuracy_cls" in row for row in rows):
        return
    print("kNN with all labelled images", flush=True)
    accuracy = monitor.accuracy(functools.partial(trainer.encode, state.params))
    untrained = trainer.initial_params()  # as it was before step 1
    controls = monitor.controls(functools.partial(trainer.encode, untrained))
    run.writer.write(
        trainer.schedule.num_steps,
        _named("knn_full/accuracy_", accuracy) | _named("knn_full/", controls),
    )


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}

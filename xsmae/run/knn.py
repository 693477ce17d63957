"""Measures the kNN accuracy of a run's features, and of its controls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import ml_collections

from xsmae.data.catalogue import build_source
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.process.files import read_jsonl
from xsmae.process.log import LOG
from xsmae.run.hooks import Done, Hook, due_every
from xsmae.run.run import Run
from xsmae.train_state import TrainState

PARTS = ("train", "test")  # the parts of the kNN monitor


def create_monitors(
    config: ml_collections.ConfigDict,
    source: Source,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[KnnMonitor | None, KnnMonitor | None]:
    """The kNN monitor during the run, and the one for all images at its end.

    Either is None if there are no labels or if `config.knn` switches it off.
    """
    knn = config.knn
    if len(source.class_names) < 2 or knn.every < 0:
        return None, None
    try:
        train, test = (build_source({**config.data, **knn[n]}) for n in PARTS)
    except UserError as error:
        raise UserError(
            f"the kNN monitor cannot read its images (config.knn.train, "
            f"config.knn.test): {error}; or switch it off with --config.knn.every=-1"
        ) from None
    devices = jax.device_count()
    create = functools.partial(
        KnnMonitor,
        train,
        test,
        size=config.views.size,
        k=knn.k,
        temperature=knn.temperature,
        batch_size=-(-knn.batch_size // devices) * devices,
        should_stop=should_stop,
        say=LOG.info,
    )
    during = create(max_train=knn.max_train, max_test=knn.max_test)
    return during, create(max_train=0, max_test=0) if knn.full_at_end else None


class Knn(Hook):
    """Measures the run's features: with `during` on the way, with `full` at the end.

    during, full: from `create_monitors`.
    """

    def __init__(self, run: Run, during: KnnMonitor | None, full: KnnMonitor | None):
        super().__init__(run)
        self.during, self.full = during, full

    def begin(self, state: TrainState) -> None:
        """Measure the controls if missing, and an accuracy that a stop skipped."""
        run = self.run
        if self.during is None:
            return
        rows = read_jsonl(run.workdir / "metrics.jsonl")
        # A resumed run has no controls if the monitor was off before.
        if run.start == 0 or not any("knn/image_statistics" in row for row in rows):
            # Do not use `state`: it may have the weights of `config.init`.
            controls = self.during.controls(self._encoder(run.trainer.initial_params()))
            run.writer.write(run.start, _named("knn/", controls))
        if run.start > 0 and self.due(run.start):
            done = {row["step"] for row in rows if "knn/accuracy_cls" in row}
            if run.start not in done:
                self._measure(state, run.start)

    def due(self, step: int) -> bool:
        if self.during is None:
            return False
        return due_every(step, self.run.config.knn.every) or step == self.run.num_steps

    def __call__(self, done: Done) -> None:
        self._measure(done.state, done.step)

    def end(self, state: TrainState) -> None:
        """Measure accuracy and controls on all labelled images, once per run."""
        run = self.run
        rows = read_jsonl(run.workdir / "metrics.jsonl")
        if self.full is None or any("knn_full/accuracy_cls" in row for row in rows):
            return
        LOG.info("kNN with all labelled images")
        accuracy = self.full.accuracy(self._encoder(state.params))
        untrained = run.trainer.initial_params()  # the weights before step 1
        controls = self.full.controls(self._encoder(untrained))
        values = _named("knn_full/accuracy_", accuracy) | _named("knn_full/", controls)
        run.writer.write(run.num_steps, values)

    def _measure(self, state: TrainState, step: int) -> None:
        """Measure now. If a signal stops it, the next start measures instead."""
        run = self.run
        try:
            accuracy = self.during.accuracy(self._encoder(state.params))
        except KeyboardInterrupt:
            if run.stop.signal is None:
                raise
            return  # the run saves its state and stops
        run.writer.write(step, _named("knn/accuracy_", accuracy))
        shares = ", ".join(
            f"{name} {100 * value:.1f} %" for name, value in accuracy.items()
        )
        LOG.info(f"step {step}/{run.num_steps}  kNN {shares}")

    def _encoder(self, params):
        return functools.partial(self.run.trainer.encode, params)


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}

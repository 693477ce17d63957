"""Hooks: what a run does besides its steps. The loop calls them after each step.

A new evaluator is one class, and one line in the list of hooks in `train.py`:

    class FeatureNorm(Hook):
        def due(self, step):
            return due_every(step, 1000) or step == self.run.num_steps

        def __call__(self, done):
            batch = first_samples(self.run.config, self.run.source, self.run.sampler, 8)
            images, gsd = batch["image"][:, 0], batch["gsd"][:, 0]
            features = self.run.trainer.encode(done.state.params, images, gsd)
            norm = float(np.linalg.norm(features["mean"], axis=1).mean())
            self.run.writer.write(done.step, {"feature_norm": norm})

Its values become a line of `metrics.jsonl`. If a run has several processes, all of them
must call the same hooks after the same steps, because a hook may use all devices. So
`due` must not depend on anything that only one process knows: the run would hang.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from xsmae.bands import Bands
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.process.log import LOG
from xsmae.run.hosts import counted_together
from xsmae.run.origin import describe_run
from xsmae.run.run import Run
from xsmae.sharding import replicated
from xsmae.train_state import TrainState
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder
from xsmae.weights.gsd_range import GsdRange, seen_by_all
from xsmae.weights.model_card import NAME as CARD
from xsmae.weights.model_card import write_card


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished step, for hooks.

    state: after the step. The next step overwrites it, so a hook must not keep it.
    batch: this process's part. metrics: may still be computing; reading one waits for
    the step. replaced: how many images of the batch could not be used.
    """

    step: int
    state: TrainState
    batch: Mapping[str, np.ndarray]
    metrics: Mapping[str, jax.Array]
    replaced: int


class Hook:
    """Something that a run does besides its steps. By default, methods do nothing.

    timed: True if its time counts in images per second and in the time left.
    """

    timed = False

    def __init__(self, run: Run):
        self.run = run

    def begin(self, state: TrainState) -> None:
        """Called before the first step, also when a run resumes."""

    def due(self, step: int) -> bool:
        """True if the hook is to be called after `step`."""
        return False

    def __call__(self, done: Done) -> None:
        """Called after a step that is due."""

    def end(self, state: TrainState) -> None:
        """Called after the last step of the run, unless it was stopped before."""

    def close(self) -> None:
        """Called when this process's part of the run ends, for whatever reason."""


def due_every(step: int, every: int) -> bool:
    """True if an action done every `every` steps is due after `step` (0, -1: never)."""
    return every > 0 and step % every == 0


def call_due(hooks: Sequence[Hook], done: Done) -> None:
    """Call the hooks that are due after a step, in order."""
    for hook in hooks:
        if hook.due(done.step):
            progress = hook.run.progress
            with contextlib.nullcontext() if hook.timed else progress.paused():
                hook(done)


class Log(Hook):
    """Writes a line to `metrics.jsonl` and to the terminal.

    After that line, raises TooManyRejected if all processes together have found too
    many bad images. Only this exchange between them can tell.
    """

    timed = True  # reading the metrics waits for the devices

    def due(self, step: int) -> bool:
        every = self.run.config.log_every
        return due_every(step, every) or step in (1, self.run.num_steps)

    def __call__(self, done: Done) -> None:
        run, step = self.run, done.step
        values = {name: float(value) for name, value in done.metrics.items()}
        values["epoch"] = step / run.trainer.schedule.steps_per_epoch
        rejected, replaced = counted_together(run.rejected.reasons, done.replaced)
        values["rejected"], values["replaced_in_batch"] = rejected, replaced
        rates = {
            "images_per_second": run.progress.images_per_second(step),
            "waiting_for_data": run.progress.waiting_for_data(),
        }
        # The first step compiles, so its rate says nothing.
        values |= rates if step > run.start + 1 else dict.fromkeys(rates, math.nan)
        run.writer.write(step, values)
        LOG.info(run.progress.line(step, values))
        run.rejected.check_limit(rejected)


class RecordGsdRange(Hook):
    """Records the range of GSDs that the encoder gets."""

    timed = True  # it writes only when the range widens

    def __init__(self, run: Run):
        super().__init__(run)
        self._gsd_range = GsdRange(run.workdir, start=run.start)

    def due(self, step: int) -> bool:
        return True

    def __call__(self, done: Done) -> None:
        self._gsd_range.add(done.step, self.run.gsd_seen(done.batch["gsd"]))


class WriteEncoder(Hook):
    """Writes `<workdir>/encoder` at the end of a run, again if its results changed.

    during, full: from `create_monitors`, for the results in the model card.
    """

    def __init__(self, run: Run, during: KnnMonitor | None, full: KnnMonitor | None):
        super().__init__(run)
        self._monitors = during, full
        self._written: dict[str, Any] | None = None  # the description

    def end(self, state: TrainState) -> None:
        run, config, trainer = self.run, self.run.config, self.run.trainer
        # All processes must take part in gathering the weights; only one writes.
        whole = jax.jit(lambda *parts: parts, out_shardings=replicated(trainer.mesh))
        model = nnx.merge(trainer.graphdef, *whole(state.params, state.batch_stats))
        gsd_range = seen_by_all(run.workdir, run.num_steps)
        if jax.process_index() != 0:
            return
        described = describe_encoder(
            config.model,
            image_size=config.views.size,
            bands=Bands.of(config),
            gsd_range=gsd_range,
            run=describe_run(run, *self._monitors),
        )
        if described == self._written:
            return
        self._written = described
        folder = run.workdir / "encoder"
        Encoder(model.encoder, described).save(folder)
        if not write_card(folder, described):
            LOG.info(f"{folder / CARD} was edited, so it is kept")


class Profile(Hook):
    """Traces the steps `config.profile` = (first, last) into `<workdir>/profile`.

    A run that resumes between the two traces the remaining ones. The trace ends early
    if the run ends or is stopped before `last`.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        self.folder = run.workdir / "profile"
        self._first, last = run.config.profile or (0, 0)
        self._last = min(last, run.num_steps)
        self._tracing = False

    def begin(self, state: TrainState) -> None:
        if self._first > self.run.num_steps:
            LOG.warning(
                f"nothing is profiled: profile begins at step {self._first}, but the "
                f"run ends at step {self.run.num_steps}"
            )
        if self._first <= self.run.start + 1 <= self._last:
            self._start(self.run.start + 1)

    def due(self, step: int) -> bool:
        begins = step + 1 == self._first <= self._last
        return begins or (self._tracing and step == self._last)

    def __call__(self, done: Done) -> None:
        if self._tracing:
            jax.block_until_ready(done.metrics)
            self.close()
        else:
            self._start(done.step + 1)

    def close(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        with _goes_on_without_a_profile():
            jax.profiler.stop_trace()
            LOG.info(
                f"the profile from step {self._begun} is in {self.folder}: open its "
                "*.trace.json.gz at https://ui.perfetto.dev, or the folder with "
                f"`xprof {self.folder}` (pip install xprof)"
            )

    def _start(self, step: int) -> None:
        with _goes_on_without_a_profile():
            jax.profiler.start_trace(self.folder)
            self._tracing, self._begun = True, step


@contextlib.contextmanager
def _goes_on_without_a_profile() -> Iterator[None]:
    """Warn, and continue the run, if the profiler fails."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        LOG.warning(f"no profile is written ({' '.join(str(error).split())})")

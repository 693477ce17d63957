"""A training run: from a config to checkpoints, curves, pictures and an encoder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from xsmae.checkpoints import Checkpoints
from xsmae.data.catalogue import build_source
from xsmae.data.pipeline import check_bands, check_batch_size
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.process.lock import FolderLock
from xsmae.process.log import LOG, shown
from xsmae.process.signals import StopRequest
from xsmae.process.watchdog import Watchdog
from xsmae.run import choices
from xsmae.run.hooks import (
    Done,
    Hook,
    Log,
    Profile,
    RecordGsdRange,
    WriteEncoder,
    call_due,
    due_every,
)
from xsmae.run.hosts import StopTogether, end_alone, own_folder
from xsmae.run.knn import Knn, create_monitors
from xsmae.run.pictures import Crops, GsdHistogram, Reconstructions
from xsmae.run.rejected import TooManyRejected
from xsmae.run.report import describe, summary
from xsmae.run.run import Run, create_run
from xsmae.run.workdir import check_outside_data, open_workdir, told_in_one_line
from xsmae.sharding import by_batch, put_batch
from xsmae.train_state import TrainState
from xsmae.trainer import (
    Trainer,
    batches_of,
    create_sampler,
    create_trainer,
    step_fields,
)
from xsmae.weights.warm_start import keep_config, load_weights


@shown()
def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one.

    Returns the exit status: 0 when the run is complete, 128 + n when signal n stopped
    it (after a step, with the state saved). Raises UserError for errors that the user
    can fix, if another process uses the workdir, or after too many failed saves.
    """
    # Check all input first, so that an error leaves no files behind.
    source = build_source(config.data)
    ids = map(source.id, range(len(source)))
    check_outside_data(workdir, config.data, ids, flag="--workdir")
    check_bands(source, config)
    config, chosen = choices.settle(config, source, workdir=workdir)
    check_batch_size(source, config.batch_size)
    sampler = create_sampler(config)
    trainer = create_trainer(config, num_images=len(source))
    request = StopRequest()
    stop = StopTogether(request, trainer.mesh)
    folder = own_folder(workdir)
    watchdog = Watchdog(folder / "hang.log", minutes=config.watchdog_minutes)

    def should_stop() -> bool:  # called between the batches of an evaluation
        watchdog.feed()
        return stop.asked()

    monitors = create_monitors(config, source, should_stop=should_stop)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FolderLock(folder))
        stack.enter_context(told_in_one_line(workdir))
        open_workdir(folder, config)
        stack.enter_context(request)
        stack.enter_context(watchdog.watching())
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(
                    workdir / "checkpoints",
                    keep=config.checkpoint.keep,
                    keep_every=config.checkpoint.keep_every,
                )
            )
        )
        resumed, state = _first_state(config, workdir, source, trainer, checkpoints)
        LOG.info("\n".join([*chosen, describe(config, trainer, source)]))
        run = create_run(
            config,
            folder,
            source,
            sampler,
            trainer,
            checkpoints,
            resume_step=resumed,
            stop=stop,
            watchdog=watchdog,
        )
        stack.enter_context(contextlib.closing(run.writer))
        # They are called in this order.
        encoder = WriteEncoder(run, *monitors)
        hooks = [
            Log(run),
            Crops(run),
            RecordGsdRange(run),
            encoder,  # before the last kNN, which takes long and may be stopped
            Knn(run, *monitors),
            Reconstructions(run, monitors[0]),
            GsdHistogram(run),
            encoder,  # again, with the results of the kNN
            Profile(run),  # last, so that it starts after the other hooks of a step
        ]
        for hook in hooks:
            stack.callback(hook.close)
        try:
            state = train(run, hooks, state)
            if not stop.after_all():
                for hook in hooks:
                    hook.end(state)
        except KeyboardInterrupt:
            if stop.signal is None:
                raise
        run.saver.finish()
        if stop.signal is None:
            checkpoints.remove_damaged(feed=watchdog.feed)
    if stop.signal is not None:
        LOG.info(f"stopped; the same command resumes the run in {workdir}")
        return 128 + stop.signal
    if jax.process_index() == 0:
        LOG.info(summary(workdir))
    return 0


def _first_state(
    config: ml_collections.ConfigDict,
    workdir: Path,
    source: Source,
    trainer: Trainer,
    checkpoints: Checkpoints,
) -> tuple[int | None, TrainState]:
    """The step to resume from (None for a new run) and the state."""
    found = checkpoints.restore_newest(
        trainer.state_shapes(), fingerprint=source.fingerprint
    )
    if found is not None:
        complete = found[0] == trainer.schedule.num_steps
        said = "complete at" if complete else "resuming from"
        LOG.info(f"{said} step {found[0]}, saved in {workdir}")
        return found
    state = trainer.initial_state()
    if config.init:
        state = dataclasses.replace(state, **load_weights(config.init, state, config))
        if jax.process_index() == 0:
            keep_config(config.init, workdir)
        LOG.info(f"starting from the weights in {config.init}")
    return None, state


def train(run: Run, hooks: Sequence[Hook], state: TrainState) -> TrainState:
    """The loop over the steps after `run.start`; returns the last state.

    Actions that all processes must take in the same order are here; the rest are hooks:

    1. Before a step, rejected images are counted. If this process has too many, the
       state of the previous step is saved. The log hook counts the rejected images of
       all processes; if those are too many, the state of this step is saved.
    2. Each step is checked for non-finite numbers one step late, so that the devices do
       not wait for the host. Before a save, the check happens at once.
    3. Hooks see the state of the finished step, saved or not.
    4. All processes stop after the same step and save it last.
    """
    config, num_steps = run.config, run.num_steps
    for hook in hooks:
        hook.begin(state)
        if run.stop.asked():
            return state  # already saved; the next start repeats the kNN
    sharding = by_batch(run.trainer.mesh)
    batches = batches_of(config, run.source, run.sampler, run.start, num_steps)
    previous, save_due = None, False  # previous: metrics and images of the last step
    for step, batch in enumerate(run.progress.receive(batches), run.start + 1):
        replaced = _account_for(run, batch, step, state)
        arrays = put_batch(step_fields(batch), sharding)
        state, metrics = run.trainer.step(state, arrays)
        run.watchdog.feed()
        run.saver.poll()
        if previous is not None:
            run.nonfinite.check(*previous, step=step - 1)
        previous = metrics, np.array(batch["index"])
        if step == run.start + 1:  # this step compiles, so rates start after it
            jax.block_until_ready(metrics)
            run.progress.restart(step)
        try:
            call_due(hooks, Done(step, state, batch, metrics, replaced))
        except TooManyRejected:
            run.saver.save(step, state)
            raise
        with run.progress.paused():
            stopping = run.stop.after_step()
            final = stopping or step == num_steps
            save_due |= final or due_every(step, config.checkpoint.every)
            if save_due:
                run.nonfinite.check(*previous, step=step)
            # A skipped update must not replace a good checkpoint.
            if save_due and (final or not run.nonfinite.in_a_row):
                run.saver.save(step, state)
                save_due = False
        if stopping:
            break
    return state


def _account_for(
    run: Run, batch: dict[str, np.ndarray], step: int, state: TrainState
) -> int:
    """Counts the rejected images in the batch of `step`; `state` precedes the step.

    With several processes, only the process with too many ends, without a save: a save
    needs all processes.
    """
    try:
        return run.rejected.check(batch, step=step)
    except UserError as error:
        end_alone(error)
        run.saver.save(step - 1, state)
        raise

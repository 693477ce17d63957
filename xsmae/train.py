"""The run: from a config to checkpoints, curves, pictures and an encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from xsmae.bands import Bands
from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.saving import Saver
from xsmae.data.catalogue import build_source
from xsmae.data.pipeline import check_bands, check_batch_size
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.process.lock import FolderLock
from xsmae.process.progress import Progress
from xsmae.process.signals import StopRequest
from xsmae.process.watchdog import Watchdog
from xsmae.run import drawing, monitoring
from xsmae.run.hosts import StopTogether, counted_together, end_alone, own_folder
from xsmae.run.metrics import MetricsWriter
from xsmae.run.monitoring import due_every
from xsmae.run.monitors import create_monitors
from xsmae.run.nonfinite import NonfiniteBatches
from xsmae.run.rejected import RejectedImages
from xsmae.run.report import describe, summary
from xsmae.run.run import Run
from xsmae.run.workdir import goes_on_without, open_workdir, told_in_one_line
from xsmae.sharding import by_batch, put_batch, replicated
from xsmae.train_state import TrainState
from xsmae.trainer import (
    STEP_FIELDS,
    Trainer,
    batches_of,
    create_sampler,
    create_trainer,
)
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder
from xsmae.weights.gsd_range import GsdRange, seen_by_all
from xsmae.weights.warm_start import keep_config, load_weights


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Train to the end, from the newest checkpoint in `workdir` if there is one.

    Returns the exit status: 0 when the run is complete, 128 + n when signal n stopped
    it (after a step, the state is saved). Raises UserError for what the user can mend,
    also where another process has the workdir, or where too many saves have failed.
    """
    # All that can be wrong with the input comes first, and leaves no trace.
    source = build_source(config.data)
    check_bands(source, config.bands)
    check_batch_size(source, config.batch_size)
    sampler = create_sampler(config)
    trainer = create_trainer(config, num_images=len(source))
    request = StopRequest()
    stop = StopTogether(request, trainer.mesh)
    first = jax.process_index() == 0
    folder = own_folder(workdir)
    watchdog = Watchdog(folder / "hang.log", minutes=config.watchdog_minutes)

    def should_stop() -> bool:  # asked between the batches of an evaluation
        watchdog.feed()
        return stop.asked()

    monitor, full_monitor = create_monitors(config, source, should_stop=should_stop)
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
        start, state = _first_state(config, workdir, source, trainer, checkpoints)
        print(describe(config, trainer, source), flush=True)
        writer = MetricsWriter(
            folder,
            resume_step=start,
            tensorboard=config.tensorboard and first,
            wandb_config=config.to_dict() if config.wandb and first else None,
        )
        stack.enter_context(contextlib.closing(writer))
        rejected = RejectedImages(
            folder / "rejected.jsonl",
            source,
            max_fraction=config.input.max_rejected_fraction,
            resume_step=start,
        )
        nonfinite = NonfiniteBatches(
            folder, source, limit=config.optim.max_nonfinite, resume_step=start
        )
        saver = Saver(
            checkpoints,
            fingerprint=source.fingerprint,
            allowed=config.checkpoint.keep_going_without_checkpoints,
        )
        run = Run(
            config=config,
            workdir=folder,
            source=source,
            sampler=sampler,
            trainer=trainer,
            monitor=monitor,
            full_monitor=full_monitor,
            saver=saver,
            writer=writer,
            rejected=rejected,
            nonfinite=nonfinite,
            stop=stop,
            watchdog=watchdog,
        )
        try:
            state = train(run, state, start or 0)
            if not stop.after_all():
                finish(run, state)
        except KeyboardInterrupt:
            if stop.signal is None:
                raise
        saver.finish()
        if stop.signal is None:
            checkpoints.remove_damaged(feed=watchdog.feed)
    if stop.signal is not None:
        print(f"stopped; the same command goes on from {workdir}", flush=True)
        return 128 + stop.signal
    if first:
        print(summary(workdir), flush=True)
    return 0


def _first_state(
    config: ml_collections.ConfigDict,
    workdir: Path,
    source: Source,
    trainer: Trainer,
    checkpoints: Checkpoints,
) -> tuple[int | None, TrainState]:
    """The state to go on from and its step, None where the run begins."""
    found = checkpoints.restore_newest(
        trainer.state_shapes(), fingerprint=source.fingerprint
    )
    if found is not None:
        print(f"going on from step {found[0]}, saved in {workdir}", flush=True)
        return found
    state = trainer.initial_state()
    if config.init:
        state = dataclasses.replace(state, **load_weights(config.init, state))
        if jax.process_index() == 0:
            keep_config(config.init, workdir)
        print(f"starting from the weights in {config.init}", flush=True)
    return None, state


def train(run: Run, state: TrainState, start: int) -> TrainState:
    """The loop over the steps after `start`."""
    config, trainer = run.config, run.trainer
    num_steps = trainer.schedule.num_steps
    monitoring.at_the_start(run, state, start)
    if run.stop.asked():
        return state  # it is saved as it was, and the next start makes up for the kNN
    sharding = by_batch(trainer.mesh)
    progress = Progress(
        start_step=start, num_steps=num_steps, batch_size=config.batch_size
    )
    batches = batches_of(config, run.source, run.sampler, start, num_steps)
    previous, due = None, False  # previous: a step's metrics and images
    gsds = drawing.Gsds(run)
    gsd_range = GsdRange(run.workdir, start=start)
    for step, batch in enumerate(progress.receive(batches), start + 1):
        try:
            replaced = run.rejected.check(batch, step=step)
        except UserError as error:
            end_alone(error)  # of several processes: a save would take all of them
            run.saver.save(step - 1, state)
            raise
        arrays = put_batch({name: batch[name] for name in STEP_FIELDS}, sharding)
        state, metrics = trainer.step(state, arrays)
        run.watchdog.feed()
        run.saver.poll()
        if previous is not None:
            # Of the step before, so that the devices do not wait for the host.
            run.nonfinite.check(*previous, step=step - 1)
        previous = metrics, np.array(batch["index"])

        last = step == num_steps
        gsds.add(batch)
        gsd_range.add(step, drawing.gsd_seen(run, batch["gsd"]))
        if step % config.log_every == 0 or step == 1 or last:
            values = {name: float(value) for name, value in metrics.items()}
            values["epoch"] = step / trainer.schedule.steps_per_epoch
            rejected, replaced = counted_together(run.rejected.reasons, replaced)
            values["rejected"], values["replaced_in_batch"] = rejected, replaced
            rates = {
                "images_per_second": progress.images_per_second(step),
                "waiting_for_data": progress.waiting_for_data(),
            }
            # The first step compiles, which is not the rate to go by.
            values |= rates if step > start + 1 else dict.fromkeys(rates, math.nan)
            run.writer.write(step, values)
            print(progress.line(step, values), flush=True)
            _check_limit(run, rejected, step, state)
        if step == start + 1:
            with goes_on_without("the picture of the crops"):
                drawing.crops(run, batch)
            jax.block_until_ready(metrics)
            progress.restart(step)
        with progress.paused():
            if monitoring.is_due(run, step):
                monitoring.after_step(run, state, step)
            if due_every(step, config.figures.every) or last:
                with goes_on_without("the reconstructions"):
                    drawing.progress(run, state, step)
            if gsds.due(last=last):
                with goes_on_without("the picture of the GSDs"):
                    gsds.draw()
            stopping = run.stop.after_step()
            due = due or due_every(step, config.checkpoint.every) or last or stopping
            if due:
                run.nonfinite.check(*previous, step=step)
            # Steps that have changed nothing must not push out one that is good.
            if due and (last or stopping or not run.nonfinite.in_a_row):
                run.saver.save(step, state)
                due = False
        if stopping:
            break
    return state


def finish(run: Run, state: TrainState) -> None:
    """The kNN over all labelled images, and the encoder that is carried away."""
    config, trainer = run.config, run.trainer
    monitoring.at_the_end(run, state)
    # Whole on every device, which takes all processes; one of them writes.
    whole = jax.jit(lambda *parts: parts, out_shardings=replicated(trainer.mesh))
    model = nnx.merge(trainer.graphdef, *whole(state.params, state.batch_stats))
    gsd_range = seen_by_all(run.workdir, trainer.schedule.num_steps)
    if jax.process_index() != 0:
        return
    described = describe_encoder(
        config.model,
        image_size=config.views.size,
        bands=Bands.of(config),
        gsd_range=gsd_range,
        run={
            "method": config.method,
            "seed": config.seed,
            "steps": trainer.schedule.num_steps,
            "batch_size": config.batch_size,
            "data": repr(run.source),
        },
    )
    Encoder(model.encoder, described).save(run.workdir / "encoder")


def _check_limit(run: Run, rejected: int, step: int, state: TrainState) -> None:
    """Stop all processes alike where they have met too many bad images together."""
    try:
        run.rejected.check_limit(rejected)
    except UserError:
        run.saver.save(step, state)
        raise

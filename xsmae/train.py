"""The run: from a config to checkpoints, curves, pictures and an encoder."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from xsmae import figures
from xsmae.checkpoint import Checkpoints
from xsmae.data.catalogue import build_source
from xsmae.data.multiscale import ViewSampler
from xsmae.data.pipeline import RejectedImages, check_batch_size
from xsmae.data.sources import Source
from xsmae.encoder import write_encoder
from xsmae.errors import UserError
from xsmae.evaluation.knn import KnnMonitor
from xsmae.init import load_weights
from xsmae.metrics import MetricsWriter, Progress, read_metrics
from xsmae.report import describe, summary
from xsmae.sharding import by_batch, put_batch
from xsmae.signals import StopRequest
from xsmae.train_state import TrainState
from xsmae.trainer import (
    STEP_FIELDS,
    Trainer,
    batches_of,
    create_monitors,
    create_sampler,
    create_trainer,
    first_samples,
)
from xsmae.workdir import open_workdir

GSD_SAMPLES = 2000  # samples in the histogram of GSDs, enough for a smooth one


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    config: ml_collections.ConfigDict
    workdir: Path
    source: Source
    sampler: ViewSampler
    trainer: Trainer
    monitor: KnnMonitor | None
    full_monitor: KnnMonitor | None
    checkpoints: Checkpoints
    writer: MetricsWriter
    rejected: RejectedImages
    stop: StopRequest


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Train to the end, from the newest checkpoint in `workdir` if there is one.

    Returns the exit status: 0 when the run is complete, 128 + n when signal n stopped
    it (after a step, the state is saved). Raises UserError for what the user can mend.
    """
    # All that can be wrong with the input comes first, and leaves no trace.
    source = build_source(config.data)
    check_batch_size(source, config.batch_size)
    sampler = create_sampler(config)
    trainer = create_trainer(config, num_images=len(source))
    stop = StopRequest()
    monitors = create_monitors(
        config, source, should_stop=lambda: stop.signal is not None
    )
    open_workdir(workdir, config)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    start = checkpoints.latest_step()
    if start is None:
        state = trainer.initial_state()
        if config.init:
            state = dataclasses.replace(state, **load_weights(config.init, state))
            print(f"starting from the weights in {config.init}", flush=True)
    else:
        state = checkpoints.restore(
            start, trainer.state_shapes(), fingerprint=source.fingerprint
        )
        print(f"going on from step {start}, saved in {workdir}", flush=True)
    print(describe(config, trainer, source), flush=True)
    writer = MetricsWriter(
        workdir,
        resume_step=start,
        tensorboard=config.tensorboard,
        wandb_config=config.to_dict() if config.wandb else None,
    )
    rejected = RejectedImages(
        workdir / "rejected.jsonl",
        source,
        max_fraction=config.input.max_rejected_fraction,
        resume_step=start,
    )
    with stop:
        run = Run(
            config,
            workdir,
            source,
            sampler,
            trainer,
            *monitors,
            checkpoints,
            writer,
            rejected,
            stop,
        )
        try:
            state = train(run, state, start or 0)
            if stop.signal is None:
                finish(run, state)
        except KeyboardInterrupt:
            if stop.signal is None:
                raise
        finally:
            checkpoints.close()
            writer.close()
    if stop.signal is not None:
        print(f"stopped; the same command goes on from {workdir}", flush=True)
        return 128 + stop.signal
    print(summary(workdir), flush=True)
    return 0


def train(run: Run, state: TrainState, start: int) -> TrainState:
    """The loop over the steps after `start`."""
    config, trainer = run.config, run.trainer
    num_steps = trainer.schedule.num_steps
    _monitor_start(run, state, start)
    sharding = by_batch(trainer.mesh)
    progress = Progress(
        start_step=start, num_steps=num_steps, batch_size=config.batch_size
    )
    batches = batches_of(config, run.source, run.sampler, start, num_steps)
    previous, seen = None, []
    gsd_wanted = not (run.workdir / "figures" / "gsd.png").exists()
    for step, batch in enumerate(progress.receive(batches), start + 1):
        try:
            replaced = run.rejected.check(batch, step=step)
        except UserError:
            _save(run, state, step - 1)
            raise
        arrays = put_batch({name: batch[name] for name in STEP_FIELDS}, sharding)
        state, metrics = trainer.step(state, arrays)
        # Of the step before, so that the devices do not wait for the host.
        _check_finite(config, previous, step - 1)
        previous = metrics

        last = step == num_steps
        if gsd_wanted:
            seen.append({name: np.array(batch[name]) for name in ("gsd", "box")})
        if step % config.log_every == 0 or step == 1 or last:
            values = {name: float(value) for name, value in metrics.items()}
            values["epoch"] = step / trainer.schedule.steps_per_epoch
            values["rejected"] = len(run.rejected)
            values["replaced_in_batch"] = replaced
            rates = {
                "images_per_second": progress.images_per_second(step),
                "waiting_for_data": progress.waiting_for_data(),
            }
            # The first step compiles, which is not the rate to go by.
            values |= rates if step > start + 1 else dict.fromkeys(rates, math.nan)
            run.writer.write(step, values)
            print(progress.line(step, values), flush=True)
        if step == start + 1:
            _draw_crops(run, batch)
            jax.block_until_ready(metrics)
            progress.restart(step)
        with progress.paused():
            if _monitored(run, step):
                _monitor(run, state, step)
            if _due(step, config.figures.every) or last:
                _draw_progress(run, state, step)
            enough = len(seen) * config.batch_size >= GSD_SAMPLES
            if gsd_wanted and (enough or last):
                _draw_gsds(run, seen)
                gsd_wanted, seen = False, []
            stopping = run.stop.signal is not None
            if _due(step, config.checkpoint.every) or last or stopping:
                _check_finite(config, metrics, step)
                _save(run, state, step)
        if stopping:
            break
    return state


def _save(run: Run, state: TrainState, step: int) -> None:
    if step > 0 and step != run.checkpoints.latest_step():
        run.checkpoints.save(step, state, fingerprint=run.source.fingerprint)


def finish(run: Run, state: TrainState) -> None:
    """The kNN over all labelled images, and the encoder that is carried away."""
    config, trainer = run.config, run.trainer
    rows = read_metrics(run.workdir / "metrics.jsonl")
    monitor = run.full_monitor
    if monitor is not None and not any("knn_full/accuracy_cls" in row for row in rows):
        print("kNN with all labelled images", flush=True)
        accuracy = monitor.accuracy(functools.partial(trainer.encode, state.params))
        untrained = trainer.initial_state().params  # as it was before step 1
        controls = monitor.controls(functools.partial(trainer.encode, untrained))
        run.writer.write(
            trainer.schedule.num_steps,
            _named("knn_full/accuracy_", accuracy) | _named("knn_full/", controls),
        )
    model = nnx.merge(trainer.graphdef, state.params, state.batch_stats)
    write_encoder(
        run.workdir / "encoder",
        model.encoder,
        model=config.model,
        image_size=config.views.size,
        bands=config.bands,
        mean=config.mean,
        std=config.std,
        run={
            "method": config.method,
            "seed": config.seed,
            "steps": trainer.schedule.num_steps,
            "batch_size": config.batch_size,
            "data": repr(run.source),
        },
    )


def _monitored(run: Run, step: int) -> bool:
    """Whether the kNN monitor is due after `step`."""
    last = step == run.trainer.schedule.num_steps
    return run.monitor is not None and (_due(step, run.config.knn.every) or last)


def _monitor_start(run: Run, state: TrainState, start: int) -> None:
    """The controls of a new run; the accuracy that a stop has left out."""
    if run.monitor is None:
        return
    if start == 0:
        # Not of `state`, which may hold the weights of `config.init`.
        untrained = run.trainer.initial_state().params
        encode = functools.partial(run.trainer.encode, untrained)
        run.writer.write(0, _named("knn/", run.monitor.controls(encode)))
    elif _monitored(run, start):
        rows = read_metrics(run.workdir / "metrics.jsonl")
        done = {row["step"] for row in rows if "knn/accuracy_cls" in row}
        if start not in done:
            _monitor(run, state, start)


def _monitor(run: Run, state: TrainState, step: int) -> None:
    encode = functools.partial(run.trainer.encode, state.params)
    try:
        accuracy = run.monitor.accuracy(encode)
    except KeyboardInterrupt:
        if run.stop.signal is None:
            raise
        return  # the run saves its state and makes up for it when it goes on
    run.writer.write(step, _named("knn/accuracy_", accuracy))
    shares = ", ".join(
        f"{name} {100 * value:.1f} %" for name, value in accuracy.items()
    )
    print(f"step {step}/{run.trainer.schedule.num_steps}  kNN {shares}", flush=True)


def _check_finite(config: ml_collections.ConfigDict, metrics, step: int) -> None:
    """Stop a run whose updates have been skipped too often in a row."""
    if metrics is None:
        return
    count = int(metrics["nonfinite_in_a_row"])
    if count >= config.optim.max_nonfinite:
        raise UserError(
            f"the loss or its gradient was not finite in {count} steps in a row, up to "
            f"step {step}: in a new --workdir, lower --config.optim.learning_rate or "
            "set --config.optim.clip_norm=1.0; the checkpoints are as they were"
        )


def _draw_crops(run: Run, batch: dict[str, np.ndarray]) -> None:
    rows = range(min(run.config.figures.samples, len(batch["index"])))
    records = [run.source[int(batch["index"][row])] for row in rows]
    figures.crops(
        run.workdir / "figures" / "crops.png",
        [(record.image, record.gsd, record.id) for record in records],
        batch["image"][rows],
        batch["box"][rows],
        batch["gsd"][rows],
    )


def _draw_progress(run: Run, state: TrainState, step: int) -> None:
    """The loss curves, and reconstructions of the run's first samples."""
    config, folder = run.config, run.workdir / "figures"
    batch = first_samples(config, run.source, run.sampler, config.figures.samples)
    batch = {name: batch[name] for name in STEP_FIELDS}
    figures.reconstructions(
        folder / f"reconstructions_{step:07}.png",
        jax.device_get(run.trainer.predict(state, batch)),
        _gsd_seen(run, batch["gsd"]),
        mean=config.mean,
        std=config.std,
    )
    rows = read_metrics(run.workdir / "metrics.jsonl")
    figures.loss_curves(folder / "losses.png", rows)


def _draw_gsds(run: Run, seen: list[dict[str, np.ndarray]]) -> None:
    """Which GSDs the run sees, as its first batches show."""
    gsd, box = (
        np.concatenate([part[name] for part in seen]) for name in ("gsd", "box")
    )
    heights = box[:, 0, 2] - box[:, 0, 0]
    figures.gsd_histogram(
        run.workdir / "figures" / "gsd.png",
        _gsd_seen(run, gsd),
        source_gsd=gsd[:, 0, 0] * run.sampler.size / heights,
    )


def _gsd_seen(run: Run, gsd: np.ndarray) -> np.ndarray:
    """The GSD that the model sees of crops of `gsd`, which may be a finer target."""
    return gsd * (run.sampler.size // run.config.views.size)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}

"""The objects that the parts of a pretraining run share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import ml_collections
import numpy as np

from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.saving import Saver
from xsmae.data.records import Source
from xsmae.data.views import ViewSampler
from xsmae.process.progress import Progress
from xsmae.process.watchdog import Watchdog
from xsmae.run.hosts import StopTogether
from xsmae.run.metrics import MetricsWriter
from xsmae.run.nonfinite import NonfiniteBatches
from xsmae.run.rejected import RejectedImages
from xsmae.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects that the loop and its hooks share.

    workdir: this process's own folder. start: the step that the run resumes from; 0 for
    a new run.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    source: Source
    sampler: ViewSampler
    trainer: Trainer
    start: int
    saver: Saver
    writer: MetricsWriter
    rejected: RejectedImages
    nonfinite: NonfiniteBatches
    progress: Progress
    stop: StopTogether
    watchdog: Watchdog

    @property
    def num_steps(self) -> int:
        """The last step of the whole run."""
        return self.trainer.schedule.num_steps

    def gsd_seen(self, gsd: np.ndarray) -> np.ndarray:
        """The GSD that the model gets; crops of `gsd` may be finer targets."""
        return gsd * (self.sampler.size // self.config.views.size)


def create_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    source: Source,
    sampler: ViewSampler,
    trainer: Trainer,
    checkpoints: Checkpoints,
    *,
    resume_step: int | None,
    stop: StopTogether,
    watchdog: Watchdog,
) -> Run:
    """Create a run that resumes from `resume_step`; None for a new run.

    Opens its writer, and removes rows that later steps of a killed run have written.
    """
    first = jax.process_index() == 0
    start = resume_step or 0
    return Run(
        config=config,
        workdir=workdir,
        source=source,
        sampler=sampler,
        trainer=trainer,
        start=start,
        saver=Saver(
            checkpoints,
            fingerprint=source.fingerprint,
            allowed=config.checkpoint.keep_going_without_checkpoints,
        ),
        writer=MetricsWriter(
            workdir,
            resume_step=resume_step,
            tensorboard=config.tensorboard and first,
            wandb_config=config.to_dict() if config.wandb and first else None,
        ),
        rejected=RejectedImages(
            workdir / "rejected.jsonl",
            source,
            max_fraction=config.input.max_rejected_fraction,
            resume_step=resume_step,
        ),
        nonfinite=NonfiniteBatches(
            workdir,
            source,
            limit=config.optim.max_nonfinite,
            resume_step=resume_step,
        ),
        progress=Progress(
            start_step=start,
            num_steps=trainer.schedule.num_steps,
            batch_size=config.batch_size,
        ),
        stop=stop,
        watchdog=watchdog,
    )

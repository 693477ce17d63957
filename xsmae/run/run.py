"""What the parts of a pretraining run share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_collections

from xsmae.checkpoints.saving import Saver
from xsmae.data.records import Source
from xsmae.data.views import ViewSampler
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.process.watchdog import Watchdog
from xsmae.run.hosts import StopTogether
from xsmae.run.metrics import MetricsWriter
from xsmae.run.nonfinite import NonfiniteBatches
from xsmae.run.rejected import RejectedImages
from xsmae.trainer import Trainer


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
    saver: Saver
    writer: MetricsWriter
    rejected: RejectedImages
    nonfinite: NonfiniteBatches
    stop: StopTogether
    watchdog: Watchdog

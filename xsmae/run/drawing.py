"""The pictures that a run draws of itself as it goes: what it hands to `figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from xsmae.bands import Bands
from xsmae.errors import BadImageError
from xsmae.figures import training as figures
from xsmae.process.files import read_jsonl
from xsmae.train_state import TrainState
from xsmae.trainer import STEP_FIELDS, first_samples

if TYPE_CHECKING:
    from xsmae.run.run import Run

GSD_SAMPLES = 2000  # in the histogram of GSDs, enough for a smooth one


def crops(run: Run, batch: dict[str, np.ndarray]) -> None:
    """The boxes of the views of a batch's first samples on their sources."""
    rows = range(min(run.config.figures.samples, len(batch["index"])))
    records = [run.source[int(batch["index"][row])] for row in rows]
    figures.crops(
        run.workdir / "figures" / "crops.png",
        [(record.image, record.gsd, record.id) for record in records],
        batch["image"][rows],
        batch["box"][rows],
        batch["gsd"][rows],
    )


def progress(run: Run, state: TrainState, step: int) -> None:
    """The loss curves, and reconstructions of the run's first samples.

    Raises BadImageError if one of these can no longer be read.
    """
    config, folder = run.config, run.workdir / "figures"
    batch = first_samples(config, run.source, run.sampler, config.figures.samples)
    unreadable = np.count_nonzero(batch["index"] < 0)
    batch = {name: batch[name] for name in STEP_FIELDS}
    # All processes predict together, also where one of them cannot read an image.
    pictures = jax.device_get(run.trainer.predict(state, batch))
    rows = read_jsonl(run.workdir / "metrics.jsonl")
    figures.loss_curves(folder / "losses.png", rows)
    if unreadable:
        raise BadImageError(
            f"{unreadable} of {len(batch['image'])} images cannot be read any more"
        )
    figures.reconstructions(
        folder / f"reconstructions_{step:07}.png",
        pictures,
        gsd_seen(run, batch["gsd"]),
        bands=Bands.of(config),
    )


class Gsds:
    """Which GSDs the run sees, as its first batches show: drawn once."""

    def __init__(self, run: Run):
        self._run = run
        self._path = run.workdir / "figures" / "gsd.png"
        self._wanted = not self._path.exists()
        self._seen: dict[str, list[np.ndarray]] = {"gsd": [], "box": []}

    def add(self, batch: dict[str, np.ndarray]) -> None:
        if self._wanted:
            for name, seen in self._seen.items():
                seen.append(np.array(batch[name]))

    def due(self, *, last: bool) -> bool:
        """Whether there are enough, or no more will come."""
        seen = len(self._seen["gsd"]) * self._run.config.batch_size
        return self._wanted and (last or seen >= GSD_SAMPLES)

    def draw(self) -> None:
        gsd, box = (np.concatenate(seen) for seen in self._seen.values())
        self._wanted, self._seen = False, {"gsd": [], "box": []}
        heights = box[:, 0, 2] - box[:, 0, 0]
        figures.gsd_histogram(
            self._path,
            gsd_seen(self._run, gsd),
            source_gsd=gsd[:, 0, 0] * self._run.sampler.size / heights,
        )


def gsd_seen(run: Run, gsd: np.ndarray) -> np.ndarray:
    """The GSD that the model sees of crops of `gsd`, which may be a finer target."""
    return gsd * (run.sampler.size // run.config.views.size)

"""Hooks that draw a run's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np

from xsmae.bands import Bands
from xsmae.errors import BadImageError
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.figures import training as figures
from xsmae.figures.style import in_colour
from xsmae.process.files import read_jsonl
from xsmae.run.hooks import Done, Hook, due_every
from xsmae.run.run import Run
from xsmae.run.workdir import goes_on_without
from xsmae.train_state import TrainState
from xsmae.trainer import first_samples, step_fields

# With `norm_pix_loss` a network predicts neither.
PER_PATCH = "Each predicted patch has the mean and contrast of the true one."
GSD_SAMPLES = 2000  # in the histogram of GSDs; enough to look smooth


def shown_bands(config: ml_collections.ConfigDict) -> Bands:
    """The bands of a run, with those that its figures show."""
    # Configs of older runs have no such field.
    colours = config.figures.get("colours") or ()
    return dataclasses.replace(Bands.of(config), shown=tuple(colours))


class Crops(Hook):
    """Draws the first samples of the first batch: sources, boxes and views."""

    def due(self, step: int) -> bool:
        return step == self.run.start + 1

    def __call__(self, done: Done) -> None:
        with goes_on_without("the figure of the crops"):
            self.draw(done.batch)

    def draw(self, batch: Mapping[str, np.ndarray]) -> None:
        run, bands = self.run, shown_bands(self.run.config)
        rows = range(min(run.config.figures.samples, len(batch["index"])))
        records = [run.source[int(batch["index"][row])] for row in rows]
        figures.crops(
            run.workdir / "figures" / "crops.png",
            [(in_colour(r.image, bands), r.gsd, r.id) for r in records],
            in_colour(batch["image"][rows], bands),
            batch["box"][rows],
            batch["gsd"][rows],
        )


class Reconstructions(Hook):
    """Draws the loss curves, and reconstructions of the run's first samples.

    A method that reconstructs nothing has the curves alone.

    monitor: of the kNN accuracies during the run, for their intervals.
    """

    def __init__(self, run: Run, monitor: KnnMonitor | None):
        super().__init__(run)
        self._tested = None if monitor is None else len(monitor.test_indices)

    def due(self, step: int) -> bool:
        every = self.run.config.figures.every
        return due_every(step, every) or step == self.run.num_steps

    def __call__(self, done: Done) -> None:
        with goes_on_without("the reconstructions"):
            self.draw(done.state, done.step)

    def draw(self, state: TrainState, step: int) -> None:
        """Raises BadImageError if one of the samples can no longer be read."""
        run, config, folder = self.run, self.run.config, self.run.workdir / "figures"
        if run.trainer.predict is None:
            self._draw_losses()
            return
        batch = first_samples(config, run.source, run.sampler, config.figures.samples)
        unreadable = np.count_nonzero(batch["index"] < 0)
        batch = step_fields(batch)
        # All processes must predict together, even if one cannot read an image.
        pictures = jax.device_get(run.trainer.predict(state, batch))
        self._draw_losses()
        if unreadable:
            raise BadImageError(
                f"{unreadable} of {len(batch['image'])} images can no longer be read"
            )
        terms = config.loss.to_dict().values()
        normalised = any(term.get("norm_pix_loss") for term in terms)
        figures.reconstructions(
            folder / f"reconstructions_{step:07}.png",
            pictures,
            run.gsd_seen(batch["gsd"]),
            bands=shown_bands(config),
            note=PER_PATCH if normalised else "",
        )

    def _draw_losses(self) -> None:
        rows = read_jsonl(self.run.workdir / "metrics.jsonl")
        path = self.run.workdir / "figures" / "losses.png"
        figures.loss_curves(path, rows, knn_images=self._tested)


class GsdHistogram(Hook):
    """Draws a histogram of the GSDs in the run's first batches, once.

    Collects samples after each step until there are enough or the run ends.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        self._path = run.workdir / "figures" / "gsd.png"
        self._wanted = not self._path.exists()
        self._seen: dict[str, list[np.ndarray]] = {"gsd": [], "box": []}

    def due(self, step: int) -> bool:
        return self._wanted

    def __call__(self, done: Done) -> None:
        for name, seen in self._seen.items():
            seen.append(np.array(done.batch[name]))
        samples = len(self._seen["gsd"]) * self.run.config.batch_size
        if samples >= GSD_SAMPLES or done.step == self.run.num_steps:
            with goes_on_without("the figure of the GSDs"):
                self.draw()

    def draw(self) -> None:
        gsd, box = (np.concatenate(seen) for seen in self._seen.values())
        self._wanted, self._seen = False, {}
        heights = box[:, 0, 2] - box[:, 0, 0]
        figures.gsd_histogram(
            self._path,
            self.run.gsd_seen(gsd),
            source_gsd=gsd[:, 0, 0] * self.run.sampler.size / heights,
        )

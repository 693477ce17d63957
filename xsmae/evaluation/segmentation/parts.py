"""The parts of an evaluation of segmentation: images with masks, read once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from xsmae.bands import Bands
from xsmae.data.catalogue import build_masks
from xsmae.data.mask_survey import MaskSurvey, survey_masks
from xsmae.data.masks import Segmentation
from xsmae.errors import UserError
from xsmae.evaluation.parts import Data, Parts, fields_of, places_of
from xsmae.evaluation.reading import Kind

EVERY = 10.0  # seconds between progress lines


@dataclasses.dataclass(frozen=True)
class MaskParts(Parts):
    """The parts, and what `survey_masks` found in each."""

    surveys: dict[str, MaskSurvey]

    @property
    def bands(self) -> Bands:
        """The bands with mean and standard deviation of the training images."""
        mean, std = self.surveys["train"].statistics()
        kind = Kind.of(self.train)
        # A band of one value has no deviation to divide by.
        std = [value or 1.0 for value in std]
        return Bands(kind.bands, tuple(mean), tuple(std), kind.units, kind.dtype)

    @property
    def scenes(self) -> list[str] | None:
        """The scene of each test image; None if there is one, or each image is one.

        With a single scene, an interval over scenes would have no width.
        """
        scenes = [self.test.scene(i) for i in range(len(self.test))]
        return scenes if 1 < len(set(scenes)) < len(scenes) else None

    def never_trained(self) -> list[str]:
        """The classes that have test pixels, but no training pixel."""
        train, test = (self.surveys[part].pixels() for part in ("train", "test"))
        return [
            name
            for name, known, wanted in zip(self.class_names, train, test, strict=False)
            if wanted and not known
        ]


def open_mask_parts(
    name: str,
    train: Data,
    test: Data,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> MaskParts:
    """Open both parts, check them against each other, and read every pair once.

    Raises UserError if a part has no masks, if classes, bands or units differ, if an
    image is in both, if a pair cannot be used, or if no pixel of a part counts.
    """
    sources = {"train": _build("train", train), "test": _build("test", test)}
    _check(name, sources)
    surveys = {}
    for part, source in sources.items():
        found = survey_masks(
            source, progress=_progress(part, say), should_stop=should_stop
        )
        if found.rejected:
            _, reason = next(iter(found.rejected.items()))
            count = len(found.rejected)
            raise UserError(
                f"{count} of {len(source)} images of the {part} part cannot be used: "
                f"{reason}; xsmae check-data lists all"
            )
        if not found.pixels()[:-1].any():
            raise UserError(
                f"no pixel of the {part} part counts: the masks of all {len(source)} "
                "images are ignored everywhere, or the images have no value; look at "
                "them with xsmae check-data"
            )
        surveys[part] = found
    return MaskParts(name, sources["train"], sources["test"], surveys)


def _build(part: str, data: Data) -> Segmentation:
    fields = fields_of(data)
    if fields is None:
        return data
    try:
        return build_masks(fields)
    except UserError as error:
        message = str(error).replace("--config.data.", f"--{part}.")
        raise UserError(f"the {part} part: {message}") from None


def _check(name: str, sources: dict[str, Segmentation]) -> None:
    train, test = sources["train"], sources["test"]
    empty = [part for part, source in sources.items() if not len(source)]
    if empty:
        raise UserError(f"the {empty[0]} part of {name} has no image: change its split")
    kinds = [
        f"{source.dtype} values of {', '.join(source.bands)} ({source.units})"
        for source in (train, test)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"the training part of {name} has {kinds[0]}, its test part {kinds[1]}: "
            "give bands, sensor, scale and offset for both parts, with --data.FIELD"
        )
    if train.class_names != test.class_names:
        raise UserError(
            f"the training part of {name} has the classes "
            f"{', '.join(train.class_names)}, the test part "
            f"{', '.join(test.class_names)}; expected the same: give both "
            "--data.classes=FILE"
        )
    if len(train.class_names) < 2:
        raise UserError(
            f"{name} has {len(train.class_names)} class, expected 2 or more: add "
            "classes to classes.json"
        )
    common = places_of(train) & places_of(test)
    if common:
        raise UserError(
            f"{len(common)} images are in both the training and the test part of "
            f"{name}, e.g. {min(common)!r}: give splits without common images with "
            "--train.split and --test.split"
        )


def _progress(part: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(f"{part}: {done}/{total} images and masks read")

    return progress


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The images of a part, all of them, with their pixel digests: a `measure.Used`."""

    positions: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, survey: MaskSurvey) -> Pixels:
        """All images of a survey."""
        digests = [np.frombuffer(image.digest, np.uint8) for image in survey.images]
        return cls(np.arange(len(digests)), np.stack(digests))

"""`xsmae.evaluate`: measures an encoder on labelled images, returns result rows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from xsmae.configs import common
from xsmae.data.records import Source
from xsmae.data.square import RESIZE, RESIZE_RASTER
from xsmae.errors import UserError
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.kept import check_folder
from xsmae.evaluation.measure import INTERVAL, Measurement, check_features
from xsmae.evaluation.parts import Data, Parts, name_of, open_parts
from xsmae.evaluation.rows import Protocol, Result, check_writable
from xsmae.evaluation.subjects import (
    PIXEL_CONTROLS,
    FrozenEncoder,
    frozen_encoder,
    open_encoder,
    pixel_control,
    random_encoder,
)
from xsmae.evaluation.tasks.catalogue import Task, create_task
from xsmae.weights.encoder import Encoder

# The encoder to measure: in memory, or anything that `open_encoder` takes.
Subject = Encoder | FrozenEncoder | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Setup:
    """The encoder to measure, the images, and their sizes.

    base_size: pixels at 100 %. gsd_policy: one of `scales.GSD_POLICIES`.
    """

    encoder: FrozenEncoder
    parts: Parts
    scales: list[scales_of.Scale]
    base_size: int
    gsd_policy: str


def open_setup(
    encoder: Subject,
    train: Data,
    test: Data,
    *,
    scales: Sequence[float] | None = None,
    base_size: int = 0,
    gsd: str = "true",
    name: str | None = None,
    data_name: str | None = None,
    missing_bands: str = "refuse",
    config: ml_collections.ConfigDict | None = None,
    seed: int = 0,
    sizing: scales_of.Sizing = scales_of.USUAL,
    check_encoder: Callable[[FrozenEncoder], None] = lambda encoder: None,
) -> Setup:
    """Open the encoder and the two parts, and check them against each other.

    The arguments are those of `evaluate`. sizing: the task's. Raises UserError if they
    do not fit.
    """
    for what, value in (("seed", seed), ("base_size", base_size)):
        if value < 0:
            raise UserError(f"{what}={value}, expected 0 or more")
    parts = open_parts(data_name or name_of(train), train, test)
    frozen = subject_of(
        encoder,
        config=config,
        seed=seed,
        name=name,
        missing_bands=missing_bands,
        source=parts.train,
    )
    check_encoder(frozen)
    base = base_size or sizing.base_size(parts.train)
    sizes = sizing.create_scales(
        sizing.percents if scales is None else scales,
        base=base,
        patch_size=frozen.patch_size,
        gsd_policy=gsd,
    )
    return Setup(frozen, parts, sizes, base, gsd)


def evaluate(
    encoder: Subject,
    train: Data,
    test: Data,
    *,
    task: str | Task = "knn",
    scales: Sequence[float] | None = None,
    base_size: int = 0,
    gsd: str = "true",
    feature: str | Sequence[str] | None = None,
    controls: bool = True,
    results: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    seed: int = 0,
    batch_size: int = 64,
    name: str | None = None,
    data_name: str | None = None,
    missing_bands: str = "refuse",
    config: ml_collections.ConfigDict | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Result]:
    """Measure an encoder and its controls on labelled images; returns result rows.

        rows = xsmae.evaluate("runs/mine", train, test, task="knn", scales=(50, 100))

    Args:
      encoder: an encoder in memory, its folder, a run's workdir,
        `RUN/checkpoints/STEP`, `random:SIZE[,FIELD=VALUE...]`, `statistics` or
        `thumbnail`.
      train, test: sources with labels (see `xsmae.open_source`), or their fields.
      task: `knn`, `knn_cross_scale`, `knn_satdino`, `linear_probe`,
        `linear_probe_published` or `finetune`.
      scales: percent of `base_size`; None means 100, and of `knn_cross_scale` and
        `knn_satdino` 12.5, 25, 50 and 100. base_size: pixels at 100 %; 0 means 256, or
        the images' side if that is smaller; of `knn_satdino` always their side.
      gsd: `true` gives the encoder the GSD of each scale; `fixed` that of 100 %.
      feature: `cls`, `mean`, or both; the task has a default.
      controls: also measure the controls: the architecture with random weights and,
        except in fine-tuning, image statistics and thumbnails.
      results: the rows are added to this file. Rows already in it are not measured
        again.
      out: the folder that gets a folder per new row of the encoder itself, with the
        trained head for `load_head`; None keeps no head.
      cache: the folder that keeps features and the states of stopped trainings.
      seed: for random encoders, trainings and intervals.
      batch_size: images per call of the encoder.
      name, data_name: the names of the encoder and the data in tables.
      missing_bands: what to do if the encoder reads bands that the images lack: `mean`
        fills them with their mean, `refuse` raises.
      config: describes the encoder of `random:SIZE`, except its size.
      progress: print progress lines.
      should_stop: called between batches; once true, KeyboardInterrupt is raised.
      options: of the task. knn and knn_cross_scale: k, temperature, standardize (the
        features, by the training images), block (whose tokens are used, 1 to the depth;
        None: the last one after the final norm). linear_probe: penalties, validation.
        knn_satdino: none. The others: recipe (the fields that differ from the default),
        num_workers.

    Raises:
      UserError: arguments that do not fit, in one line, before anything is measured.
    """
    if isinstance(task, str):
        task = create_task(task, **options)
    elif options:
        raise UserError(
            f"options {', '.join(options)} were given with a Task: give them to "
            "create_task, or give the task by name"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}, expected 1 or more")
    setup = open_setup(
        encoder,
        train,
        test,
        scales=scales,
        base_size=base_size,
        gsd=gsd,
        name=name,
        data_name=data_name,
        missing_bands=missing_bands,
        config=config,
        seed=seed,
        sizing=task.sizing,
        check_encoder=task.check_encoder,
    )
    task.check_parts(setup.parts)
    wanted = task.features if feature is None else feature
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    if task.fixed_features and set(wanted) != set(task.features):
        raise UserError(
            f"feature={','.join(wanted)}, but task={task.name} is for "
            f"{','.join(task.features)} alone: leave feature out"
        )
    if results is not None:
        check_writable(Path(results))
    if out is not None and setup.encoder.network:
        check_folder(Path(out))
    subjects = [setup.encoder]
    if controls:
        subjects += _controls(setup, task, seed, missing_bands)
    subjects = list(map(task.adapt(setup.parts, should_stop), subjects))
    rows, protocol = [], _protocol(setup, task)
    with cache_folder(cache) as folder:
        for subject in subjects:
            job = Measurement(
                encoder=subject,
                parts=setup.parts,
                scales=setup.scales,
                protocol=protocol,
                features=check_features(subject, wanted),
                seed=seed,
                outcomes=task.outcomes,
                results=None if results is None else Path(results),
                cache=folder,
                batch_size=batch_size,
                out=Path(out) if out and subject is subjects[0] else None,
                should_stop=should_stop,
                say=print_line if progress else lambda line: None,
            )
            rows += task.measure(job)
            task.finish(job)
    return rows


def subject_of(
    encoder: Subject,
    *,
    config: ml_collections.ConfigDict | None = None,
    seed: int = 0,
    name: str | None = None,
    missing_bands: str = "refuse",
    source: Source | None = None,
) -> FrozenEncoder:
    """`evaluate`'s argument `encoder` as a FrozenEncoder for the images of `source`."""
    if isinstance(encoder, FrozenEncoder):
        return dataclasses.replace(encoder, name=name or encoder.name)
    config = common.get_common("corrected", "base") if config is None else config
    how = {"missing_bands": missing_bands, "source": source}
    if isinstance(encoder, str | os.PathLike):
        how |= {"config": config, "seed": seed, "name": name}
        return open_encoder(os.fspath(encoder), **how)
    if not isinstance(encoder, Encoder):
        raise UserError(f"encoder={encoder!r}, expected an encoder or its folder")
    return frozen_encoder(encoder, name or "encoder", {}, **how)


def _controls(
    setup: Setup, task: Task, seed: int, missing_bands: str
) -> list[FrozenEncoder]:
    """The same architecture with random weights, and the pixel controls."""
    found, encoder = [], setup.encoder
    if encoder.kind == "encoder":
        how = {"missing_bands": missing_bands, "source": setup.parts.train}
        found.append(random_encoder(encoder.info, seed=seed, **how))
    if task.pixel_controls:
        kinds = [kind for kind in PIXEL_CONTROLS if kind != encoder.kind]
        found += map(pixel_control, kinds)
    return found


def _protocol(setup: Setup, task: Task) -> Protocol:
    resize = RESIZE if setup.parts.train.dtype == "uint8" else RESIZE_RASTER
    return Protocol(
        task=task.name,
        metric="accuracy",
        data=setup.parts.describe(),
        base_size=setup.base_size,
        resize=task.sizing.resize or resize,
        crop=task.sizing.crop,
        gsd_policy=setup.gsd_policy,
        options=dict(task.options),
        interval=INTERVAL,
    )


@contextlib.contextmanager
def cache_folder(folder: str | os.PathLike | None) -> Iterator[Path]:
    """The given folder, or a temporary one that is removed afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="xsmae-features-") as temporary:
        yield Path(temporary)


def print_line(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)

"""Encoders and controls, with one interface for all evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from xsmae.configs import common
from xsmae.data.records import Source
from xsmae.data.survey import survey
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    FEATURES,
    THUMBNAIL_SIZE,
    Encode,
    image_statistics,
    spread,
    thumbnail,
)
from xsmae.evaluation.reading import Kind, Reading, read_by
from xsmae.models.build import with_group_indices
from xsmae.models.vit import Encoder as Network
from xsmae.weights.description import ARCHITECTURE, GROUPS, check_network
from xsmae.weights.encoder import Encoder, load_encoder

MEASURED = 256  # evenly spaced images whose mean and std a random encoder gets

# The controls without a network: (function, description).
PIXEL_CONTROLS = {
    "statistics": (image_statistics, "mean, std, min, max of each band"),
    "thumbnail": (thumbnail, f"pixels at {THUMBNAIL_SIZE}x{THUMBNAIL_SIZE}"),
}


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A function from images to features, and its description for result rows.

    name: its name in tables. kind: `encoder`, `random`, `statistics`, `thumbnail`.
    digest: 16 hexadecimal digits of weights and description; equal digests and uses
    give equal features. origin: where it comes from. info: its `encoder.json`, None for
    pixel controls. features: the names that `encode` returns. patch_size: image sides
    must be multiples of it. reads_gsd: True if the features depend on the GSD.
    standardize: True if features must be standardised, by the training part's mean and
    standard deviation, before they are compared.
    encode(images [n, size, size, bands], gsd [n, 2]) -> {feature: [n, width]}; see
    `features.Encode`. weights: the encoder itself; None for pixel controls. reading:
    which images it reads and how; None for pixel controls. dtype: of its matrix
    products. use: what `encode` does differently than usual, for the cache.
    """

    name: str
    kind: str
    digest: str
    origin: Mapping[str, Any]
    info: Mapping[str, Any] | None
    features: tuple[str, ...]
    patch_size: int
    reads_gsd: bool
    standardize: bool
    encode: Encode
    weights: Encoder | None = None
    reading: Reading | None = None
    dtype: str = "float32"
    use: str = ""

    @property
    def network(self) -> Network | None:
        """Takes normalised images; None for pixel controls."""
        return self.weights and self.weights.network

    @property
    def filled(self) -> tuple[str, ...]:
        """The bands that the images lack and that are filled with their mean."""
        return self.reading.filled if self.reading else ()

    @property
    def normalization(self) -> str:
        """How images are normalised, in words."""
        if self.reading is None:
            return "none"
        return self.reading.describe()


def open_encoder(
    text: str,
    *,
    config: ml_collections.ConfigDict,
    seed: int = 0,
    name: str | None = None,
    missing_bands: str = "refuse",
    source: Source | None = None,
) -> FrozenEncoder:
    """The encoder or control that `--encoder` names.

    text: a folder that `load_encoder` takes (`RUN/encoder`, `RUN`); a checkpoint
    `RUN/checkpoints/STEP`; `random:SIZE[,FIELD=VALUE...]`, the encoder of `config` in
    that size with random weights from `seed`; `statistics`; `thumbnail`. name: replaces
    the name that follows from the text. missing_bands: one of `MISSING_BANDS`. source:
    the images that it will read, by default 8-bit RGB. Raises UserError if there is no
    such encoder or if it cannot read the images.
    """
    if text in PIXEL_CONTROLS:
        return pixel_control(text, name=name)
    kind, _, argument = text.partition(":")
    if kind == "random":
        return random_encoder(
            _info_of_size(argument, config, source),
            seed=seed,
            name=name,
            missing_bands=missing_bands,
            source=source,
        )
    path = Path(text)
    step = path.name if path.parent.name == "checkpoints" else ""
    if not path.is_dir() and not step.isdigit():
        raise UserError(
            f"encoder={text}: no such folder, expected an exported encoder, a workdir, "
            "RUN/checkpoints/STEP, random:SIZE, statistics or thumbnail"
        )
    encoder = load_encoder(path)
    name = name or _name(path, step)
    return frozen_encoder(
        encoder, name, {"path": text}, missing_bands=missing_bands, source=source
    )


def _name(path: Path, step: str) -> str:
    """The name in tables: the run's folder, plus the step for a checkpoint."""
    run = path.absolute()
    if step.isdigit():
        return f"{run.parent.parent.name}@{step}"
    exported = run.name == "encoder" and (run / "encoder.json").exists()
    return run.parent.name if exported else run.name


def pixel_control(kind: str, *, name: str | None = None) -> FrozenEncoder:
    """The control `statistics` or `thumbnail`, which needs no network."""
    encode, description = PIXEL_CONTROLS[kind]
    return FrozenEncoder(
        name=name or f"{kind} ({description})",
        kind=kind,
        digest=_digest(kind.encode(), description.encode()),
        origin={"kind": kind},
        info=None,
        features=(kind,),
        patch_size=1,
        reads_gsd=False,
        standardize=True,
        encode=encode,
    )


def random_encoder(
    info: Mapping[str, Any],
    *,
    seed: int,
    name: str | None = None,
    missing_bands: str = "refuse",
    source: Source | None = None,
) -> FrozenEncoder:
    """An untrained encoder with the architecture and normalisation of `info`."""
    shape = info["architecture"]
    name = name or (
        f"random encoder ({shape['embed_dim']} wide, {shape['depth']} deep, patch "
        f"{shape['patch_size']})"
    )
    return frozen_encoder(
        Encoder.random(info, seed=seed),
        name,
        {"random_seed": seed},
        kind="random",
        missing_bands=missing_bands,
        source=source,
    )


def frozen_encoder(
    encoder: Encoder,
    name: str,
    origin: Mapping[str, Any],
    *,
    kind: str = "encoder",
    missing_bands: str,
    source: Source | None = None,
) -> FrozenEncoder:
    """Wrap an encoder for evaluations of the images of `source`."""
    shape = encoder.info["architecture"]
    reading = read_by(name, encoder.bands, Kind.of(source), missing_bands=missing_bands)
    use = [b"missing bands at their mean"] * bool(reading.filled)
    return FrozenEncoder(
        name=name,
        kind=kind,
        digest=encoder.digest_with(*use),
        origin={**origin, "run": encoder.info.get("run")},
        info=encoder.info,
        features=FEATURES,
        patch_size=shape["patch_size"],
        reads_gsd=shape["position"] != "fixed",
        standardize=False,
        encode=encode_by(encoder, reading),
        weights=encoder,
        reading=reading,
        dtype=encoder.dtype,
    )


def encode_by(
    encoder: Encoder, reading: Reading, *, block: int | None = None
) -> Encode:
    """Images of `reading` to the features of `encoder`; block: see `Encoder.tokens`."""

    def encode(images, gsd):
        tokens = encoder.tokens(reading(images), gsd=gsd, block=block)
        return {feature: encoder.pool(tokens, feature) for feature in FEATURES}

    return encode


def _info_of_size(
    argument: str, config: ml_collections.ConfigDict, source: Source | None
) -> Mapping[str, Any]:
    """The `encoder.json` that the config's encoder would have in another size.

    argument: `SIZE[,FIELD=VALUE...]`, with fields of `config.model`.
    """
    size, *fields = argument.split(",")
    if size not in common.SIZES:
        raise UserError(
            f"encoder=random:{argument}: size {size!r}, expected one of "
            f"{', '.join(common.SIZES)}, as in random:tiny"
        )
    names = [name for name in (*ARCHITECTURE, *GROUPS) if name in config.model]
    shape = {name: config.model[name] for name in names}
    # Pretraining chooses an unset patch size by the images. Here, take the usual one.
    usual = common.get_common("corrected", "base")
    shape["patch_size"] = shape["patch_size"] or usual.model.patch_size
    (shape["embed_dim"], shape["depth"], shape["num_heads"]), _ = common.SIZES[size]
    for field in fields:
        name, _, value = field.partition("=")
        if name not in names:
            raise UserError(
                f"encoder=random:{argument}: the encoder has no field {name!r}, "
                f"expected one of {', '.join(names)}"
            )
        try:
            shape[name] = json.loads(value)
        except json.JSONDecodeError:
            shape[name] = value
    if shape["position"] == "gsd" and not shape["reference_gsd"]:
        raise UserError(
            f"encoder=random:{argument} scales positions by the GSD, but the config "
            "has no reference_gsd: give random:SIZE,reference_gsd=METRES or "
            "random:SIZE,position=fixed"
        )
    read = _read_bands(config, source)
    info = {
        "architecture": with_group_indices(shape, read["bands"]),
        "image_size": config.views.size or usual.views.size,
        **read,
    }
    try:
        check_network(info)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"encoder=random:{argument} is not a valid network ({reason}): give other "
            "values"
        ) from None
    return info


def _read_bands(
    config: ml_collections.ConfigDict, source: Source | None
) -> dict[str, Any]:
    """Bands, mean, std and units of the images that a random encoder reads.

    They are the config's. For rasters, bands that it leaves unset are the source's, and
    mean and std are measured on some of its images, as at the start of a run.
    """
    kind = Kind.of(source)
    if kind.dtype == "uint8":
        usual = common.get_common("corrected", "base")
        return {
            "bands": list(config.bands),
            "mean": list(config.mean or usual.mean),
            "std": list(config.std or usual.std),
            **{n: config[n] for n in ("units", "dtype") if n in config},
        }
    # A config of 8-bit images says nothing of rasters.
    given = config.to_dict() if config.get("dtype") == kind.dtype else {}
    found = {name: given.get(name) for name in ("bands", "mean", "std", "units")}
    found = {
        "bands": kind.bands,
        "units": kind.units,
        **{name: value for name, value in found.items() if value is not None},
    }
    if not {"mean", "std"} <= found.keys():
        found = {**measured(source, found["bands"]), **found}
    lists = {name: list(found[name]) for name in ("bands", "mean", "std")}
    return {**lists, "units": found["units"], "dtype": kind.dtype}


def measured(
    source: Source, bands: Sequence[str], *, most: int = MEASURED, **how: Any
) -> dict[str, list[float]]:
    """Mean and std of the bands, of up to `most` evenly spaced images of the source.

    how: other arguments of `survey`.
    """
    unknown = [band for band in bands if band not in source.bands]
    if unknown:
        raise UserError(
            f"{source!r} has no {', '.join(unknown)}, expected bands of "
            f"{', '.join(source.bands)}: change bands, or give mean and std of them too"
        )
    found = survey(source, indices=spread(len(source), most), **how)
    if not found.images:
        raise UserError(
            f"none of {len(found.rejected)} images of {source!r} can be used, expected "
            "at least 1: give other images"
        )
    places = [list(source.bands).index(band) for band in bands]
    mean, std = (
        [float(f"{values[place]:.6g}") for place in places]
        for values in found.statistics()
    )
    # A band of one value has no deviation to divide by.
    return {"mean": mean, "std": [value or 1.0 for value in std]}


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]

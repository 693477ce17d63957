"""Encoders and controls, with one interface for all evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from xsmae.bands import BANDS
from xsmae.configs import common
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    FEATURES,
    THUMBNAIL_SIZE,
    Encode,
    image_statistics,
    thumbnail,
)
from xsmae.models.build import with_group_indices
from xsmae.models.vit import Encoder as Network
from xsmae.weights.description import ARCHITECTURE, GROUPS, check_network
from xsmae.weights.encoder import Encoder, load_encoder

# What to do if the encoder reads bands that the images lack.
MISSING_BANDS = ("refuse", "mean")

# The controls without a network: (function, description).
PIXEL_CONTROLS = {
    "statistics": (image_statistics, "mean, std, min, max of each band"),
    "thumbnail": (thumbnail, f"pixels at {THUMBNAIL_SIZE}x{THUMBNAIL_SIZE}"),
}


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A function from images to features, and its description for result rows.

    name: its name in tables. kind: `encoder`, `random`, `statistics`, `thumbnail`.
    digest: 16 hexadecimal digits of weights and description; equal digests give equal
    features. origin: where it comes from. info: its `encoder.json`, None for pixel
    controls. features: the names that `encode` returns. patch_size: image sides must be
    multiples of it. reads_gsd: True if the features depend on the GSD. standardize:
    True if features must be standardised, by the training part's mean and standard
    deviation, before they are compared.
    encode(images [n, size, size, 3] uint8, gsd [n, 2]) -> {feature: [n, width]}.
    network: takes normalised images; None for pixel controls. filled: bands that the
    images lack and that are filled with their mean.
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
    network: Network | None = None
    filled: tuple[str, ...] = ()

    @property
    def normalization(self) -> str:
        """How images are normalised, in words."""
        if self.info is None:
            return "none"
        mean, std = (self.info[name] for name in ("mean", "std"))
        text = f"(x / 255 - {list(mean)}) / {list(std)}"
        return text + (f", {', '.join(self.filled)} at their mean" * bool(self.filled))


def open_encoder(
    text: str,
    *,
    config: ml_collections.ConfigDict,
    seed: int = 0,
    name: str | None = None,
    missing_bands: str = "refuse",
) -> FrozenEncoder:
    """The encoder or control that `--encoder` names.

    text: a folder that `load_encoder` takes (`RUN/encoder`, `RUN`); a checkpoint
    `RUN/checkpoints/STEP`; `random:SIZE[,FIELD=VALUE...]`, the encoder of `config` in
    that size with random weights from `seed`; `statistics`; `thumbnail`. name: replaces
    the name that follows from the text. missing_bands: one of `MISSING_BANDS`. Raises
    UserError if there is no such encoder.
    """
    if text in PIXEL_CONTROLS:
        return pixel_control(text, name=name)
    kind, _, argument = text.partition(":")
    if kind == "random":
        return random_encoder(
            _info_of_size(argument, config),
            seed=seed,
            name=name,
            missing_bands=missing_bands,
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
    return frozen_encoder(encoder, name, {"path": text}, missing_bands=missing_bands)


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
    )


def frozen_encoder(
    encoder: Encoder,
    name: str,
    origin: Mapping[str, Any],
    *,
    kind: str = "encoder",
    missing_bands: str,
) -> FrozenEncoder:
    """Wrap an encoder for evaluations."""
    shape, bands = encoder.info["architecture"], encoder.bands
    filled = _filled(name, bands.names, missing_bands)

    def encode(images, gsd):
        if bands.names != BANDS:
            images = bands.complete(images, BANDS)
        tokens = encoder.tokens(images, gsd=gsd)
        return {feature: encoder.pool(tokens, feature) for feature in FEATURES}

    return FrozenEncoder(
        name=name,
        kind=kind,
        digest=encoder.digest_with(*[b"missing bands at their mean"] * bool(filled)),
        origin={**origin, "run": encoder.info.get("run")},
        info=encoder.info,
        features=FEATURES,
        patch_size=shape["patch_size"],
        reads_gsd=shape["position"] != "fixed",
        standardize=False,
        encode=encode,
        network=encoder.network,
        filled=filled,
    )


def _filled(name: str, bands: Sequence[str], missing_bands: str) -> tuple[str, ...]:
    """The bands that the encoder reads and images lack.

    Raises UserError if the encoder does not read all bands of the images, or if images
    lack some and `missing_bands` is `refuse`.
    """
    lacking = [band for band in BANDS if band not in bands]
    filled = tuple(band for band in bands if band not in BANDS)
    what = f"{name} reads the bands {', '.join(bands)}, images have {', '.join(BANDS)}"
    if lacking:
        raise UserError(
            f"{what}: expected an encoder with {', '.join(lacking)}; if it has them "
            "under other names, rename them in its encoder.json"
        )
    if filled and missing_bands == "refuse":
        raise UserError(
            f"{what}: give --missing_bands=mean to fill the other {len(filled)} with "
            "their mean, or an encoder that reads only the images' bands"
        )
    return filled


def _info_of_size(
    argument: str, config: ml_collections.ConfigDict
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
    info = {
        "architecture": with_group_indices(shape, config.bands),
        "image_size": config.views.size or usual.views.size,
        "bands": list(config.bands),
        "mean": list(config.mean or usual.mean),
        "std": list(config.std or usual.std),
        **{n: config[n] for n in ("units", "dtype") if n in config},
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


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]

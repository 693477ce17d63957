"""What is evaluated: an encoder that a run left, or a control, with one interface."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from xsmae.configs import common
from xsmae.data.images import BANDS
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    FEATURES,
    THUMBNAIL_SIZE,
    Encode,
    image_statistics,
    thumbnail,
)
from xsmae.models.vit import Encoder
from xsmae.weights.encoder import (
    ARCHITECTURE,
    GROUPS,
    check_network,
    load_encoder,
    write_random_encoder,
)
from xsmae.weights.from_checkpoint import export_checkpoint, no_encoder_in

# What becomes of the bands of an encoder that images do not have.
MISSING_BANDS = ("refuse", "mean")

# The controls that need no architecture: how they see images, and what they are.
PIXEL_CONTROLS = {
    "statistics": (image_statistics, "mean, std, min, max of each band"),
    "thumbnail": (thumbnail, f"pixels at {THUMBNAIL_SIZE}x{THUMBNAIL_SIZE}"),
}


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A way from images to features, and all that a result row says of it.

    name: what a table calls it. kind: `encoder`, `random`, `statistics`, `thumbnail`.
    digest: 16 hexadecimal digits of weights and description; equal ones give equal
    features. origin: where it comes from. info: its `encoder.json`, None for controls
    from pixels. features: the names that `encode` gives. patch_size: what the side of
    an image must be a multiple of. reads_gsd: whether the features depend on it.
    standardize: whether the features have to be brought to one scale before they are
    compared, by the training part's mean and standard deviation.
    encode(images [n, size, size, 3] uint8, gsd [n, 2]) -> {feature: [n, width]}.
    network: of normalised images, None where there is none. filled: the bands that the
    images lack, which the encoder is given at their mean.
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
    network: Encoder | None = None
    filled: tuple[str, ...] = ()

    @property
    def normalization(self) -> str:
        """How images come in, in words."""
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
    """What `--encoder` names.

    text: a folder that `load_encoder` takes (`RUN/encoder`, `RUN`); a checkpoint
    `RUN/checkpoints/STEP`; `random:SIZE[,FIELD=VALUE...]`, seeded by `seed`, otherwise
    the encoder that `config` describes; `statistics`; `thumbnail`. name: instead of the
    one that follows from the text. missing_bands: of `MISSING_BANDS`, what becomes of
    an encoder's bands that images do not have. Raises UserError where there is no such
    thing.
    """
    exported = functools.partial(_exported, missing_bands=missing_bands)
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
    if path.parent.name == "checkpoints" and path.name.isdigit():
        with tempfile.TemporaryDirectory() as folder:
            export_checkpoint(path, Path(folder))
            run = path.parent.parent.name
            return exported(Path(folder), name or f"{run}@{path.name}", {"path": text})
    if not path.is_dir():
        raise UserError(
            f"encoder={text}: no such folder, expected an exported encoder, a workdir, "
            "RUN/checkpoints/STEP, random:SIZE, statistics or thumbnail"
        )
    if not (path / "encoder.json").exists():
        if not (path / "encoder" / "encoder.json").exists():
            raise UserError(no_encoder_in(path))
        path = path / "encoder"
    run = path.absolute()
    run = run.parent.name if run.name == "encoder" else run.name
    return exported(path, name or run, {"path": text})


def pixel_control(kind: str, *, name: str | None = None) -> FrozenEncoder:
    """Image statistics or a thumbnail: what needs no network."""
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
    """An encoder of the architecture and normalisation of `info`, never trained."""
    shape = info["architecture"]
    name = name or (
        f"random encoder ({shape['embed_dim']} wide, {shape['depth']} deep, patch "
        f"{shape['patch_size']})"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_random_encoder(Path(folder), info, seed=seed)
        return _exported(
            Path(folder),
            name,
            {"random_seed": seed},
            kind="random",
            missing_bands=missing_bands,
        )


def _exported(
    path: Path,
    name: str,
    origin: Mapping[str, Any],
    *,
    kind: str = "encoder",
    missing_bands: str,
) -> FrozenEncoder:
    """The encoder of a folder with `encoder.json` and `encoder.safetensors`."""
    encoder = load_encoder(path)
    # Who made it and under which licence changes no feature.
    told = {k: v for k, v in encoder.info.items() if k not in ("run", "licence")}
    weights = (path / "encoder.safetensors").read_bytes()
    shape = encoder.info["architecture"]
    places, filled = _bands(name, encoder.info["bands"], missing_bands)
    mean = np.array(encoder.info["mean"], np.float32)

    def encode(images, gsd):
        if places != list(range(len(mean))):
            whole = np.tile(mean, (*images.shape[:3], 1))
            whole[..., places] = images / np.float32(255)
            images = whole
        tokens = encoder.tokens(images, gsd=gsd)
        return dict(zip(FEATURES, (tokens[:, 0], tokens[:, 1:].mean(1)), strict=True))

    return FrozenEncoder(
        name=name,
        kind=kind,
        digest=_digest(
            json.dumps(told, sort_keys=True).encode(),
            weights,
            *([b"missing bands at their mean"] if filled else []),
        ),
        origin={**origin, "run": encoder.info.get("run")},
        info=encoder.info,
        features=FEATURES,
        patch_size=shape["patch_size"],
        reads_gsd=shape["position"] != "fixed",
        standardize=False,
        encode=encode,
        network=encoder.encoder,
        filled=filled,
    )


def _bands(
    name: str, bands: Sequence[str], missing_bands: str
) -> tuple[list[int], tuple[str, ...]]:
    """Where among an encoder's bands those of the images go, and the bands left over.

    Raises UserError where the encoder does not have the images' bands, or where some
    are left over and `missing_bands` does not say what they are.
    """
    lacking = [band for band in BANDS if band not in bands]
    filled = tuple(band for band in bands if band not in BANDS)
    what = f"{name} reads the bands {', '.join(bands)}, images have {', '.join(BANDS)}"
    if lacking:
        raise UserError(
            f"{what}: expected an encoder with {', '.join(lacking)}; give it the "
            "images' names where it has them under others (encoder.json)"
        )
    if filled and missing_bands == "refuse":
        raise UserError(
            f"{what}: --missing_bands=mean gives it each of the other "
            f"{len(filled)} at its mean, otherwise give an encoder of the images' bands"
        )
    return [list(bands).index(band) for band in BANDS], filled


def _info_of_size(
    argument: str, config: ml_collections.ConfigDict
) -> Mapping[str, Any]:
    """What `encoder.json` would say of the config's encoder in another size.

    argument: `SIZE[,FIELD=VALUE...]`, the fields those of `config.model`.
    """
    size, *fields = argument.split(",")
    if size not in common.SIZES:
        raise UserError(
            f"encoder=random:{argument}: size {size!r}, expected one of "
            f"{', '.join(common.SIZES)}, as in random:tiny"
        )
    names = [name for name in (*ARCHITECTURE, *GROUPS) if name in config.model]
    shape = {name: config.model[name] for name in names}
    (shape["embed_dim"], shape["depth"], shape["num_heads"]), _ = common.SIZES[size]
    for field in fields:
        name, _, value = field.partition("=")
        if name not in names:
            raise UserError(
                f"encoder=random:{argument}: {name!r} is no field of the encoder, "
                f"expected {', '.join(names)}"
            )
        try:
            shape[name] = json.loads(value)
        except json.JSONDecodeError:
            shape[name] = value
    if shape["position"] == "gsd" and not shape["reference_gsd"]:
        raise UserError(
            f"encoder=random:{argument} has positions scaled by the GSD and the config "
            "no reference_gsd: give random:SIZE,reference_gsd=METRES or position=fixed"
        )
    info = {
        "architecture": shape,
        "image_size": config.views.size,
        "bands": list(config.bands),
        "mean": list(config.mean),
        "std": list(config.std),
    }
    try:
        check_network(info)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"encoder=random:{argument} does not fit together: {reason}"
        ) from None
    return info


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]

"""The content of an encoder's folder: `encoder.json`, and weights in timm's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.bands import WHITE, Bands
from xsmae.errors import UserError
from xsmae.models.build import (
    EXECUTION,
    Config,
    build_encoder,
    channel_groups,
    with_group_indices,
)
from xsmae.models.position import patch_positions
from xsmae.models.vit import Encoder as Network
from xsmae.weights.layouts import collect, encoder_weights, load

SCHEMA = 1

# The fields of `config.model` in encoder.json; GROUPS only if the model has them.
ARCHITECTURE = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_style",
    "norm_epsilon", "encoder_norm", "position", "reference_gsd",
)  # fmt: skip
GROUPS = ("channel_groups", "group_dim")  # SatMAE's
REQUIRED = ("architecture", "bands", "mean", "std", "pooling")


def to_timm(
    network: Network, model: Config, *, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The network's weights with the names and shapes of timm's `VisionTransformer`.

    `pos_embed` is computed for `grid` at the reference GSD, with zeros for the class
    token. With groups of bands the names are SatMAE's and there is no `pos_embed`.
    """
    tensors = collect(network, encoder_weights(model))
    if not channel_groups(model):
        position = patch_positions(grid, network.embed_dim)
        position = jnp.pad(position, [(0, 0), (1, 0), (0, 0)])
        tensors["pos_embed"] = np.asarray(position)
    return tensors


def from_timm(
    network: Network, model: Config, tensors: Mapping[str, np.ndarray]
) -> None:
    """Put `to_timm`'s tensors into `network`, in place.

    Raises UserError with the names that are missing, extra or have another shape.
    """
    tensors = {k: v for k, v in tensors.items() if k != "pos_embed"}  # computed anew
    load(network, encoder_weights(model), tensors)


def describe_encoder(
    model: Mapping[str, Any],
    *,
    image_size: int,
    bands: Bands,
    run: Mapping[str, Any],
    gsd_range: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The content of `encoder.json`.

    model: `config.model`. run: describes the run that made the encoder. gsd_range: the
    smallest and largest metres per pixel in training, None if unknown. The model card
    also shows a field `data_licence` if a person adds one.
    """
    model = with_group_indices(dict(model), bands.names)
    seen = {} if gsd_range is None else {"gsd_range": [float(end) for end in gsd_range]}
    content = {
        "schema": SCHEMA,
        "architecture": {
            name: model[name] for name in (*ARCHITECTURE, *GROUPS) if name in model
        },
        "image_size": image_size,
        "bands": bands.names,
        "wavelengths": bands.wavelengths or [None] * len(bands.names),
        "units": bands.units,
        "dtype": bands.dtype,
        "mean": bands.mean,
        "std": bands.std,
        "gsd_units": "metres per pixel",
        **seen,
        "pooling": "mean",
        "licence": "the weights are their maker's; the data's licence applies",
        "run": dict(run),
    }
    return json.loads(json.dumps(content))  # tuples become lists, as after reading


def read_description(path: Path) -> dict[str, Any]:
    """The content of an `encoder.json`; UserError if incomplete or inconsistent."""
    try:
        info = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path.parent} cannot be read: {error}") from None
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, expected {SCHEMA}: another version of "
            "xsmae wrote it; use that version, or give another encoder"
        )
    missing = [name for name in REQUIRED if name not in info]
    missing += [
        n for n in ARCHITECTURE if n not in info.get("architecture", ARCHITECTURE)
    ]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(map(repr, missing))}: restore the file, or give "
            "another encoder"
        )
    channels = len(info["bands"])
    for name in ("mean", "std", "wavelengths"):
        if len(info.get(name, info["bands"])) != channels:
            raise UserError(
                f"{path} has {len(info[name])} values of {name}, expected {channels}: "
                "give one per band"
            )
    if info.get("dtype", "uint8") == "uint8" and info.get("scale", WHITE) != WHITE:
        raise UserError(
            f"{path} has scale={info['scale']!r}, expected {WHITE:g} for 8-bit images: "
            "remove it, and give mean and std of the numbers divided by 255"
        )
    try:
        check_network(info)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is inconsistent: {reason}") from None
    if not all(_is_wavelength(value) for value in info.get("wavelengths", ())):
        raise UserError(
            f"{path} has wavelengths={info['wavelengths']!r}, expected nm above 0, or "
            "null where they are unknown: correct or remove them"
        )
    if not _is_range(info.get("gsd_range", [1, 1])):
        raise UserError(
            f"{path} has gsd_range={info['gsd_range']!r}, expected [smallest, largest] "
            "in metres per pixel: correct or remove it"
        )
    return info


def _is_wavelength(value: Any) -> bool:
    number = type(value) in (int, float) and 0 < value < float("inf")
    return value is None or number


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(end) in (int, float) for end in value)
        and 0 < value[0] <= value[1] < float("inf")
    )


def new_network(info: Mapping[str, Any], *, seed: int = 0, **execution: Any) -> Network:
    """The network that an `encoder.json` describes, with random weights.

    execution: fields of `config.model` that say how it runs, see `EXECUTION`.
    """
    model = {**info["architecture"], **EXECUTION, **execution}
    return build_encoder(model, channels=len(info["bands"]), rngs=nnx.Rngs(seed))


def check_network(info: Mapping[str, Any], **execution: Any) -> Network:
    """`new_network` with shapes only, because random weights take time.

    Raises the network's own error if the values of `info` are inconsistent.
    """
    return nnx.eval_shape(lambda: new_network(info, **execution))


def no_encoder_in(workdir: Path) -> str:
    """The message for a workdir without an exported encoder."""
    names = (path.name for path in workdir.glob("checkpoints/[0-9]*"))
    found = sorted(int(name) for name in names if name.isdigit())
    if not found:
        return (
            f"{workdir} has no encoder.json and no checkpoints: give the workdir of a "
            "finished run, or its folder `encoder`"
        )
    return (
        f"{workdir} has checkpoints but no exported encoder, because the run is not "
        f"finished: give {workdir}/checkpoints/STEP with STEP one of "
        f"{', '.join(map(str, found))}"
    )

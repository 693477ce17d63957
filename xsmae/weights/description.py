"""What an encoder's folder says: `encoder.json`, and the weights in timm's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.bands import Bands
from xsmae.errors import UserError
from xsmae.models.build import EXECUTION, Config, build_encoder, channel_groups
from xsmae.models.position import patch_positions
from xsmae.models.vit import Encoder as Network
from xsmae.weights.layouts import collect, encoder_weights, load

SCHEMA = 1

# What of `config.model` goes into encoder.json, and what loading reads besides.
ARCHITECTURE = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_style",
    "norm_epsilon", "encoder_norm", "position", "reference_gsd",
)  # fmt: skip
GROUPS = ("channel_groups", "group_dim")  # SatMAE's
REQUIRED = ("architecture", "bands", "mean", "std", "pooling")


def to_timm(
    network: Network, model: Config, *, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The network's weights as timm's `VisionTransformer` names and shapes them.

    `pos_embed` is that of a `grid` at the reference GSD, zeros for the class token.
    With groups of bands the names are SatMAE's, and there is no `pos_embed`.
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

    Raises UserError with the names that are missing, extra or of another shape.
    """
    tensors = {k: v for k, v in tensors.items() if k != "pos_embed"}  # is computed
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

    model: `config.model`. run: what run the encoder comes from. gsd_range: the smallest
    and largest metres per pixel that training told it, None where that is not known.
    """
    seen = {} if gsd_range is None else {"gsd_range": [float(end) for end in gsd_range]}
    content = {
        "schema": SCHEMA,
        "architecture": {
            name: model[name] for name in (*ARCHITECTURE, *GROUPS) if name in model
        },
        "image_size": image_size,
        "bands": bands.names,
        "units": bands.units,
        "mean": bands.mean,
        "std": bands.std,
        "gsd_units": "metres per pixel",
        **seen,
        "pooling": "mean",
        "licence": "the weights are their maker's; the data's licence applies",
        "run": dict(run),
    }
    return json.loads(json.dumps(content))  # lists, as when it is read again


def read_description(path: Path) -> dict[str, Any]:
    """The content of an `encoder.json`; UserError unless it is whole and consistent."""
    try:
        info = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path.parent} cannot be read: {error}") from None
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, expected {SCHEMA}: it was written by "
            "another version of xsmae"
        )
    missing = [name for name in REQUIRED if name not in info]
    missing += [
        n for n in ARCHITECTURE if n not in info.get("architecture", ARCHITECTURE)
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(map(repr, missing))}")
    channels = len(info["bands"])
    for name in ("mean", "std"):
        if len(info[name]) != channels:
            raise UserError(
                f"{path} has {len(info[name])} {name}, expected {channels}, one a band"
            )
    try:
        check_network(info)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit together: {reason}") from None
    if not _is_range(info.get("gsd_range", [1, 1])):
        raise UserError(
            f"{path} has gsd_range={info['gsd_range']!r}, expected [smallest, largest] "
            "in metres per pixel"
        )
    return info


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(end) in (int, float) for end in value)
        and 0 < value[0] <= value[1] < float("inf")
    )


def new_network(info: Mapping[str, Any], *, seed: int = 0, **execution: Any) -> Network:
    """A new network as an `encoder.json` describes it, with random weights.

    execution: fields of `config.model` that say how it computes, see `EXECUTION`.
    """
    model = {**info["architecture"], **EXECUTION, **execution}
    return build_encoder(model, channels=len(info["bands"]), rngs=nnx.Rngs(seed))


def check_network(info: Mapping[str, Any], **execution: Any) -> Network:
    """The shapes of `new_network` alone, without the time that random weights take.

    Raises what the network does where the values of `info` do not fit together.
    """
    return nnx.eval_shape(lambda: new_network(info, **execution))


def no_encoder_in(workdir: Path) -> str:
    """What to say of a workdir without an exported encoder: what it holds instead."""
    names = (path.name for path in workdir.glob("checkpoints/[0-9]*"))
    found = sorted(int(name) for name in names if name.isdigit())
    if not found:
        return (
            f"{workdir} holds no encoder.json and no checkpoints: give the folder "
            "`encoder` that a finished run leaves in its workdir, or the workdir"
        )
    return (
        f"{workdir} holds no exported encoder (the run is not finished) but "
        f"checkpoints: give {workdir}/checkpoints/STEP with STEP one of "
        f"{', '.join(map(str, found))}"
    )

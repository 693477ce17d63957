"""Exports an encoder to timm's and Hugging Face's ViT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from xsmae.errors import UserError
from xsmae.models.build import channel_groups
from xsmae.process.files import atomic_write, write_json
from xsmae.weights.encoder import Encoder, load_encoder, outside_training
from xsmae.weights.layouts import NAMINGS, collect, encoder_weights
from xsmae.weights.model_card import NAME as CARD
from xsmae.weights.model_card import write_card

FORMATS = ("timm", "huggingface")


def export(
    source: Encoder | str | Path,
    out: str | Path,
    *,
    format: str,
    gsd: float | None = None,
    image_size: int | None = None,
) -> list[str]:
    """Write an encoder for timm or Hugging Face; returns notes for the user.

        xsmae.export("runs/mine", "mine-timm", format="timm")

    source: an encoder in memory, or anything that `load_encoder` takes. out: a new
    folder; it also gets a model card. gsd: metres per pixel for which GSD-scaled
    positions are written, because the other frameworks have fixed positions.
    image_size: pixels, by default the size of training. Raises UserError if the format
    cannot express the encoder.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}, expected one of {', '.join(FORMATS)}")
    loaded = source if isinstance(source, Encoder) else load_encoder(source)
    architecture = loaded.info["architecture"]
    _check(architecture, format)
    size = loaded.info["image_size"] if image_size is None else image_size
    positions, notes = _positions(loaded, size, gsd)
    names = NAMINGS[format]
    weights = encoder_weights(architecture, naming=format)
    tensors = collect(loaded.network, weights) | {names.position: positions}
    if not architecture["encoder_norm"]:
        # Without its last norm, timm's ViT refuses those tensors.
        tensors = {
            k: v for k, v in tensors.items() if not k.startswith(f"{names.norm}.")
        }
        notes.append("the last norm is left out, because the encoder does not apply it")
    content = _timm(loaded, size) if format == "timm" else _huggingface(loaded, size)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name, value in content.items():
        write_json(out / name, value)
    bands = ", ".join(loaded.info["bands"])
    rasters = loaded.bands.dtype == "float32"
    values = f"in their units ({loaded.bands.units})" if rasters else "in 0-1"
    notes.append(
        f"images of {size} px, bands {bands}, {values}, then normalised with mean "
        f"{loaded.info['mean']} and std {loaded.info['std']}"
    )
    if not write_card(out, loaded.info, format=format, notes=notes):
        notes.append(f"{out / CARD} was edited, so it is kept")
    return notes


def _check(architecture: dict[str, Any], format: str) -> None:
    """Raise UserError if the encoder is not a plain ViT."""
    if channel_groups(architecture):
        raise UserError(
            f"SatMAE's groups of bands cannot be expressed in {format}, where a patch "
            "has one token: use the encoder with xsmae.load_encoder"
        )
    if architecture["norm_style"] != "pre":
        raise UserError(
            f"a post-norm encoder cannot be expressed in {format}, whose blocks are "
            "pre-norm: use it with xsmae.load_encoder"
        )
    if architecture["norm_epsilon"] != 1e-6:
        raise UserError(
            f"norm_epsilon={architecture['norm_epsilon']} in the blocks and 1e-6 in "
            f"the last norm cannot be expressed in {format}, which has one value for "
            "both: use the encoder with xsmae.load_encoder"
        )
    if not architecture["encoder_norm"] and format == "huggingface":
        raise UserError(
            "an encoder without a last norm cannot be expressed in huggingface, which "
            "always applies one: give --format=timm"
        )


def _positions(
    loaded: Encoder, size: int, gsd: float | None
) -> tuple[np.ndarray, list[str]]:
    """Positions [1, 1 + patches, width], zeros for the class token, and notes."""
    positions, notes = loaded.network.positions, []
    try:
        grid = loaded.network.grid(size, size)
    except ValueError as error:
        raise UserError(f"--image_size={size}: {error}") from None
    if size <= 0:
        raise UserError(f"--image_size={size}, expected 1 pixel or more")
    if positions.position == "gsd":
        if gsd is None or not 0 < gsd < math.inf:
            raise UserError(
                "this encoder scales its positions by the GSD, but the format has "
                "fixed positions: give --gsd=METRES per pixel to write them for one GSD"
            )
        notes.append(
            f"positions are right for {gsd:g} m per pixel only, after resizing to "
            f"{size} px"
        )
        if outside_training(loaded.info, gsd, gsd):
            low, high = loaded.info["gsd_range"]
            notes.append(
                f"the encoder was trained at {low:.4g} to {high:.4g} m per pixel, so "
                f"its features at {gsd:g} m may be poor"
            )
        embedded = positions(grid, gsd=jnp.full((1, 2), gsd))
    elif gsd is not None:
        raise UserError(
            f"--gsd={gsd:g}, but this encoder's positions do not depend on the GSD: "
            "leave it out"
        )
    else:
        embedded = positions(grid)
    padded = np.pad(np.asarray(embedded), [(0, 0), (1, 0), (0, 0)])
    return np.ascontiguousarray(padded), notes


def _timm(loaded: Encoder, size: int) -> dict[str, Any]:
    """For `timm.create_model("local-dir:OUT")`."""
    info, model = loaded.info, loaded.info["architecture"]
    return {
        "config.json": {
            # Any ViT works here: `model_args` has every size.
            "architecture": "vit_base_patch16_224",
            "num_classes": 0,
            "num_features": model["embed_dim"],
            "model_args": {
                "global_pool": "token" if info["pooling"] == "cls" else "avg",
                "img_size": size,
                "patch_size": model["patch_size"],
                "in_chans": len(info["bands"]),
                "embed_dim": model["embed_dim"],
                "depth": model["depth"],
                "num_heads": model["num_heads"],
                "mlp_ratio": model["mlp_ratio"],
                # By default timm would move the last norm after the pooling.
                "fc_norm": False,
                "final_norm": model["encoder_norm"],
            },
            "pretrained_cfg": {
                "input_size": [len(info["bands"]), size, size],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": info["mean"],
                "std": info["std"],
                "num_classes": 0,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }
    }


def _huggingface(loaded: Encoder, size: int) -> dict[str, Any]:
    """For `ViTModel` and `ViTMAEModel.from_pretrained("OUT")`."""
    info, model = loaded.info, loaded.info["architecture"]
    return {
        "config.json": {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": model["embed_dim"],
            "num_hidden_layers": model["depth"],
            "num_attention_heads": model["num_heads"],
            "intermediate_size": int(model["embed_dim"] * model["mlp_ratio"]),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": model["norm_epsilon"],
            "image_size": size,
            "patch_size": model["patch_size"],
            "num_channels": len(info["bands"]),
            "qkv_bias": True,
            "mask_ratio": 0.0,  # for ViTMAEModel: the encoder sees every patch
        },
        "preprocessor_config.json": {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": info["mean"],
            "image_std": info["std"],
        },
    }

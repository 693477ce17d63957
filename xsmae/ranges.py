"""What numbers the fields of a config may have, and which of them belong together."""

from __future__ import annotations

import sys

import ml_collections
import numpy as np

from xsmae.errors import UserError
from xsmae.workdir import flatten

SMALL, LARGE = 1e-8, sys.float_info.max  # above 0, and finite
BELOW_1 = float(np.nextafter(1, 0))
# Field -> the smallest and the largest; of a tuple, each number. Where a field is not
# set, or the method has none, it is left out. What else is wrong with the views, the
# losses and the networks is said by those that read it.
RANGES = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, LARGE),
    "num_epochs": (SMALL, LARGE),
    "num_steps": (1, LARGE),
    "log_every": (1, LARGE),
    "mean": (0, 1),
    "std": (SMALL, 1),
    "figures.every": (0, LARGE),
    "figures.samples": (1, LARGE),
    "input.num_workers": (0, LARGE),
    "input.num_threads": (0, LARGE),
    "input.prefetch": (1, LARGE),
    "input.max_rejected_fraction": (0, 1),
    "checkpoint.keep": (1, LARGE),
    "checkpoint.every": (1, LARGE),
    "checkpoint.keep_every": (0, LARGE),
    "checkpoint.keep_going_without_checkpoints": (0, LARGE),
    "watchdog_minutes": (0, LARGE),
    "knn.every": (-1, LARGE),
    "knn.k": (1, LARGE),
    "knn.batch_size": (1, LARGE),
    "knn.temperature": (SMALL, LARGE),
    "knn.max_train": (0, LARGE),
    "knn.max_test": (0, LARGE),
    "optim.max_nonfinite": (1, LARGE),
    "optim.learning_rate": (0, LARGE),
    "optim.learning_rate_batch": (1, LARGE),
    "optim.warmup_epochs": (0, LARGE),
    "optim.warmup_steps": (0, LARGE),
    "optim.weight_decay": (0, LARGE),
    "optim.b1": (0, BELOW_1),
    "optim.b2": (0, BELOW_1),
    "optim.clip_norm": (0, LARGE),
    "optim.accumulation_steps": (1, LARGE),
    "views.size": (1, LARGE),
    "views.area": (SMALL, 1),
    "views.area2": (SMALL, 1),
    "views.ratio": (SMALL, LARGE),
    "views.horizontal_flip": (0, 1),
    "views.vertical_flip": (0, 1),
    "model.patch_size": (1, LARGE),
    "model.embed_dim": (4, LARGE),
    "model.depth": (1, LARGE),
    "model.num_heads": (1, LARGE),
    "model.mlp_ratio": (SMALL, LARGE),
    "model.decoder_embed_dim": (4, LARGE),
    "model.decoder_depth": (1, LARGE),
    "model.decoder_num_heads": (1, LARGE),
    "model.mask_ratio": (SMALL, BELOW_1),
    "model.norm_epsilon": (0, 1),
    "model.reference_gsd": (SMALL, LARGE),
    "model.predictor_hidden_dim": (1, LARGE),
    "model.projection_dim": (0, LARGE),
    "model.group_dim": (1, LARGE),
    "model.decoder_group_dim": (1, LARGE),
    "model.target_scale": (1, LARGE),
    "model.head_dim": (4, LARGE),
    "model.head_depth": (0, LARGE),
    "loss.reconstruction.weight": (0, LARGE),
    "loss.contrastive.weight": (0, LARGE),
    "loss.contrastive.temperature": (SMALL, LARGE),
    "loss.contrastive.groups": (1, LARGE),
    "loss.cross_prediction.weight": (0, LARGE),
    "loss.low_frequency.weight": (0, LARGE),
    "loss.low_frequency.through": (0, LARGE),
    "loss.high_frequency.weight": (0, LARGE),
    "loss.high_frequency.cutoff": (SMALL, 1),
}


DTYPES = ("float32", "bfloat16")  # of the products; parameters are float32


def check_ranges(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises UserError, in one line, for numbers that cannot be or do not fit."""
    flat = flatten(config.to_dict())
    for name, (low, high) in RANGES.items():
        found = flat.get(name)
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if value is not None and not _within(value, low, high):
                raise UserError(f"{name}={found}, expected {_expected(low, high)}")
    model, views = config.model, config.views
    if views.size % model.patch_size:
        raise UserError(
            f"views.size={views.size} is not a multiple of model.patch_size="
            f"{model.patch_size}: change one of them"
        )
    if model.dtype not in DTYPES:
        raise UserError(
            f"model.dtype={model.dtype}, expected one of {', '.join(DTYPES)}"
        )
    for part in ("", "decoder_"):
        width, heads = model[f"{part}embed_dim"], model[f"{part}num_heads"]
        if width % heads:
            raise UserError(
                f"model.{part}embed_dim={width} is not a multiple of model.{part}"
                f"num_heads={heads}: change one of them"
            )
    parts = config.optim.accumulation_steps
    if config.batch_size % (parts * devices):
        raise UserError(
            f"batch_size={config.batch_size} does not divide into "
            f"optim.accumulation_steps={parts} parts on {devices} device(s)"
        )
    groups = flat.get("loss.contrastive.groups", 1)
    if config.batch_size // parts % groups:
        raise UserError(
            f"batch_size={config.batch_size} in {parts} part(s) does not divide into "
            f"loss.contrastive.groups={groups}"
        )
    if model.position == "gsd" and not model.reference_gsd:
        raise UserError(
            "model.reference_gsd is not set: give the metres per pixel that a patch "
            "index is counted in, about the images' usual GSD, with "
            "--config.model.reference_gsd=METRES"
        )
    if not any(term["weight"] for term in config.loss.to_dict().values()):
        raise UserError(
            f"every weight in config.loss is 0 ({', '.join(config.loss)}): nothing "
            "would be learned; set one above 0"
        )
    for name in ("mean", "std"):
        if len(config[name]) != len(config.bands):
            raise UserError(
                f"{name}={config[name]} has {len(config[name])} values, expected "
                f"{len(config.bands)}, one for each of bands={', '.join(config.bands)}:"
                " change one of them"
            )


def _within(value: object, low: float, high: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high


def _expected(low: float, high: float) -> str:
    start = "above 0" if low == SMALL else f"{low} or more"
    if high == LARGE:
        return start
    end = "below 1" if high == BELOW_1 else f"at most {high}"
    return f"{start} and {end}"

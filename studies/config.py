"""The systems of the head-to-head study: one config per system.

    --config=studies/config.py:SYSTEM --config.data.csv_path=train.csv

Configs differ only in the system and in the number of steps. Systems are listed in
`SYSTEMS`. Those with one change to `corrected` come from `ABLATIONS`, those with one
change to `scale_distill` from `PARTS`.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder
from xsmae.configs import common

from xsmae.methods import METHODS

# Views that the encoder reads per step, the same for all systems, coarse views apart. A
# sample of a method with two views counts twice, so its batch has half as many samples.
VIEWS_A_STEP = 128
NUM_STEPS = 300

# Floating-point operations of the products of a step, in 1e9, at the settings below. A
# run may spend what 300 steps of `published` do. `STEPS` has the number of steps that
# this buys. Systems without an entry have 300 steps: MAE and SatMAE spend 3 % less, and
# Scale-MAE 32 % more.
A_STEP = {
    "mae": 115.47,
    "sat_mae": 115.47,
    "scale_mae": 156.49,
    "published": 118.71,
    "published-temperature": 118.71,
    "corrected": 118.76,
    "published-small": 76.13,
    "mae-small": 74.50,
    "simclr": 283.67,
    "scale_distill": 87.21,
}
ARITHMETIC = NUM_STEPS * A_STEP["published"]
STEPS = {
    name: round(ARITHMETIC / A_STEP[name])
    for name in ("published-small", "mae-small", "simclr", "scale_distill")
}
# The long runs of the finalists: 4,000 steps of `scale_distill`, and as much arithmetic
# for the others. Their checkpoints are kept, for kNN over the training.
LONG = {"scale_distill-long": 4000, "published-small-long": 4600, "simclr-long": 1240}
PARTS_OF_LONG = 8  # checkpoints that are kept
STEPS |= LONG

SMALL_DECODER = {"model.decoder_embed_dim": 64, "model.decoder_depth": 1}

# System -> method, preset and the fields that differ from the preset.
SYSTEMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mae": ("mae", "published", {}),
    # For RGB, SatMAE uses no groups of bands, so it is MAE to the bit. With one group
    # per band it reads three times the tokens.
    "sat_mae": ("sat_mae", "published", {}),
    "sat_mae-groups": (
        "sat_mae",
        "published",
        {"model.channel_groups": ((0,), (1,), (2,))},
    ),
    "scale_mae": ("scale_mae", "published", {}),
    # `published` uses the official code's timm blocks, like the encoders of the other
    # systems. `post` is its xFormers setting, used for the released weights.
    "published": (
        "cross_scale_mae",
        "published",
        {"model.norm_style": "pre", "model.norm_epsilon": 1e-6},
    ),
    "published-post": ("cross_scale_mae", "published", {}),
    # Tests if `corrected` is better than `published` only because of the temperature.
    "published-temperature": (
        "cross_scale_mae",
        "published",
        {
            "model.norm_style": "pre",
            "model.norm_epsilon": 1e-6,
            "loss.contrastive.temperature": 0.1,
        },
    ),
    "corrected": ("cross_scale_mae", "corrected", {}),
    # The same with a decoder that costs little, so that equal arithmetic buys more
    # steps.
    "published-small": (
        "cross_scale_mae",
        "published",
        {
            "model.norm_style": "pre",
            "model.norm_epsilon": 1e-6,
            "loss.contrastive.temperature": 0.1,
            **SMALL_DECODER,
        },
    ),
    "mae-small": ("mae", "published", SMALL_DECODER),
    # Asks if reconstruction helps at all.
    "simclr": ("simclr", "recommended", {}),
    "scale_distill": ("scale_distill", "recommended", {}),
}

# `corrected` with one difference set as in `published`. The three parts of the
# contrastive loss also have their own entries. Then each of the two additional losses
# is left out. The group `losses` is added below.
ABLATIONS: dict[str, dict[str, Any]] = {
    "view2": {
        "views.view2_box": "batch",
        "views.view2_from": "view1",
        "views.interpolation2": "bilinear",
    },
    "areas": {"views.area_distribution": "uniform"},
    "position": {"model.position": "fixed"},
    "encoder_norm": {"model.encoder_norm": False},
    "norm_style": {"model.norm_style": "post", "model.norm_epsilon": 1e-5},
    "reconstruction": {
        "loss.reconstruction.views": "sum",
        "loss.reconstruction.norm_pix_loss": False,
    },
    "contrastive": {
        "model.projection_dim": 0,
        "loss.contrastive.positive_in_denominator": False,
        "loss.contrastive.temperature": 0.5,
    },
    "temperature": {"loss.contrastive.temperature": 0.5},
    "head": {"model.projection_dim": 0},
    "denominator": {"loss.contrastive.positive_in_denominator": False},
    "cross_prediction": {
        "loss.cross_prediction.stop_gradient": False,
        "loss.cross_prediction.aligned": False,
    },
    "predictor": {"model.predictor_norm": "batch_norm"},
    "no_contrastive": {"loss.contrastive.weight": 0.0},
    "no_cross_prediction": {"loss.cross_prediction.weight": 0.0},
}
# All parts of the losses together, except the temperature, which is known to be needed.
# The remaining differences are in the crops, the positions and the last norm.
ABLATIONS["losses"] = {
    field: value
    for name in (
        "reconstruction",
        "head",
        "denominator",
        "cross_prediction",
        "predictor",
    )
    for field, value in ABLATIONS[name].items()
}
SYSTEMS |= {
    f"corrected-{name}": ("cross_scale_mae", "corrected", changes)
    for name, changes in ABLATIONS.items()
}
SYSTEMS |= {name: SYSTEMS[name.removesuffix("-long")] for name in LONG}


def get_config(system: str) -> ml_collections.ConfigDict:
    """The config of a system; raises ValueError for an unknown one."""
    if system not in SYSTEMS:
        raise ValueError(f"system {system!r}, expected one of {', '.join(SYSTEMS)}")
    method, preset, changes = SYSTEMS[system]
    config = common.get_common(preset, "tiny", method)
    config.data = _data()
    # Measured over the training images of both data sets, with equal image weights.
    config.mean = (0.3550, 0.3888, 0.4110)
    config.std = (0.2076, 0.1465, 0.1247)
    config.views.size = 64
    config.model.patch_size = 8
    config.model.dtype = "float32"  # the fastest on CPUs
    config.batch_size = VIEWS_A_STEP // METHODS[method].num_views
    config.num_steps = STEPS.get(system, NUM_STEPS)
    # The same peak rate and schedule for all: 1e-3, not scaled by the batch size.
    config.optim.learning_rate = 1e-3
    config.optim.learning_rate_batch = config.batch_size
    config.optim.warmup_steps = config.num_steps // 10
    config.log_every = 20
    config.checkpoint.every = 50
    if system in LONG:
        config.checkpoint.every = config.num_steps // (5 * PARTS_OF_LONG)
        config.checkpoint.keep_every = config.num_steps // PARTS_OF_LONG
    config.figures.every = 0
    config.knn.every = -1  # the images have no labels here
    config.update_from_flattened_dict(changes)
    return config


def _data() -> Mapping[str, Any]:
    return dict(
        source="csv",
        csv_path=placeholder(str),
        root=placeholder(str),
        gsd=placeholder(float),
        split="all",
        test_fraction=0.1,
        min_side=32,
        max_pixels=89_478_485,
    )

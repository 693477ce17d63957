"""Reads the encoder of an unfinished run from one of its checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import nnx

from xsmae.bands import Bands
from xsmae.checkpoints import Checkpoints
from xsmae.errors import UserError
from xsmae.models.vit import Encoder as Network
from xsmae.trainer import create_trainer
from xsmae.weights.description import describe_encoder, no_encoder_in
from xsmae.weights.gsd_range import seen_by_run


def read_checkpoint(path: Path) -> tuple[Network, dict[str, Any]]:
    """The encoder of `RUN/checkpoints/STEP`, and its `encoder.json`.

    Raises UserError if there is no such checkpoint, or if it cannot be read.
    """
    workdir, step = path.parent.parent, int(path.name)
    try:
        config = ml_collections.ConfigDict(
            json.loads((workdir / "config.json").read_text())
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir / 'config.json'} cannot be read ({error}), expected the config "
            "of the checkpoint's run: restore it, or give the folder `encoder` of a "
            "finished run"
        ) from None
    if not path.is_dir():
        raise UserError(no_encoder_in(workdir))
    # Only the shapes matter. Make the batch fit any number of devices.
    devices, parts = jax.device_count(), config.optim.accumulation_steps
    config.batch_size = math.lcm(config.batch_size, devices * parts)
    trainer = create_trainer(config, num_images=config.batch_size)
    checkpoints = Checkpoints(path.parent, read_only=True)
    try:
        state = checkpoints.restore(step, trainer.state_shapes(), fingerprint=None)
    except UserError as error:
        raise UserError(f"{error}: give another checkpoint of {path.parent}") from None
    finally:
        checkpoints.close()
    # Move the weights to one device: restoring placed them as in training.
    weights = jax.device_put(jax.device_get((state.params, state.batch_stats)))
    described = describe_encoder(
        config.model,
        image_size=config.views.size,
        bands=Bands.of(config),
        run={"method": config.method, "seed": config.seed, "steps": step},
        gsd_range=seen_by_run(workdir, step),
    )
    return nnx.merge(trainer.graphdef, *weights).encoder, described

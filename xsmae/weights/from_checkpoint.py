"""The encoder of a run that is not finished, out of one of its checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_collections
from flax import nnx

from xsmae.checkpoints import Checkpoints
from xsmae.errors import UserError
from xsmae.trainer import create_trainer
from xsmae.weights.encoder import write_encoder


def export_checkpoint(path: Path, directory: Path) -> None:
    """Write the encoder of `RUN/checkpoints/STEP` as a run does at its end.

    Raises UserError where there is no such checkpoint, or one that cannot be read.
    """
    workdir, step = path.parent.parent, int(path.name)
    try:
        config = ml_collections.ConfigDict(
            json.loads((workdir / "config.json").read_text())
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir / 'config.json'} cannot be read ({error}): a checkpoint is read "
            "with the config.json of its workdir; put it back, or give the folder "
            "`encoder` of a finished run"
        ) from None
    if not path.is_dir():
        raise UserError(no_encoder_in(workdir))
    # Only the shapes matter here, and any number of devices must do.
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
    model = nnx.merge(trainer.graphdef, state.params, state.batch_stats)
    write_encoder(
        directory,
        model.encoder,
        model=config.model,
        image_size=config.views.size,
        bands=tuple(config.bands),
        mean=tuple(config.mean),
        std=tuple(config.std),
        run={"method": config.method, "seed": config.seed, "steps": step},
    )


def no_encoder_in(workdir: Path) -> str:
    """What to say of a workdir without an exported encoder: what it holds instead."""
    names = (path.name for path in workdir.glob("checkpoints/[0-9]*"))
    found = sorted(int(name) for name in names if name.isdigit())
    if not found:
        return (
            f"encoder={workdir} holds neither encoder.json nor checkpoints: give an "
            "exported encoder or the workdir of a run"
        )
    return (
        f"encoder={workdir} holds no exported encoder (the run is not finished) but "
        f"checkpoints: give {workdir}/checkpoints/STEP with STEP one of "
        f"{', '.join(map(str, found))}"
    )

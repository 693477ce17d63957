"""Orbax checkpoints of the whole state, with the position in the data."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from xsmae.errors import UserError
from xsmae.train_state import TrainState


class Checkpoints:
    """The checkpoints of a workdir, `<directory>/<step>/`.

    keep: how many of the newest stay. keep_every: and every one whose step is a
    multiple of it, 0 for none.
    """

    def __init__(self, directory: Path, *, keep: int = 3, keep_every: int = 0):
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, *, fingerprint: str) -> None:
        """Save in the background; `fingerprint` is that of the data source."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(
                    {"schema": 1, "batches": step, "source": fingerprint}
                ),
            ),
        )

    def restore(self, step: int, like: TrainState, *, fingerprint: str) -> TrainState:
        """The state saved at `step`, with the shapes and placement of `like`.

        `like` holds arrays or `jax.ShapeDtypeStruct`s with shardings. Raises UserError
        where the checkpoint is of other data.
        """
        where = f"{self.manager.directory / str(step)}"
        position = self.manager.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        )["position"]
        if position["batches"] != step:
            raise UserError(
                f"{where} holds the position of step {position['batches']}: remove it "
                "to go on from the one before"
            )
        if position["source"] != fingerprint:
            raise UserError(
                f"{where} was trained on data with fingerprint {position['source']}, "
                f"found {fingerprint}: give the same images, or a new --workdir"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self.manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )["state"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()

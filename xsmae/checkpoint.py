"""Orbax checkpoints of the whole state, with the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xsmae.errors import UserError
from xsmae.train_state import TrainState


class Checkpoints:
    """The checkpoints of a workdir, `<directory>/<step>/`.

    keep: how many of the newest stay. keep_every: and every one whose step is a
    multiple of it, 0 for none. read_only: for looking into another run's workdir.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                keep_period=keep_every or None,
                read_only=read_only,
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

    def restore(
        self, step: int, like: TrainState, *, fingerprint: str | None
    ) -> TrainState:
        """The state saved at `step`, with the shapes and placement of `like`.

        `like` holds arrays or `jax.ShapeDtypeStruct`s with shardings. Raises UserError
        where the checkpoint is of other data; a fingerprint of None is any data's.
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
        if fingerprint is not None and position["source"] != fingerprint:
            raise UserError(
                f"{where} was trained on data with fingerprint {position['source']}, "
                f"found {fingerprint}: give the same images, or a new --workdir"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self.manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )["state"]

    def restore_weights(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """`params` and `batch_stats` of the newest step, whatever else it holds.

        `like` holds them as arrays. Raises UserError with the names of the weights that
        are missing, left over or of another shape.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self.manager.directory} holds no checkpoint")
        path = self.manager.directory / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
            found, expected = (
                {
                    jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape
                    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
                }
                for tree in ({name: saved.get(name, {}) for name in like}, abstract)
            )
            wrong = sorted(
                f"{name}: expected {expected.get(name, 'nothing')}, found "
                f"{found.get(name, 'nothing')}"
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            if wrong:
                raise UserError(
                    f"{path} does not fit the config's network: {'; '.join(wrong)}"
                )
            return checkpointer.restore(
                path,
                ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                ),
            )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()

"""Reads one step of a run, `checkpoints/<step>/`, and detects damage.

Orbax restores arrays with a flipped bit without an error (measured with 0.12.8: 40 of
40). So the files are compared with their digests before they are read, and the arrays
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xsmae.checkpoints import digests
from xsmae.errors import DamagedError, UserError
from xsmae.train_state import TrainState

SCHEMA = 2  # of the position; steps with schema 1 have no digests


def create_handler() -> ocp.CompositeCheckpointHandler:
    """The Orbax handler for the items of a step."""
    return ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), position=ocp.JsonCheckpointHandler()
    )


def restore(
    path: Path,
    like: TrainState,
    *,
    fingerprint: str | None,
    say: Callable[[str], None],
) -> TrainState:
    """The state saved at `path`; see `Checkpoints.restore`."""
    content = _checked(path)
    position = _position(path, content)
    if content is None:
        say(f"{path} was saved without digests, so damage cannot be detected")
    if fingerprint is not None and position["source"] != fingerprint:
        raise UserError(
            f"{path} was trained on data with fingerprint {position['source']}, "
            f"found {fingerprint}: give the same images, or a new --workdir"
        )
    if content is not None:
        wrong = digests.differences(content, like)
        if wrong:
            raise UserError(
                f"{path} cannot be restored, it has another network or optimiser: "
                f"{'; '.join(wrong[:3])}"
            )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    state = _read(path, state=ocp.args.StandardRestore(abstract))
    if content is not None:
        digests.check_leaves(path, content, state)
    return state


def restore_weights(
    path: Path, like: Mapping[str, Any], *, say: Callable[[str], None]
) -> dict[str, Any]:
    """`params` and `batch_stats` of a step; see `Checkpoints.restore_weights`."""
    content = _checked(path)
    _position(path, content)
    if content is None:
        say(f"{path} was saved without digests, so damage cannot be detected")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
    saved = _saved_tree(path)
    found, expected = (
        {name: leaf.shape for name, leaf in digests.named_leaves(tree).items()}
        for tree in ({name: saved.get(name, {}) for name in like}, abstract)
    )
    wrong = sorted(
        f"{name}: expected {expected.get(name, 'nothing')}, found "
        f"{found.get(name, 'nothing')}"
        for name in found.keys() | expected.keys()
        if found.get(name) != expected.get(name)
    )
    if wrong:
        raise UserError(f"{path} does not fit the config's network: {'; '.join(wrong)}")
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            weights = checkpointer.restore(path / "state", arguments)
        except Exception as error:  # Orbax raises many kinds
            raise _unreadable(path, error) from error
    if content is not None:
        digests.check_leaves(path, content, weights)
    return weights


def check_files(path: Path) -> None:
    """Raises DamagedError, with the files' names, if files have changed.

    It restores no array, so it uses no device memory.
    """
    _position(path, _checked(path))


def verify(path: Path) -> bool:
    """Checks a step; True if it is undamaged, False if it was saved without digests.

    Raises DamagedError, with the name of the file or the array.
    """
    content = _checked(path)
    _position(path, content)
    if content is None:
        return False
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        _saved_tree(path),
    )
    state = _read(path, state=ocp.args.StandardRestore(like))
    missing = content["leaves"].keys() - digests.named_leaves(state).keys()
    if missing:
        raise DamagedError(f"{path} is damaged: {', '.join(sorted(missing))} missing")
    digests.check_leaves(path, content, state)
    return True


def reason(error: Exception) -> str:
    """The useful part of any error's message, in one line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(said.split())
    return line if len(line) <= 200 else f"{line[:97]} ... {line[-98:]}"


def _checked(path: Path) -> dict[str, Any] | None:
    """Checks the files of a step; returns its digests, None if it has none."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a step that was saved")
    content = digests.read(path)
    if content is not None:
        digests.check_files(path, content)
    return content


def _position(path: Path, content: Mapping[str, Any] | None) -> dict[str, Any]:
    """The step's position in the data; raises DamagedError if it is wrong."""
    # Read it in this process only: `remove_damaged` runs in one process of several.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"process_{index}",
    )
    position = _read(path, alone, position=ocp.args.JsonRestore())
    try:
        schema, batches = position["schema"], position["batches"]
        position["source"]
    except (KeyError, TypeError):
        raise DamagedError(f"{path} is damaged: it has no position") from None
    if content is None and schema != 1:
        raise DamagedError(f"{path} is damaged: {digests.FILE} is missing")
    if content is not None and position != content["position"]:
        raise DamagedError(f"{path} is damaged: its position has changed")
    if str(batches) != path.name:
        raise DamagedError(f"{path} is damaged: it contains step {batches}")
    return position


def _read(
    path: Path,
    processes: ocp.options.MultiprocessingOptions | None = None,
    **arguments: Any,
) -> Any:
    """Reads one item of a step; `processes` read it together, None means all."""
    (name,) = arguments
    processes = processes or ocp.options.MultiprocessingOptions()
    with ocp.Checkpointer(
        create_handler(), multiprocessing_options=processes
    ) as checkpointer:
        try:
            return checkpointer.restore(path, ocp.args.Composite(**arguments))[name]
        except Exception as error:  # Orbax raises many kinds
            raise _unreadable(path, error) from error


def _saved_tree(path: Path) -> Any:
    """The shapes and dtypes of a step's state, from its metadata."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.metadata(path / "state").item_metadata.tree
        except Exception as error:  # Orbax raises many kinds
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{path} cannot be restored ({reason(error)})")

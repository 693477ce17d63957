"""Fits weights to images of other bands, band by band name.

A patch embedding adds up what it makes of each band, and the decoder predicts each band
with weights of its own. So the weights of a band move with its name. Bands that the
weights lack keep their random weights: nothing is copied from other bands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.models.build import channel_groups, with_group_indices
from xsmae.weights.layouts import Path, leaves

MATCHED = ("mae", "sat_mae")  # methods whose decoder predicts each band in a patch


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a network reads and predicts, by band name.

    read: the bands of each group in order; one group if the network has none.
    predicted: the bands that each group's output is compared with.
    """

    read: tuple[tuple[str, ...], ...]
    predicted: tuple[tuple[str, ...], ...]
    grouped: bool

    @classmethod
    def of(cls, model: Mapping[str, Any], bands: Sequence[str]) -> Layout:
        """The layout of `config.model` for images of `bands`."""
        bands = tuple(bands)
        groups = channel_groups(with_group_indices(dict(model), bands))
        if not groups:
            return cls((bands,), (bands,), grouped=False)
        read = tuple(tuple(bands[i] for i in group) for group in groups)
        if model["band_order"] == "grouped":
            return cls(read, read, grouped=True)
        ends = itertools.accumulate(map(len, groups), initial=0)
        predicted = tuple(bands[a:b] for a, b in itertools.pairwise(ends))
        return cls(read, predicted, grouped=True)


def groups_for(
    model: Mapping[str, Any], old: Sequence[str], new: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The groups of the weights, by name, for images of the bands `new`.

    Groups keep their order. Bands that the weights lack become the last group.
    """
    layout = Layout.of(model, old)
    if not layout.grouped:
        return ()
    groups = [tuple(b for b in group if b in new) for group in layout.read]
    groups.append(tuple(b for b in new if b not in old))
    return tuple(filter(None, groups))


def check_method(method: str, old: Sequence[str], new: Sequence[str]) -> None:
    """Raises UserError if weights of a method cannot be fitted to other bands."""
    if method not in MATCHED:
        raise UserError(
            f"the weights in init read the bands {', '.join(old)}, but the run has "
            f"{', '.join(new)}: give the first with --config.data.bands (weights of "
            f"{' and '.join(MATCHED)} can be fitted to other bands)"
        )


def describe_match(old: Layout, new: Layout) -> str:
    """What the new network takes from the old one, and what starts fresh.

    Raises UserError if groups have moved: a token says which group it is of by the
    number of the group.
    """
    if old.grouped != new.grouped:
        which = "have" if old.grouped else "have no"
        raise UserError(
            f"the weights in init {which} groups of bands, but the config has "
            f"model.channel_groups={new.read if new.grouped else ()}: leave it out"
        )
    known = {band for group in old.read for band in group}
    for number, group in enumerate(new.read):
        from_groups = {i for i, bands in enumerate(old.read) if {*bands} & {*group}}
        if from_groups - {number}:
            raise UserError(
                f"group {number} of model.channel_groups, {group}, has bands of group "
                f"{min(from_groups - {number})} of the weights in init: keep the "
                f"weights' groups in their order, {old.read}, and put groups of other "
                "bands behind them"
            )
    fresh = [band for group in new.read for band in group if band not in known]
    read = [band for group in new.read for band in group]
    unused = [band for group in old.read for band in group if band not in read]
    repredicted = [
        band
        for i, group in enumerate(new.predicted)
        for band in group
        if band in known and not (i < len(old.predicted) and band in old.predicted[i])
    ]
    parts = [f"bands by name: {', '.join(b for b in read if b in known)}"]
    if fresh:
        groups = [i for i, group in enumerate(new.read) if {*group} & {*fresh}]
        where = f" (groups {', '.join(map(str, groups))})" if new.grouped else ""
        parts.append(f"new, with random weights: {', '.join(fresh)}{where}")
    if unused:
        parts.append(f"not used: {', '.join(unused)}")
    if repredicted:
        parts.append(
            "random weights in the decoder's last layer, because another group "
            f"predicts them: {', '.join(repredicted)}"
        )
    return "; ".join(parts)


def shapes_of(
    method: str, model: Mapping[str, Any], *, bands: Sequence[str], view_size: int
) -> dict[str, nnx.State]:
    """The shapes of the `params` and `batch_stats` of a network for `bands`."""
    model = with_group_indices(dict(model), bands)
    sizes = {"channels": len(bands), "view_size": view_size}
    build = METHODS[method].build
    network = nnx.eval_shape(lambda: build(model, **sizes, rngs=nnx.Rngs(0)))
    _, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    return {"params": params, "batch_stats": batch_stats}


def moved(
    old: nnx.State, fresh: nnx.State, layouts: tuple[Layout, Layout], pixels: int
) -> nnx.State:
    """`fresh` with everything that `old` has: the weights of a network for new bands.

    layouts: of the old and the new network. pixels: of a patch.
    """
    saved, initial = leaves(old), leaves(fresh)
    places = _places(layouts[1]).keys()
    result = {p: x if p[:-1] in places else saved[p] for p, x in initial.items()}
    here, there = (_places(layout) for layout in layouts)
    for place in here.keys() & there.keys():
        names = here[place], there[place]
        if not {*names[0]} & {*names[1]}:
            continue
        embeds = "patch_embed" in place
        for name, axis in (("kernel", 0 if embeds else 1), ("bias", 0)):
            path = (*place, name)
            result[path] = (
                saved[path]  # one for all bands
                if embeds and name == "bias"
                else _bands_moved(saved[path], initial[path], names, pixels, axis=axis)
            )
    tree = jax.tree.structure(fresh)
    return jax.tree.unflatten(tree, list(result.values()))


def _bands_moved(
    old: jax.Array,
    fresh: jax.Array,
    bands: tuple[tuple[str, ...], tuple[str, ...]],
    pixels: int,
    *,
    axis: int,
) -> jax.Array:
    """`fresh` with the weights of the bands that both have; `axis` is (pixel, band)."""
    here, there = bands
    pairs = [(i, here.index(band)) for i, band in enumerate(there) if band in here]
    into, of = (jnp.array(places) for places in zip(*pairs, strict=True))

    @jax.jit
    def move(old, fresh):
        parts = [
            jnp.moveaxis(x, axis, 0).reshape(pixels, len(names), -1)
            for x, names in ((old, here), (fresh, there))
        ]
        result = parts[1].at[:, into].set(parts[0][:, of])
        rest = [size for i, size in enumerate(fresh.shape) if i != axis]
        return jnp.moveaxis(result.reshape(fresh.shape[axis], *rest), 0, axis)

    return jax.device_put(move(old, fresh), fresh.sharding)


def _places(layout: Layout) -> dict[Path, tuple[str, ...]]:
    """Path of a linear layer that has weights of each band -> the bands in order."""
    places = {}
    for i, (read, predicted) in enumerate(
        zip(layout.read, layout.predicted, strict=True)
    ):
        inner = ("groups", i) if layout.grouped else ()
        places["encoder", "patch_embed", *inner, "proj"] = read
        places["decoder", "head", *inner, "pred"] = predicted
    return places

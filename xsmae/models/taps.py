"""Tokens of chosen blocks of an encoder, and their maps for dense heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from einops import reduce
from flax import nnx

from xsmae.models.vit import Encoder, run_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# A head reads the outputs at these sixths of the depth.
SIXTHS = (2, 3, 4, 6)


def tapped_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks, counted from 0, whose tokens a dense head reads.

    They end the first third, half, two thirds and all of the depth, rounded up: 3, 5, 7
    and 11 of 12 blocks, 7, 11, 15 and 23 of 24. A shallow encoder gives one block
    twice.
    """
    return tuple(-(-depth * sixths // 6) - 1 for sixths in SIXTHS)


def token_maps(
    encoder: Encoder,
    images: Float[Array, "batch height width channels"],
    blocks: Sequence[int],
    *,
    gsd: Float[Array, "batch 2"] | None = None,
    branch_scales: Float[Array, "depth 2 batch"] | None = None,
) -> list[Float[Array, "batch rows columns width"]]:
    """The patch tokens after each of `blocks`, see `tokens_after`, on their grid.

    An encoder with groups of bands has a token per patch and group; the map is their
    mean.
    """
    grid = encoder.grid(*images.shape[1:3])
    found = tokens_after(encoder, images, blocks, gsd=gsd, branch_scales=branch_scales)
    return [as_map(tokens, grid) for tokens in found]


def tokens_after(
    encoder: Encoder,
    images: Float[Array, "batch height width channels"],
    blocks: Sequence[int],
    *,
    gsd: Float[Array, "batch 2"] | None = None,
    branch_scales: Float[Array, "depth 2 batch"] | None = None,
) -> list[Float[Array, "batch tokens width"]]:
    """All tokens after each of `blocks`, without the encoder's final norm.

    blocks: counted from 0. Blocks after the last one do not run. `branch_scales` come
    from `drop_path_scales`.
    """
    graphdef, layers = nnx.split(encoder.blocks)
    x, start, found = encoder.embed(images, gsd=gsd), 0, {}
    for last in sorted(set(blocks)):
        # One loop per tap: a single loop would have to keep the output of every block.
        part = slice(start, last + 1)
        x = run_blocks(
            nnx.merge(graphdef, jax.tree.map(lambda leaf, p=part: leaf[p], layers)),
            x,
            branch_scales=None if branch_scales is None else branch_scales[part],
            remat=encoder.remat,
            scan=encoder.scan,
        )
        start, found[last] = last + 1, x
    return [found[block] for block in blocks]


def as_map(
    tokens: Float[Array, "batch tokens width"], grid: tuple[int, int]
) -> Float[Array, "batch rows columns width"]:
    """Patch tokens on their grid, without the class token; groups are averaged."""
    rows, columns = grid
    return reduce(tokens[:, 1:], "b (g y x) d -> b y x d", "mean", y=rows, x=columns)

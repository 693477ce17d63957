"""Two-dimensional sine-cosine positions, fixed or scaled by the GSD."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from einops import rearrange

if TYPE_CHECKING:
    from jaxtyping import Array, Float

POSITIONS = ("fixed", "gsd")


def sincos_1d(
    position: Float[Array, ...], embed_dim: int
) -> Float[Array, "... embed_dim"]:
    """Sines then cosines of `position` at `embed_dim / 2` frequencies.

    The frequencies are 10000 ** (-2 k / embed_dim) (Vaswani et al. 2017, section 3.5).
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim={embed_dim}, expected an even number")
    half = embed_dim // 2
    omega = 1.0 / 10000.0 ** (jnp.arange(half, dtype=jnp.float32) / half)
    omega = jnp.expand_dims(omega, tuple(range(position.ndim)))
    angle = position[..., None].astype(jnp.float32) * omega
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def sincos_2d(
    y: Float[Array, "... grid_height"],
    x: Float[Array, "... grid_width"],
    embed_dim: int,
) -> Float[Array, "... patches embed_dim"]:
    """Embeddings of a grid of patches, row by row, with rows at `y`, columns at `x`.

    The first half of the channels encodes x, the second half y, as in MAE.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim}, expected a multiple of 4")
    of_x = sincos_1d(x, embed_dim // 2)[..., None, :, :]
    of_y = sincos_1d(y, embed_dim // 2)[..., :, None, :]
    shape = (*y.shape, x.shape[-1], embed_dim // 2)
    grid = jnp.concatenate(
        [jnp.broadcast_to(of_x, shape), jnp.broadcast_to(of_y, shape)], axis=-1
    )
    return grid.reshape(*grid.shape[:-3], -1, embed_dim)


def patch_positions(
    grid: tuple[int, int],
    embed_dim: int,
    *,
    position: str = "fixed",
    gsd: Float[Array, "batch 2"] | None = None,
    reference_gsd: float | None = None,
    offset: Float[Array, "batch 2"] | None = None,
) -> Float[Array, "one_or_batch patches embed_dim"]:
    """Position embeddings of the patches of a `grid` (rows, columns).

    `fixed`: the patch's index, whatever the scale; the batch axis is 1. `gsd`: the
    index times `gsd / reference_gsd` per axis (Scale-MAE, Reed et al. 2023, equation
    2), plus `offset`, the position of the image's corner in patches of the reference
    GSD. Two images of the same ground so share one frame. `gsd` is in metres per pixel,
    (y, x).
    """
    y = jnp.arange(grid[0], dtype=jnp.float32)
    x = jnp.arange(grid[1], dtype=jnp.float32)
    if position == "fixed":
        return sincos_2d(y, x, embed_dim)[None]
    _check_position(position)
    if gsd is None or reference_gsd is None:
        raise ValueError("position='gsd' needs gsd and reference_gsd, found None")
    scale = gsd.astype(jnp.float32) / reference_gsd
    y, x = y[None] * scale[:, :1], x[None] * scale[:, 1:]
    if offset is not None:
        y, x = y + offset[:, :1], x + offset[:, 1:]
    return sincos_2d(y, x, embed_dim)


def _check_position(position: str) -> None:
    if position not in POSITIONS:
        raise ValueError(f"position={position!r}, expected one of {POSITIONS}")


@dataclasses.dataclass(frozen=True)
class TokenPositions:
    """The position embeddings of a network's tokens, of width `embed_dim`.

    position, reference_gsd: see `patch_positions`. With `groups` > 0, a patch has one
    token per group of bands, and the tokens of a group are contiguous. The last
    `group_dim` channels then encode the group and the others the patch (SatMAE, Cong et
    al. 2022, section 3.3).
    """

    embed_dim: int
    position: str = "fixed"
    reference_gsd: float | None = None
    groups: int = 0
    group_dim: int = 0

    def __post_init__(self):
        _check_position(self.position)

    def __call__(
        self,
        grid: tuple[int, int],
        *,
        gsd: Float[Array, "batch 2"] | None = None,
        offset: Float[Array, "batch 2"] | None = None,
    ) -> Float[Array, "one_or_batch tokens embed_dim"]:
        """Embeddings of the tokens of a `grid` (rows, columns), no class token."""
        of_patches = patch_positions(
            grid,
            self.embed_dim - self.group_dim,
            position=self.position,
            gsd=gsd,
            reference_gsd=self.reference_gsd,
            offset=offset,
        )
        if not self.groups:
            return of_patches
        of_groups = sincos_1d(jnp.arange(self.groups), self.group_dim)
        shape = (of_patches.shape[0], self.groups, of_patches.shape[1])
        both = [
            jnp.broadcast_to(x, (*shape, x.shape[-1]))
            for x in (of_patches[:, None], of_groups[None, :, None])
        ]
        return rearrange(jnp.concatenate(both, axis=-1), "b g l d -> b (g l) d")

    def of_class_token(self) -> Float[Array, "one one embed_dim"]:
        """Zeros; the group channels encode the position after the last group."""
        zeros = jnp.zeros((1, 1, self.embed_dim - self.group_dim))
        if not self.groups:
            return zeros
        after = sincos_1d(jnp.full((1, 1), self.groups), self.group_dim)
        return jnp.concatenate([zeros, after], axis=-1)


def relative_box(
    box: Float[Array, "batch views 4"], flip: Float[Array, "batch 2"]
) -> Float[Array, "batch views 4"]:
    """Each view's box as fractions of view 1 after mirroring.

    `box` is (top, left, bottom, right) in source pixels. `flip` is (vertical,
    horizontal), 1 if the views were mirrored after they were cut. View 1's own box
    becomes (0, 0, 1, 1).
    """
    corner, opposite = box[:, :1, :2], box[:, :1, 2:]
    size = opposite - corner
    start, stop = (box[..., :2] - corner) / size, (box[..., 2:] - corner) / size
    mirrored = flip[:, None, :].astype(bool)
    return jnp.concatenate(
        [jnp.where(mirrored, 1 - stop, start), jnp.where(mirrored, 1 - start, stop)],
        axis=-1,
    )

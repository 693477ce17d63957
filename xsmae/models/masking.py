"""Random masking of patches, and its inverse."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import reduce

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masking:
    """The visible and hidden patches.

    ids_keep: [batch, kept], the visible patches in the order of the encoder's input.
    ids_restore: [batch, patches], the index of each patch in (visible, hidden).
    mask: [batch, patches] float32, 1 = hidden; 0 also for a patch that is not valid.
    """

    ids_keep: Int[Array, "batch kept"]
    ids_restore: Int[Array, "batch patches"]
    mask: Float[Array, "batch patches"]


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many of so many patches are visible (He et al. 2022, appendix A.1)."""
    return int(patches * (1 - mask_ratio))


def valid_patches_needed(patches: int, mask_ratio: float, *, groups: int = 1) -> int:
    """How many patches of a view must be valid, so that all visible ones can be.

    groups: of bands that are masked each on its own; a patch has a token for each.
    """
    return math.ceil(kept_patches(groups * patches, mask_ratio) / groups)


def valid_patches(
    valid: Bool[Array, "batch height width"], patch_size: int
) -> Bool[Array, "batch patches"]:
    """Patches are valid if at least half of their pixels are."""
    pixels = valid.astype(jnp.int32)
    count = reduce(
        pixels, "b (h p) (w q) -> b (h w)", "sum", p=patch_size, q=patch_size
    )
    return 2 * count >= patch_size**2


def random_masking(
    noise: Float[Array, "batch patches"],
    mask_ratio: float,
    valid: Bool[Array, "batch patches"] | None = None,
) -> Masking:
    """Keeps the `int(patches * (1 - mask_ratio))` patches with the smallest noise.

    This is MAE's rule (He et al. 2022, appendix A.1). For equal noise, it keeps the
    patch with the smaller index. `noise` lies in 0-1. Patches that are not `valid` come
    after all others, so they are hidden if enough are valid: `valid_patches_needed`.
    """
    patches = noise.shape[1]
    kept = kept_patches(patches, mask_ratio)
    if not 0 < kept <= patches:
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps {kept} of {patches} patches, expected at "
            "least 1: lower the ratio or use more patches"
        )
    if valid is not None:
        noise = jnp.where(valid, noise, noise + 2)
    ids_shuffle = jnp.argsort(noise, axis=1)
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    mask = ids_restore >= kept if valid is None else (ids_restore >= kept) & valid
    mask = mask.astype(jnp.float32)
    return Masking(ids_keep=ids_shuffle[:, :kept], ids_restore=ids_restore, mask=mask)


def take_tokens(
    tokens: Float[Array, "one_or_batch tokens width"], ids: Int[Array, "batch n"]
) -> Float[Array, "batch n width"]:
    """The tokens at `ids` of each sample; a batch axis of 1 in `tokens` is shared."""
    if tokens.shape[0] == 1:
        return tokens[0][ids]
    return jnp.take_along_axis(tokens, ids[..., None], axis=1)

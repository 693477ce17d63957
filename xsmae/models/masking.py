"""Random masking of patches, and its inverse."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masking:
    """The visible and hidden patches.

    ids_keep: [batch, kept], the visible patches in the order of the encoder's input.
    ids_restore: [batch, patches], the index of each patch in (visible, hidden).
    mask: [batch, patches] float32, 1 = hidden.
    """

    ids_keep: Int[Array, "batch kept"]
    ids_restore: Int[Array, "batch patches"]
    mask: Float[Array, "batch patches"]


def random_masking(noise: Float[Array, "batch patches"], mask_ratio: float) -> Masking:
    """Keeps the `int(patches * (1 - mask_ratio))` patches with the smallest noise.

    This is MAE's rule (He et al. 2022, appendix A.1). For equal noise, it keeps the
    patch with the smaller index.
    """
    patches = noise.shape[1]
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept <= patches:
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps {kept} of {patches} patches, expected at "
            "least 1: lower the ratio or use more patches"
        )
    ids_shuffle = jnp.argsort(noise, axis=1)
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    mask = (ids_restore >= kept).astype(jnp.float32)
    return Masking(ids_keep=ids_shuffle[:, :kept], ids_restore=ids_restore, mask=mask)


def take_tokens(
    tokens: Float[Array, "one_or_batch tokens width"], ids: Int[Array, "batch n"]
) -> Float[Array, "batch n width"]:
    """The tokens at `ids` of each sample; a batch axis of 1 in `tokens` is shared."""
    if tokens.shape[0] == 1:
        return tokens[0][ids]
    return jnp.take_along_axis(tokens, ids[..., None], axis=1)

"""SatMAE (Cong et al. 2022): an MAE with a token per patch and group of bands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.mae import MAE, Decoder, PatchHead
from xsmae.models.masking import Masking, random_masking, take_tokens
from xsmae.models.vit import Encoder, PatchEmbed

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# The bands of each group, in the order in which its patch embedding reads them.
ChannelGroups = tuple[tuple[int, ...], ...]

BAND_ORDERS = ("grouped", "concatenated")


def check_groups(groups: ChannelGroups, channels: int) -> None:
    """Raises ValueError unless every band is in exactly one group."""
    bands = [band for group in groups for band in group]
    if sorted(bands) != list(range(channels)):
        raise ValueError(
            f"channel_groups={groups}, expected each of the bands 0 to {channels - 1} "
            "in exactly one group"
        )


class GroupPatchEmbed(nnx.Module):
    """A patch embedding per group of bands; the tokens of a group are contiguous."""

    def __init__(
        self,
        groups: ChannelGroups,
        *,
        patch_size: int,
        embed_dim: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.channel_groups = groups
        self.groups = nnx.List(
            PatchEmbed(
                patch_size=patch_size,
                channels=len(group),
                embed_dim=embed_dim,
                dtype=dtype,
                rngs=rngs,
            )
            for group in groups
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        ids_keep: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Groups x patches tokens, or only those in `ids_keep` if it is given."""
        tokens = [
            embed(images[..., jnp.array(bands)])
            for embed, bands in zip(self.groups, self.channel_groups, strict=True)
        ]
        tokens = jnp.concatenate(tokens, axis=1)
        return tokens if ids_keep is None else take_tokens(tokens, ids_keep)


class GroupHead(nnx.Module):
    """Predicts the values of each patch, in `patchify`'s order, one layer per group.

    The concatenated predictions of all groups have one entry per band. With `grouped`,
    each entry is for its group's own band. With `concatenated`, entry k is for band k,
    although the predicting token may belong to another group. The official code
    compares them in this way (models_mae_group_channels.py, forward_loss).
    """

    def __init__(
        self,
        groups: ChannelGroups,
        *,
        patch_size: int,
        embed_dim: int,
        band_order: str,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if band_order not in BAND_ORDERS:
            raise ValueError(
                f"band_order={band_order!r}, expected one of {BAND_ORDERS}"
            )
        self.channel_groups = groups
        self.band_order = band_order
        self.pixels = patch_size * patch_size
        self.groups = nnx.List(
            PatchHead(
                patch_size=patch_size,
                channels=len(group),
                embed_dim=embed_dim,
                dtype=dtype,
                rngs=rngs,
            )
            for group in groups
        )

    def __call__(
        self, tokens: Float[Array, "batch tokens width"], *, grid: tuple[int, int]
    ) -> Float[Array, "batch patches values"]:
        by_group = rearrange(tokens, "b (g l) d -> g b l d", g=len(self.groups))
        values = [
            rearrange(head(x, grid=grid), "b l (p c) -> b l p c", p=self.pixels)
            for head, x in zip(self.groups, by_group, strict=True)
        ]
        values = jnp.concatenate(values, axis=-1)
        if self.band_order == "grouped":
            bands = jnp.array([band for group in self.channel_groups for band in group])
            values = values[..., jnp.argsort(bands)]
        return rearrange(values, "b l p c -> b l (p c)")


class SatMAE(MAE):
    """An MAE for groups of bands. Without groups, SatMAE is `MAE`.

    `spatial_mask`: one mask for all groups; otherwise each token is masked on its own.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        mask_ratio: float,
        spatial_mask: bool,
    ):
        super().__init__(encoder, decoder, mask_ratio=mask_ratio)
        self.spatial_mask = spatial_mask
        self.num_groups = encoder.positions.groups

    def noise_size(self, height: int, width: int) -> int:
        """The number of uniform numbers that decide the masks of a view."""
        groups = 1 if self.spatial_mask else self.num_groups
        return groups * super().noise_size(height, width)

    def random_masking(
        self,
        noise: Float[Array, "batch numbers"],
        valid: Bool[Array, "batch patches"] | None = None,
    ) -> Masking:
        """Chooses the visible tokens; the mask is [batch, groups, patches]."""
        groups = self.num_groups
        if valid is not None and not self.spatial_mask:
            valid = jnp.tile(valid, (1, groups))
        masking = random_masking(noise, self.mask_ratio, valid)
        if not self.spatial_mask:
            mask = rearrange(masking.mask, "b (g l) -> b g l", g=groups)
            return Masking(masking.ids_keep, masking.ids_restore, mask)
        group = jnp.arange(groups)[None, :, None]
        kept, patches = masking.ids_keep.shape[1], noise.shape[1]
        ids_keep = masking.ids_keep[:, None] + group * patches
        # Convert indices in (visible, hidden) of one group to those of all groups.
        ids_restore = masking.ids_restore[:, None]
        ids_restore = jnp.where(
            ids_restore < kept,
            ids_restore + group * kept,
            ids_restore + (groups - 1) * kept + group * (patches - kept),
        )
        return Masking(
            rearrange(ids_keep, "b g n -> b (g n)"),
            rearrange(ids_restore, "b g l -> b (g l)"),
            jnp.repeat(masking.mask[:, None], groups, axis=1),
        )

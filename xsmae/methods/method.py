"""The interface of a pretraining method, and functions that methods share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae import losses
from xsmae.errors import UserError
from xsmae.models.build import Config, channel_groups
from xsmae.models.mae import MAEOutput, Views
from xsmae.models.masking import valid_patches
from xsmae.models.vit import patchify
from xsmae.ops import resize
from xsmae.ranges import Ranges

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    # Loss terms that add up to the total, or values that are only reported.
    Terms = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of a figure of a batch, in normalised image space.

    images: [batch, views, height, width, channels], the model's input.
    hidden: the same shape, True for values hidden from the encoder or not valid.
    panels: the model's results, images of any size; titles: one per panel.
    """

    images: Float[Array, "batch views height width channels"]
    hidden: Bool[Array, "batch views height width channels"]
    panels: tuple[Float[Array, "batch views tall wide channels"], ...]
    titles: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Method:
    """One pretraining method: everything specific to it.

    num_views: how many views of a sample the model reads.
    presets: the names of its settings, the default first.
    fields(preset, size=, model=) -> its config fields by group (`views`, `model`,
        `loss`, `optim`), added to the fields of all methods. `size` is the name of the
        network's size and `model` contains the fields that depend on the size.
    build(config.model, channels=, view_size=, rngs=) -> the model.
    losses(output, views, model=, loss=) -> the loss terms, each with a `weight` in
        `config.loss.<name>`, and values that are only reported.
    pictures(output, views, model=, loss=) -> `Pictures`; None for a method that
        reconstructs nothing.
    units: the unit of each loss term, for the figures.
    ranges: the smallest and largest value of its own config fields, by dotted name.
    target_scale(config.model) -> the side of the predicted crops divided by the side of
        a view; 1 if the model predicts its input.
    unused: fields of all methods that this one does not use, by dotted name. Its
        configs do not have them.
    """

    num_views: int
    presets: tuple[str, ...]
    fields: Callable[..., Mapping[str, Mapping[str, Any]]]
    build: Callable[..., nnx.Module]
    losses: Callable[..., tuple[Terms, Terms]]
    pictures: Callable[..., Pictures] | None
    units: Mapping[str, str]
    ranges: Ranges
    target_scale: Callable[[Config], int] = lambda model: 1
    unused: tuple[str, ...] = ()

    def check_used(self, fields: Iterable[str]) -> None:
        """Raises UserError if a config file added a field that the method ignores.

        fields: those of the config, by dotted name.
        """
        found = sorted(set(self.unused).intersection(fields))
        if found:
            raise UserError(
                f"this method does not use {', '.join(found)}: leave it out of the "
                "config"
            )


def reconstruction_per_view(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Float[Array, " views"]:
    """The reconstruction loss of every view; SatMAE's if there are groups of bands."""
    return losses.reconstruction(
        output.pred,
        patches_of(views.images, model["patch_size"]),
        output.mask,
        norm_pix_loss=loss["reconstruction"]["norm_pix_loss"],
        channel_groups=channel_groups(model),
        channels=views.images.shape[-1],
        valid=valid_pixels_of(views, model),
    )


def valid_pixels_of(
    views: Views, model: Config
) -> Bool[Array, "batch views patches pixels"] | None:
    """Which pixels of each patch are valid; None: all are."""
    if views.valid is None:
        return None
    return patches_of(views.valid[..., None], model["patch_size"])


def valid_patches_of(
    views: Views, model: Config
) -> Bool[Array, "batch views patches"] | None:
    """Which patches are valid, as the model takes them; None: all are."""
    if views.valid is None:
        return None
    of_view = functools.partial(valid_patches, patch_size=model["patch_size"])
    return jax.vmap(of_view)(views.valid)


def patches_of(
    images: Float[Array, "batch views height width channels"], patch_size: int
) -> Float[Array, "batch views patches values"]:
    """Cuts every view into patches."""
    batch = images.shape[0]
    merged = rearrange(images, "b v ... -> (b v) ...")
    return rearrange(patchify(merged, patch_size), "(b v) ... -> b v ...", b=batch)


def grid_of(views: Views, model: Config) -> tuple[int, int]:
    """The (rows, columns) of patches in a view."""
    height, width = views.images.shape[2:4]
    return height // model["patch_size"], width // model["patch_size"]


def hidden_values(
    mask: Float[Array, "batch views ..."], views: Views, model: Config
) -> Bool[Array, "batch views height width channels"]:
    """True where a value of the images belongs to a hidden patch, or is not valid.

    The encoder never sees a patch that is not valid, so all of it is hidden.
    """
    rows, columns = grid_of(views, model)
    channels, groups = views.images.shape[-1], channel_groups(model)
    if groups:
        of_band = {band: i for i, group in enumerate(groups) for band in group}
        mask = mask[:, :, jnp.array([of_band[band] for band in range(channels)])]
    else:
        mask = jnp.repeat(mask[:, :, None], channels, axis=2)
    mask = rearrange(mask, "b v c (h w) -> b v h w c", h=rows, w=columns)
    hidden = resize.nearest(mask, views.images.shape[2:4]) > 0.5
    if views.valid is None:
        return hidden
    patches = valid_patches_of(views, model)
    patches = rearrange(patches, "b v (h w) -> b v h w 1", h=rows, w=columns)
    seen = resize.nearest(patches, views.images.shape[2:4]) & views.valid[..., None]
    return hidden | ~seen


def neutral_where_invalid(
    images: Float[Array, "batch views height width channels"],
    valid: Bool[Array, "batch views height width"] | None,
) -> Float[Array, "batch views height width channels"]:
    """A panel of `Pictures` that shows the bands' mean where nothing is known."""
    return images if valid is None else jnp.where(valid[..., None], images, 0)

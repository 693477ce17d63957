"""What a pretraining method is, and what the methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae import losses
from xsmae.models.build import Config, channel_groups
from xsmae.models.mae import MAEOutput, Views
from xsmae.models.vit import patchify
from xsmae.ops import resize
from xsmae.ranges import Ranges

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    # The terms that the total is made of, or what is only reported.
    Terms = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a figure shows of a batch, in normalised image space.

    images: [batch, views, height, width, channels], what the model was given.
    hidden: of the same shape, whether a value was hidden from the encoder.
    panels: what the model makes of it; images of any size, with their titles.
    """

    images: Float[Array, "batch views height width channels"]
    hidden: Bool[Array, "batch views height width channels"]
    panels: tuple[Float[Array, "batch views tall wide channels"], ...]
    titles: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Method:
    """One pretraining method: everything that is its own, in one place.

    num_views: how many views of a sample the model reads.
    presets: the names of its settings, the default first.
    fields(preset, size=, model=) -> its config fields by group (`views`, `model`,
        `loss`, `optim`), added to those that all methods have; `size` is the name of
        the network's size and `model` holds the fields that the size decides.
    build(config.model, channels=, view_size=, rngs=) -> the model.
    losses(output, views, model=, loss=) -> the loss terms, each with a `weight` in
        `config.loss.<name>`, and what is only reported.
    pictures(output, views, model=, loss=) -> `Pictures`.
    units: the unit of each loss term, for the figures.
    ranges: the smallest and largest value of its own config fields, by dotted name.
    target_scale(config.model) -> the side of the crops that the model predicts, in
        views; 1 for a model of what it reads.
    """

    num_views: int
    presets: tuple[str, ...]
    fields: Callable[..., Mapping[str, Mapping[str, Any]]]
    build: Callable[..., nnx.Module]
    losses: Callable[..., tuple[Terms, Terms]]
    pictures: Callable[..., Pictures]
    units: Mapping[str, str]
    ranges: Ranges
    target_scale: Callable[[Config], int] = lambda model: 1


def reconstruction_per_view(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Float[Array, " views"]:
    """The reconstruction loss of every view; SatMAE's where there are groups."""
    return losses.reconstruction(
        output.pred,
        patches_of(views.images, model["patch_size"]),
        output.mask,
        norm_pix_loss=loss["reconstruction"]["norm_pix_loss"],
        channel_groups=channel_groups(model),
        channels=views.images.shape[-1],
    )


def patches_of(
    images: Float[Array, "batch views height width channels"], patch_size: int
) -> Float[Array, "batch views patches values"]:
    """Every view cut into patches."""
    batch = images.shape[0]
    merged = rearrange(images, "b v ... -> (b v) ...")
    return rearrange(patchify(merged, patch_size), "(b v) ... -> b v ...", b=batch)


def grid_of(views: Views, model: Config) -> tuple[int, int]:
    """Patches of a view, (rows, columns)."""
    height, width = views.images.shape[2:4]
    return height // model["patch_size"], width // model["patch_size"]


def hidden_values(
    mask: Float[Array, "batch views ..."], views: Views, model: Config
) -> Bool[Array, "batch views height width channels"]:
    """True where a value of the images belongs to a hidden patch."""
    rows, columns = grid_of(views, model)
    channels, groups = views.images.shape[-1], channel_groups(model)
    if groups:
        of_band = {band: i for i, group in enumerate(groups) for band in group}
        mask = mask[:, :, jnp.array([of_band[band] for band in range(channels)])]
    else:
        mask = jnp.repeat(mask[:, :, None], channels, axis=2)
    mask = rearrange(mask, "b v c (h w) -> b v h w c", h=rows, w=columns)
    return resize.nearest(mask, views.images.shape[2:4]) > 0.5

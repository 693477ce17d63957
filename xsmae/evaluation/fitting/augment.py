"""The augmentations of fine-tuning, on the device: erasing, mixup, cutmix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Key

# The erased rectangle (Zhong et al. 2020 and timm's RandomErasing).
ERASED_AREA = (0.02, 1 / 3)  # of the image's area
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


def random_erasing(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    *,
    probability: float,
) -> Float[Array, "batch height width channels"]:
    """Fill a random rectangle of each image with normal noise, with `probability`.

    images: normalised. The rectangle's area is uniform, its ratio log-uniform. If it
    does not fit it is drawn again; after ten failures nothing is erased. Every pixel
    and channel gets its own noise value, as in timm's mode `pixel`, which MAE uses.
    """
    if not probability:
        return images
    which, area_key, ratio_key, place_key, noise_key = jax.random.split(key, 5)
    batch, height, width, _ = images.shape
    draws = (batch, ERASING_TRIES)
    area = height * width * _uniform(area_key, draws, *ERASED_AREA)
    ratio = jnp.exp(_uniform(ratio_key, draws, *np.log(ERASED_RATIO)))
    tall, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    first = fits.argmax(axis=1)[:, None]
    tall, wide = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (tall, wide))
    place = jax.random.uniform(place_key, (2, batch))
    top = jnp.floor(place[0] * (height - tall + 1))
    left = jnp.floor(place[1] * (width - wide + 1))
    erased = _rectangle(height, width, top, top + tall, left, left + wide)
    chosen = jax.random.bernoulli(which, probability, (batch,)) & fits.any(axis=1)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where((erased & chosen[:, None, None])[..., None], noise, images)


def mix(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    *,
    mixup: float,
    cutmix: float,
    switch: float,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Mix the batch with itself in reverse order, and mix the targets the same way.

    One lambda per batch (timm's mode `batch`) is the share of the image itself. Mixup
    (Zhang et al. 2018): lambda * image + (1 - lambda) * other, lambda from Beta(mixup,
    mixup). Cutmix (Yun et al. 2019): pastes a rectangle of the other image; lambda is
    drawn from Beta(cutmix, cutmix), then set to the area that the rectangle, clipped at
    the edge, leaves. 0 turns either off. If both are on, cutmix is chosen with
    probability `switch`. An image keeps its own GSD.
    """
    if not (mixup or cutmix):
        return images, targets
    switch_key, share_key, place_key = jax.random.split(key, 3)
    other, other_targets = images[::-1], targets[::-1]
    cut = jnp.full((), not mixup)
    if mixup and cutmix:
        cut = jax.random.bernoulli(switch_key, switch)
    # One draw serves both: the beta sampler is slow to compile.
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    blended = share * images + (1 - share) * other
    if cutmix:
        pasted = cutmix_rectangle(place_key, share, *images.shape[1:3])
        blended = jnp.where(cut, jnp.where(pasted[..., None], other, images), blended)
        share = jnp.where(cut, 1 - pasted.mean(), share)
    return blended, share * targets + (1 - share) * other_targets


def cutmix_rectangle(
    key: Key[Array, ""], share: Float[Array, ""], height: int, width: int
) -> Bool[Array, "height width"]:
    """The pixels that cutmix replaces: 1 - `share` of the area, clipped at the edge.

    The centre is any pixel; the aspect ratio is the image's.
    """
    y, x = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array([height, width]))
    half_height = jnp.floor(height * jnp.sqrt(1 - share)) // 2
    half_width = jnp.floor(width * jnp.sqrt(1 - share)) // 2
    return _rectangle(
        height,
        width,
        *((y - half_height)[None], (y + half_height)[None]),
        *((x - half_width)[None], (x + half_width)[None]),
    )[0]


def _rectangle(height, width, top, bottom, left, right) -> Bool[Array, "n h w"]:
    """Masks of n rectangles with integer edges, clipped to the image."""
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside_y = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_x = (columns >= left[:, None]) & (columns < right[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :]


def _uniform(key, shape, low, high):
    return jax.random.uniform(key, shape, minval=low, maxval=high)

"""What fine-tuning does to a batch on the device: erasing, mixup, cutmix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Key

# Of the erased rectangle (Zhong et al. 2020 and timm's RandomErasing).
ERASED_AREA = (0.02, 1 / 3)  # of the image's
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


def random_erasing(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    *,
    probability: float,
) -> Float[Array, "batch height width channels"]:
    """Each image, with `probability`, with normal noise in a random rectangle.

    images: normalised. The rectangle's area is uniform and its ratio log-uniform; one
    that does not fit is drawn again, and after ten nothing is erased. A noise value a
    pixel and channel: the mode `pixel` of timm, which MAE takes.
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
    """The batch mixed with itself in reverse order, and its targets likewise.

    With a share lambda of its own, one for the whole batch (timm's mode `batch`): mixup
    (Zhang et al. 2018) adds lambda times the one and 1 - lambda times the other, lambda
    from Beta(mixup, mixup); cutmix (Yun et al. 2019) puts a rectangle of the other in,
    lambda from Beta(cutmix, cutmix) and then what the rectangle, cut off at the edge,
    leaves. Where both are on, it is cutmix with probability `switch`; 0 is off. The GSD
    that goes with a mixed image stays its own.
    """
    if not (mixup or cutmix):
        return images, targets
    switch_key, share_key, place_key = jax.random.split(key, 3)
    other, other_targets = images[::-1], targets[::-1]
    cut = jnp.full((), not mixup)
    if mixup and cutmix:
        cut = jax.random.bernoulli(switch_key, switch)
    # One draw for either: the sampler of the beta distribution is slow to compile.
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
    """Where the other image shows: a part 1 - `share`, less what lies outside.

    Its centre is any pixel, its ratio the image's.
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
    """Masks of n rectangles, their edges whole numbers; what lies outside is cut."""
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside_y = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_x = (columns >= left[:, None]) & (columns < right[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :]


def _uniform(key, shape, low, high):
    return jax.random.uniform(key, shape, minval=low, maxval=high)

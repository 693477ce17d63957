"""The loss terms: functions of tensors that compute in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from xsmae.ops import resize

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

VIEW_REDUCTIONS = ("mean", "sum")


def patch_statistics(
    target: Float[Array, "... patches values"],
    *,
    valid: Bool[Array, "... patches pixels"] | None = None,
) -> tuple[Float[Array, "... patches 1"], Float[Array, "... patches 1"]]:
    """Mean and standard deviation of each patch, for `norm_pix_loss`.

    The variance is the unbiased one, plus 1e-6 (official models_mae.py, forward_loss).
    With `valid`, of the values of the valid pixels alone.
    """
    if valid is None:
        mean = target.mean(axis=-1, keepdims=True)
        var = target.var(axis=-1, keepdims=True, ddof=1)
        return mean, jnp.sqrt(var + 1e-6)
    valid = _of_values(valid, target)
    mean = _mean(target, valid)[..., None]
    square = jnp.where(valid, jnp.square(target - mean), 0)
    count = valid.sum(axis=-1, keepdims=True)
    var = square.sum(axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    return mean, jnp.sqrt(var + 1e-6)


def reconstruction(
    pred: Float[Array, "batch views patches values"],
    target: Float[Array, "batch views patches values"],
    mask: Float[Array, "batch views ..."],
    *,
    norm_pix_loss: bool,
    channel_groups: tuple[tuple[int, ...], ...] = (),
    channels: int = 1,
    valid: Bool[Array, "batch views patches pixels"] | None = None,
) -> Float[Array, " views"]:
    """Mean squared error on the hidden patches, one value per view.

    `target` contains the patches of the normalised images. With `norm_pix_loss`, each
    target patch is first normalised by its own mean and standard deviation. With
    `channel_groups`, the error is averaged over the bands of each group and the mask is
    [batch, views, groups, patches]. `channels` is the number of bands; they are the
    fastest axis of the values.

    With `valid`, a patch's error is the mean over its valid pixels. A view without any
    valid target has the loss 0.
    """
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    if norm_pix_loss:
        mean, std = patch_statistics(target, valid=valid)
        target = (target - mean) / std
    error = jnp.square(pred - target)
    if channel_groups:
        error = rearrange(error, "b v l (p c) -> c b v l p", c=channels)
        error = _mean(error, None if valid is None else valid[None])
        groups = [error[jnp.array(group)].mean(axis=0) for group in channel_groups]
        error = jnp.stack(groups, axis=2)
    else:
        error = _mean(error, None if valid is None else _of_values(valid, error))
    return _masked_mean(error, mask, may_be_empty=valid is not None)


def frequency_band(
    pred: Float[Array, "batch views height width channels"],
    target: Float[Array, "batch views height width channels"],
    mask: Float[Array, "batch views patches"],
    *,
    absolute: bool,
    grid: tuple[int, int],
    valid: Bool[Array, "batch views height width"] | None = None,
) -> Float[Array, " views"]:
    """Squared (or absolute) error on the pixels of hidden patches, one value per view.

    As in Scale-MAE, it is the SUM over bands and the mean over pixels (official
    models_mae.py, forward_loss). `grid` is the mask's (rows, columns). With `valid` it
    is over the valid pixels, 0 if there are none.
    """
    error = pred.astype(jnp.float32) - target.astype(jnp.float32)
    error = (jnp.abs(error) if absolute else jnp.square(error)).sum(axis=-1)
    mask = rearrange(mask, "b v (h w) -> b v h w 1", h=grid[0], w=grid[1])
    mask = resize.nearest(mask, error.shape[2:])[..., 0]
    if valid is not None:
        mask = mask * valid
    return _masked_mean(error, mask, may_be_empty=valid is not None)


def _of_values(valid, values):
    """[..., pixels] as the values of patches are ordered: the bands of each pixel."""
    return jnp.repeat(valid, values.shape[-1] // valid.shape[-1], axis=-1)


def _mean(values, valid):
    """Over the last axis, of the valid values; 0 where there are none."""
    if valid is None:
        return values.mean(axis=-1)
    total = jnp.where(valid, values, 0).sum(axis=-1)
    return total / jnp.maximum(valid.sum(axis=-1), 1)


def _masked_mean(error, mask, *, may_be_empty):
    """Of [batch, views, ...], over all axes but the views', where the mask is 1."""
    axes = (0, *range(2, error.ndim))
    total, count = (error * mask).sum(axes), mask.sum(axes)
    return total / (jnp.maximum(count, 1) if may_be_empty else count)


def over_views(per_view: Float[Array, " views"], reduction: str) -> Float[Array, ""]:
    """Reduces a loss over views: `sum` (the official code) or `mean` (the paper)."""
    if reduction not in VIEW_REDUCTIONS:
        raise ValueError(f"views={reduction!r}, expected one of {VIEW_REDUCTIONS}")
    return per_view.sum() if reduction == "sum" else per_view.mean()


def contrastive(
    embedding: Float[Array, "batch two dim"],
    *,
    temperature: float,
    positive_in_denominator: bool,
    groups: int = 1,
) -> Float[Array, ""]:
    """NT-Xent between the two views of each sample (Chen et al. 2020, equation 1).

    Without `positive_in_denominator` it is the official Cross-Scale MAE variant: the
    denominator is the sum over the 2B - 2 negatives + 1e-8, so the loss can be
    negative. The negatives come from the whole global batch. With `groups` > 1, the
    batch has that many equal parts and negatives come from the sample's own part, as on
    devices that do not gather.
    """
    batch = embedding.shape[0]
    if batch % groups:
        raise ValueError(f"a batch of {batch}, expected a multiple of groups={groups}")
    z = embedding.astype(jnp.float32)
    # 1e-24 is the square of torch.nn.functional.normalize's 1e-12.
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-24))
    z = rearrange(z, "(g b) v d -> g b v d", g=groups)
    # Samples stay a separate first axis. If the batch is sharded, each device computes
    # the rows of its own samples and gathers vectors instead of products.
    logits = jnp.einsum("gbvd,gcud->gbvcu", z, z, preferred_element_type=jnp.float32)
    logits = logits / temperature
    positive = (z[:, :, 0] * z[:, :, 1]).sum(-1)[..., None] / temperature
    sample = jnp.eye(z.shape[1], dtype=bool)[:, None, :, None]
    excluded = sample & jnp.eye(2, dtype=bool)[None, :, None]  # the vector itself
    if positive_in_denominator:
        logits = jnp.where(excluded, -jnp.inf, logits)
        denominator = jax.nn.logsumexp(logits, axis=(-2, -1))
    else:
        negatives = jnp.where(sample, 0.0, jnp.exp(logits)).sum(axis=(-2, -1))
        denominator = jnp.log(negatives + 1e-8)
    return (denominator - positive).mean()


def scale_distillation(
    coarse: Float[Array, "batch coarse dim"],
    target: Float[Array, "batch dim"],
    *,
    temperature: float,
    positive_in_denominator: bool,
    groups: int = 1,
) -> Float[Array, ""]:
    """NT-Xent between coarse views and the fine view's target, which gets no gradient.

    The mean over the coarse views. So a coarse view learns what the fine one shows, and
    the fine one does not forget what a coarse one cannot show. See `contrastive`.
    """
    target = jax.lax.stop_gradient(target.astype(jnp.float32))

    def of_one(embedding):
        return contrastive(
            jnp.stack([target, embedding.astype(jnp.float32)], axis=1),
            temperature=temperature,
            positive_in_denominator=positive_in_denominator,
            groups=groups,
        )

    return jax.vmap(of_one, in_axes=1)(coarse).mean()


def dense_distillation(
    predicted: Sequence[Float[Array, "batch patches width"]],
    target: Sequence[Float[Array, "batch patches width"]],
    counts: Sequence[Float[Array, "batch patches"]],
) -> Float[Array, ""]:
    """1 - cosine between predicted and target patches, where they count.

    One array for each coarse view; the mean over the views. Targets get no gradient.
    `counts` weights the patches of a view.
    """

    def of_one(predicted, target, counts):
        target = jax.lax.stop_gradient(target.astype(jnp.float32))
        similarity = optax.cosine_similarity(
            predicted.astype(jnp.float32), target, epsilon=1e-6
        )
        return ((1 - similarity) * counts).sum() / jnp.maximum(counts.sum(), 1)

    terms = map(of_one, predicted, target, counts)
    return sum(terms, jnp.zeros(())) / len(predicted)


def invariance(projected: Float[Array, "batch views dim"]) -> Float[Array, ""]:
    """Mean squared distance of the views of a sample to their mean."""
    projected = projected.astype(jnp.float32)
    return jnp.square(projected - projected.mean(axis=1, keepdims=True)).mean()


def sigreg(
    projected: Float[Array, "batch views dim"],
    directions: Float[Array, "dim directions"],
) -> Float[Array, ""]:
    """How far each view's vectors are from a standard normal distribution.

    Balestriero & LeCun 2025 (LeJEPA). Along each direction, the characteristic function
    of the batch is compared with exp(-t * t / 2) at 17 points from 0 to 3. The squared
    differences are integrated by the trapezoidal rule with the weight exp(-t * t / 2),
    and multiplied by the size of the batch. The mean over directions and views.
    """
    points = jnp.linspace(0.0, 3.0, 17)
    normal = jnp.exp(-jnp.square(points) / 2)
    ends = jnp.ones(17).at[jnp.array([0, -1])].set(0.5)
    weights = normal * ends * (points[1] - points[0])
    along = jnp.einsum(
        "bvd,ds->bvs",
        projected.astype(jnp.float32),
        directions.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    angle = jnp.einsum("bvs,t->bvst", along, points)
    real, imaginary = jnp.cos(angle).mean(axis=0), jnp.sin(angle).mean(axis=0)
    distance = jnp.square(real - normal[None, None]) + jnp.square(imaginary)
    return len(projected) * (distance * weights[None, None]).sum(axis=-1).mean()


def cross_prediction(
    predicted: Float[Array, "batch patches width"],
    target: Float[Array, "batch patches width"],
    *,
    stop_gradient: bool,
    box: Float[Array, "batch 4"] | None = None,
    grid: tuple[int, int] | None = None,
    valid: Bool[Array, "batch two patches"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error between view 2's prediction and view 1's decoder tokens.

    Without `box`, token i is compared with token i (the official code). `box` is view
    2's (top, left, bottom, right) in fractions of view 1, and `grid` the (rows,
    columns) of patches. With them, a token is compared with view 1's tokens at the same
    ground; patches with a centre outside view 1 do not count.

    `valid`: the patches of views 1 and 2. A patch counts if it is valid in view 2 and
    its target is made only of valid patches. If there are none, the loss is 0.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)
    if stop_gradient:
        target = jax.lax.stop_gradient(target)
    if box is None:
        if valid is None:
            return optax.squared_error(predicted, target).mean()
        counts = valid.all(axis=1)
    else:
        target, counts = sample_tokens(target, box, grid=grid)
        if valid is not None:
            missing = (~valid[:, 0, :, None]).astype(jnp.float32)
            missing, _ = sample_tokens(missing, box, grid=grid)
            counts = counts & valid[:, 1] & (missing[..., 0] == 0)
    per_patch = optax.squared_error(predicted, target).mean(axis=-1)
    return (per_patch * counts).sum() / jnp.maximum(counts.sum(), 1)


def sample_tokens(
    tokens: Float[Array, "batch patches width"],
    box: Float[Array, "batch 4"],
    *,
    grid: tuple[int, int],
) -> tuple[Float[Array, "batch patches width"], Bool[Array, "batch patches"]]:
    """Samples a token map bilinearly at the patch centres of a box in it.

    Returns the values on a `grid` over the box, and a mask of the centres inside the
    map. Between the outermost patch centres and the map's edge, the value is constant.
    """
    rows, columns = grid
    weight_y, inside_y = _linear_weights(box[:, 0], box[:, 2], rows)
    weight_x, inside_x = _linear_weights(box[:, 1], box[:, 3], columns)
    tokens = rearrange(tokens, "b (h w) d -> b h w d", h=rows, w=columns)
    sampled = jnp.einsum("byh,bxw,bhwd->byxd", weight_y, weight_x, tokens)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    return (
        rearrange(sampled, "b y x d -> b (y x) d"),
        rearrange(inside, "b y x -> b (y x)"),
    )


def _linear_weights(start, stop, size):
    """[batch, size, size] weights of linear interpolation along one axis."""
    centre = (jnp.arange(size) + 0.5) / size
    centre = start[:, None] + (stop - start)[:, None] * centre[None]
    at = jnp.clip(centre * size - 0.5, 0, size - 1)
    distance = jnp.abs(at[..., None] - jnp.arange(size)[None, None])
    return jnp.maximum(0, 1 - distance), (centre >= 0) & (centre <= 1)

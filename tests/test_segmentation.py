"""Metrics of segmentation, and windows over images of any size."""

import tracemalloc

import numpy as np
import pytest
from sklearn import metrics

from xsmae.data.mask_classes import IGNORE
from xsmae.evaluation.segmentation.scores import METRICS, bootstrap, confusion, scores
from xsmae.evaluation.segmentation.windows import (
    Readable,
    segment,
    window_starts,
    window_weights,
)

CLASSES = 5


def some_pixels(rng, images=1, absent=()):
    """True and predicted classes with ignored pixels, and none of `absent`."""
    known = [c for c in range(CLASSES) if c not in absent]
    mask = rng.choice([*known, IGNORE], (images, 7, 9)).astype(np.uint8)
    guess = rng.choice(known, (images, 7, 9))
    right = rng.random(mask.shape) < 0.5
    return mask, np.where(right & (mask != IGNORE), mask, guess)


def plain_scores(matrix):
    """The metrics by a loop over the classes."""
    total, ious, recalls, weighted = matrix.sum(), [], [], 0.0
    for c in range(len(matrix)):
        right, true, found = matrix[c, c], matrix[c].sum(), matrix[:, c].sum()
        if true + found:
            ious.append(right / (true + found - right))
        if true:
            recalls.append(right / true)
            weighted += true / total * ious[-1]
    return {
        "miou": np.mean(ious),
        "accuracy": np.trace(matrix) / total,
        "mean_accuracy": np.mean(recalls),
        "weighted_iou": weighted,
    }


@pytest.mark.parametrize("absent", [(), (1,), (0, 4)])
def test_scores_equal_those_of_others(absent):
    mask, predicted = some_pixels(np.random.default_rng(0), absent=absent)
    matrix = confusion(mask[0], predicted[0], CLASSES)
    true, found = mask[mask != IGNORE], predicted[mask != IGNORE]
    labels = list(range(CLASSES))
    np.testing.assert_array_equal(
        matrix, metrics.confusion_matrix(true, found, labels=labels)
    )
    result = scores(matrix)
    known = [c for c in labels if c not in absent]
    np.testing.assert_allclose(
        result.iou[known],
        metrics.jaccard_score(true, found, labels=known, average=None),
    )
    assert np.isnan(result.iou[list(absent)]).all()
    assert result.miou == pytest.approx(
        metrics.jaccard_score(true, found, labels=known, average="macro")
    )
    assert result.weighted_iou == pytest.approx(
        metrics.jaccard_score(true, found, labels=known, average="weighted")
    )
    assert result.accuracy == pytest.approx(metrics.accuracy_score(true, found))
    assert result.mean_accuracy == pytest.approx(
        metrics.balanced_accuracy_score(true, found)
    )


def test_a_class_that_is_only_predicted_counts_in_miou_alone():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    result = scores(matrix)
    assert (result.miou, result.mean_accuracy) == (0.375, 0.75)
    assert (result.weighted_iou, result.accuracy) == (0.75, 0.75)
    np.testing.assert_array_equal(result.iou, [0.75, 0, np.nan])


def test_wrong_masks_are_refused():
    mask = np.array([[0, 3]])
    with pytest.raises(ValueError, match="classes 0 to 3, expected 0 to 2"):
        confusion(mask, np.zeros_like(mask), 3)
    with pytest.raises(ValueError, match="prediction with classes -1"):
        confusion(mask, np.array([[0, -1]]), 4)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        confusion(mask, np.zeros((1, 3), int), 4)
    ignored = np.full((1, 2), IGNORE)
    assert not confusion(ignored, mask, 2).any()
    with pytest.raises(ValueError, match="no pixel counts"):
        scores(confusion(ignored, mask, 2)[None])


def confusions(images, seed=0):
    mask, predicted = some_pixels(np.random.default_rng(seed), images, absent=(4,))
    return np.stack([confusion(*p, CLASSES) for p in zip(mask, predicted, strict=True)])


@pytest.mark.parametrize("scenes", [None, ["a", "b", "a", "c", "b", "d"]])
def test_intervals_equal_a_plain_bootstrap(scenes):
    each = confusions(6)
    found = bootstrap(each, seed=3, scenes=scenes, resamples=250)
    groups = each
    if scenes:
        names = sorted(set(scenes))
        groups = [sum(m for m, s in zip(each, scenes, strict=True) if s == n)
                  for n in names]  # fmt: skip
    rng, number = np.random.default_rng(3), len(groups)
    drawn = [rng.multinomial(number, [1 / number] * number) for _ in range(250)]
    plain = [
        plain_scores(sum(t * g for t, g in zip(times, groups, strict=True)))
        for times in drawn
    ]
    whole = scores(each)
    for name in METRICS:
        low, high = np.quantile([p[name] for p in plain], [0.025, 0.975])
        assert getattr(found.low, name) == pytest.approx(low)
        assert getattr(found.high, name) == pytest.approx(high)
        assert low < getattr(whole, name) < high
        assert getattr(whole, name) == pytest.approx(plain_scores(each.sum(0))[name])
    assert (found.low.iou[:4] < found.high.iou[:4]).all()
    assert np.isnan(found.low.iou[4])


def test_scenes_widen_the_interval_of_images_that_are_alike():
    each = np.repeat(confusions(8), 10, axis=0)
    alone = bootstrap(each, seed=0)
    together = bootstrap(each, seed=0, scenes=np.repeat(range(8), 10))
    widths = [i.high.miou - i.low.miou for i in (alone, together)]
    assert widths[1] > 2 * widths[0]


def test_images_without_a_pixel_do_not_count():
    each = confusions(5)
    each[1:] = 0
    found = bootstrap(each, seed=0, resamples=150)
    assert found.low.miou == found.high.miou == pytest.approx(scores(each).miou)


# Windows.


@pytest.mark.parametrize("length", [*range(1, 30), 100])
@pytest.mark.parametrize(("crop", "stride"), [(8, 8), (8, 5), (8, 1), (5, 4)])
def test_windows_cover_an_axis_once_each(length, crop, stride):
    starts = window_starts(length, crop, stride)
    assert len(starts) == max(length - crop + stride - 1, 0) // stride + 1
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == max(length - crop, 0)
    assert max(np.diff(starts), default=0) <= stride


def place_and_content(values, gsd):
    """Three classes that depend on the pixel, its place in the window and the GSD."""
    n, crop = values.shape[:2]
    rows, columns = np.mgrid[:crop, :crop]
    place = np.broadcast_to(rows * 3 + columns, (n, crop, crop))
    mean = np.broadcast_to(values[..., 0].mean((1, 2))[:, None, None], place.shape)
    return np.stack([values.sum(-1), place * gsd[:, :1, None], mean], axis=-1)


def brute_force(image, gsd, crop, overlap):
    """Every window in turn, on a canvas of the whole image."""
    height, width = image.shape[:2]
    stride = crop - overlap
    padded = np.pad(
        image,
        [(0, max(crop - height, 0)), (0, max(crop - width, 0)), (0, 0)],
        "edge",
    )
    sums, total = np.zeros((*padded.shape[:2], 3)), np.zeros(padded.shape[:2])
    tops, lefts = (
        sorted({min(k * stride, max(side - crop, 0)) for k in range(side)})
        for side in (height, width)
    )
    for top in tops:
        for left in lefts:
            window = padded[top : top + crop, left : left + crop]
            found = place_and_content(window[None], np.array([gsd]))[0]
            for i in range(crop):
                for j in range(crop):
                    weight = min(i + 1, crop - i, overlap + 1) * min(
                        j + 1, crop - j, overlap + 1
                    )
                    sums[top + i, left + j] += weight * found[i, j]
                    total[top + i, left + j] += weight
    return (sums / total[..., None])[:height, :width]


@pytest.mark.parametrize(
    "sizes",
    [
        [(20, 13)],
        [(9, 31)],
        [(6, 6)],
        [(3, 15), (15, 4), (2, 2), (1, 1)],
        [(6, 6), (7, 19), (12, 12), (6, 5)],
    ],
)
@pytest.mark.parametrize(("overlap", "batch_size"), [(0, 4), (2, 1), (4, 3), (5, 50)])
def test_blended_windows_equal_brute_force(sizes, overlap, batch_size):
    rng, crop = np.random.default_rng(0), 6
    arrays = [rng.normal(size=(*size, 2)).astype(np.float32) for size in sizes]
    gsds = [(1.0 + i, 0.5) for i in range(len(sizes))]
    calls, found = [], [[] for _ in sizes]

    def predict(values, gsd):
        calls.append(len(values))
        return place_and_content(values, gsd)

    for strip in segment(
        map(Readable.of, arrays, gsds),
        predict,
        crop=crop,
        overlap=overlap,
        batch_size=batch_size,
    ):
        assert strip.top == sum(map(len, found[strip.image]))
        assert strip.scores.dtype == np.float32
        found[strip.image].append(strip.scores)
    assert max(calls) <= batch_size
    assert all(size == batch_size for size in calls[:-1])
    for array, gsd, strips in zip(arrays, gsds, found, strict=True):
        expected = brute_force(array, gsd, crop, overlap)
        np.testing.assert_allclose(
            np.concatenate(strips), expected, rtol=1e-4, atol=1e-5
        )


def test_no_window_is_computed_twice():
    asked = []

    def read(top, left, height, width):
        asked.append((top, left))
        return np.zeros((height, width, 1))

    image = Readable(23, 17, (1.0, 1.0), read)
    list(segment([image], place_and_content, crop=8, overlap=3, batch_size=4))
    assert len(asked) == len(set(asked)) == 4 * 3


def test_the_memory_is_that_of_a_strip():
    width, crop = 64, 16

    def read(top, left, height, width):
        return np.ones((height, width, 3), np.float32)

    def peak(height):
        image = Readable(height, width, (1.0, 1.0), read)
        tracemalloc.start()
        for strip in segment(
            [image], place_and_content, crop=crop, overlap=4, batch_size=4
        ):
            assert len(strip.scores) <= crop
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(6400) < 1.5 * peak(320) < 6400 * width * 3 * 4


def test_the_weights_of_windows():
    np.testing.assert_array_equal(window_weights(4, 0), [1, 1, 1, 1])
    np.testing.assert_allclose(
        window_weights(6, 2), np.array([1, 2, 3, 3, 2, 1]) / 3, rtol=1e-6
    )
    for overlap in (-1, 4):
        with pytest.raises(ValueError, match=f"overlap={overlap}"):
            list(segment([], None, crop=4, overlap=overlap, batch_size=1))

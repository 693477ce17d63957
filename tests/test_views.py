"""Boxes, crops and their GSD: views show the ground that their boxes say."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmae.data.synthetic.source import CLASS_NAMES, Scene
from xsmae.data.views import Box, ViewSampler, cut, draw_box

SETTINGS = {
    "num_views": 2,
    "size": 16,
    "area": (0.25, 1.0),
    "area2": (0.25, 0.75),
    "ratio": (3 / 4, 4 / 3),
    "area_distribution": "log_uniform",
    "view2_from": "source",
    "view2_box": "sample",
    "interpolation": "bicubic",
    "interpolation2": "bilinear",
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
}
VARIANTS = list(itertools.product(("source", "view1"), ("sample", "batch")))
UNIT = Box(0.0, 0.0, 1.0, 1.0)


def sample(image, gsd=1.0, seed=0, batch_seed=0, **changes):
    """One sample of a sampler with SETTINGS and `changes`."""
    return ViewSampler(**{**SETTINGS, **changes})(
        image,
        gsd,
        rng=np.random.default_rng((seed, 0)),
        batch_rng=np.random.default_rng((batch_seed, 1)),
    )


def ranges(low, high):
    ends = st.tuples(st.floats(low, high), st.floats(low, high))
    return ends.map(lambda pair: tuple(sorted(pair)))


def inside(inner, outer, slack=1e-3):
    """True if a box (4 numbers) lies in another, up to float32 rounding."""
    inner, outer = np.asarray(inner), np.asarray(outer)
    starts = (inner[..., :2] >= outer[..., :2] - slack).all()
    return starts and (inner[..., 2:] <= outer[..., 2:] + slack).all()


@st.composite
def boxes(draw):
    frame = UNIT
    top, bottom = sorted((draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))))
    left, right = sorted((draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))))
    return Box(top, left, bottom + 0.1, right + 0.1).within(frame, UNIT)


def assert_same(box, other):
    np.testing.assert_allclose(
        dataclasses.astuple(box), dataclasses.astuple(other), rtol=0, atol=1e-9
    )


# Boxes


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(st.floats(1, 500), st.floats(1, 500)),
    st.tuples(st.floats(0, 99), st.floats(0, 99)),
    ranges(0.01, 1),
    ranges(0.2, 5),
    st.sampled_from(["uniform", "log_uniform"]),
)
def test_drawn_boxes_lie_in_their_frame_and_ranges(
    seed, sides, corner, area, ratio, distribution
):
    frame = Box(*corner, corner[0] + sides[0], corner[1] + sides[1])
    box = draw_box(
        np.random.default_rng(seed),
        frame,
        area=area,
        ratio=ratio,
        distribution=distribution,
    )
    assert inside(box.to_array(), frame.to_array())
    assert box.height > 0
    assert ratio[0] * 0.999 <= box.width / box.height <= ratio[1] * 1.001
    fraction = box.height * box.width / (frame.height * frame.width)
    # The fallback is as large as the frame allows.
    fallback = math.isclose(box.height, frame.height) or math.isclose(
        box.width, frame.width
    )
    assert fallback or area[0] * 0.999 <= fraction <= area[1] * 1.001


def test_box_that_never_fits_is_the_largest_central_one():
    draw = {"area": (1.0, 1.0), "ratio": (1.0, 1.0), "distribution": "uniform"}
    rng = np.random.default_rng(0)
    wide, tall = Box(0, 0, 10, 40), Box(5, 0, 45, 10)
    assert draw_box(rng, wide, **draw) == Box(0, 15, 10, 25)
    assert draw_box(rng, tall, **draw) == Box(20, 0, 30, 10)
    assert draw_box(rng, Box(1, 2, 31, 32), **draw) == Box(1, 2, 31, 32)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_areas_are_distributed_as_said(distribution):
    low, high = 0.05, 0.5
    rng = np.random.default_rng(1)
    drawn = [
        draw_box(
            rng,
            Box(0, 0, 7, 7),
            area=(low, high),
            ratio=(1, 1),
            distribution=distribution,
        )
        for _ in range(3000)
    ]
    fractions = np.sort([box.height * box.width / 49 for box in drawn])
    expected = {
        "uniform": (fractions - low) / (high - low),
        "log_uniform": np.log(fractions / low) / np.log(high / low),
    }
    empirical = (np.arange(3000) + 0.5) / 3000
    # Kolmogorov-Smirnov test: 1.63 / sqrt(n) is the 1% level.
    distance = {k: np.abs(v - empirical).max() for k, v in expected.items()}
    assert distance.pop(distribution) < 1.63 / math.sqrt(3000)
    assert min(distance.values()) > 0.1


@given(boxes(), boxes(), boxes())
def test_a_box_in_a_box_in_a_box(first, second, third):
    inner = second.within(first, UNIT)
    assert inside(inner.to_array(), first.to_array())
    assert_same(
        third.within(inner, UNIT), third.within(second, UNIT).within(first, UNIT)
    )
    assert_same(UNIT.within(first, UNIT), first)
    assert_same(
        first.within(UNIT, Box(0, 0, 2, 4)).within(Box(0, 0, 2, 4), UNIT), first
    )


@given(boxes(), boxes(), st.booleans(), st.booleans())
def test_mirroring(frame, box, vertical, horizontal):
    how = {"vertical": vertical, "horizontal": horizontal}
    placed = box.within(frame, UNIT)
    mirrored = placed.mirrored(frame, **how)
    assert inside(mirrored.to_array(), frame.to_array())
    assert_same(mirrored.mirrored(frame, **how), placed)
    assert_same(mirrored, box.mirrored(UNIT, **how).within(frame, UNIT))
    assert math.isclose(mirrored.height, placed.height, abs_tol=1e-9)


def test_mirrored_axes():
    frame, box = Box(0, 0, 10, 20), Box(1, 2, 4, 9)
    assert box.mirrored(frame, vertical=True, horizontal=False) == Box(6, 2, 9, 9)
    assert box.mirrored(frame, vertical=False, horizontal=True) == Box(1, 11, 4, 18)


# Views


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(8, 90), st.integers(8, 90)),
    st.floats(0.1, 30),
    st.sampled_from(VARIANTS),
)
def test_views_and_what_they_say(seed, shape, gsd, variant):
    view2_from, view2_box = variant
    image = np.zeros((*shape, 3), np.uint8)
    got = sample(image, gsd, seed, view2_from=view2_from, view2_box=view2_box)
    assert got["image"].shape == (2, 16, 16, 3)
    assert got["image"].dtype == np.uint8
    first, second = got["box"]
    assert inside(first, [0, 0, *shape], slack=0)
    assert inside(second, first)
    sides = got["box"][:, 2:] - got["box"][:, :2]
    np.testing.assert_allclose(got["gsd"], gsd * sides / 16, rtol=1e-4)
    area = np.prod(sides, axis=1)
    whole = np.isclose(sides[0], shape, rtol=1e-5).any()
    assert whole or 0.2499 < area[0] / np.prod(shape) < 1.0001
    whole = np.isclose(sides[1], sides[0], rtol=1e-5).any()
    assert whole or 0.2499 < area[1] / area[0] < 0.7501


def ramp(height, width):
    """Pixels whose first channel is their row and whose second is their column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(60, 250), st.integers(60, 250)),
    st.sampled_from(VARIANTS),
    st.tuples(st.booleans(), st.booleans()),
)
def test_pixels_are_of_the_ground_that_the_box_says(seed, shape, variant, flip):
    view2_from, view2_box = variant
    vertical, horizontal = flip
    got = sample(
        ramp(*shape),
        seed=seed,
        size=32,
        view2_from=view2_from,
        view2_box=view2_box,
        vertical_flip=float(vertical),
        horizontal_flip=float(horizontal),
    )
    np.testing.assert_array_equal(got["flip"], flip)
    for view, box in zip(got["image"], got["box"], strict=True):
        steps = (np.arange(32) + 0.5) / 32
        # The ramp gives a pixel's value at its centre, half a pixel from its edge.
        y = box[0] + (1 - steps if vertical else steps) * (box[2] - box[0]) - 0.5
        x = box[1] + (1 - steps if horizontal else steps) * (box[3] - box[1]) - 0.5
        np.testing.assert_allclose(view[..., 0].mean(), y.mean(), atol=0.8)
        np.testing.assert_allclose(view[..., 1].mean(), x.mean(), atol=0.8)
        # Per pixel, rounding adds half a grey level. At the image's rim, where the
        # filter is cut off, the error is a part of an output pixel larger.
        rim = max(box[2] - box[0], box[3] - box[1]) / 32
        np.testing.assert_allclose(view[..., 0].mean(1), y, atol=1.1 + rim)
        np.testing.assert_allclose(view[..., 1].mean(0), x, atol=1.1 + rim)


def test_cut_takes_whole_pixels_as_they_are():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        pixels = cut(image, Box(4, 7, 12, 15), 8, interpolation)
        np.testing.assert_array_equal(pixels, image[4:12, 7:15])


def test_cut_is_antialiased():
    checkerboard = np.indices((128, 128)).sum(0) % 2 * 255
    image = np.repeat(checkerboard[..., None], 3, axis=-1).astype(np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        pixels = cut(image, Box(3.3, 1.7, 123.3, 121.7), 16, interpolation)
        np.testing.assert_allclose(pixels, 127.5, atol=4)


def test_edges_a_hair_outside_are_taken():
    image = ramp(10, 10)
    box = Box(-1e-13, -1e-13, 10 + 1e-13, 10 + 1e-13)
    np.testing.assert_array_equal(cut(image, box, 10, "bilinear"), image)


def test_view_2_from_view_1_is_made_of_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    both = {"view2_from": "view1", "interpolation2": "bicubic"}
    got = sample(image, area2=(1.0, 1.0), ratio=(1.0, 1.0), **both)
    np.testing.assert_array_equal(got["image"][1], got["image"][0])
    # View 2 from view 1 has no detail finer than view 1's pixels.
    small = {"area2": (0.1, 0.1), "ratio": (1.0, 1.0), "area": (1.0, 1.0)}
    blurred = sample(image, **small, **both)["image"][1]
    fresh = sample(image, **small)["image"][1]
    assert blurred.std() < 0.7 * fresh.std()


def test_one_view():
    got = sample(ramp(20, 20), num_views=1)
    assert {k: v.shape for k, v in got.items()} == {
        "image": (1, 16, 16, 3),
        "box": (1, 4),
        "gsd": (1, 2),
        "flip": (2,),
    }


def test_effective_gsd_is_log_uniform_in_the_range_of_the_docstring():
    image = np.zeros((40, 40, 3), np.uint8)
    drawn = [
        sample(image, 0.5, seed, num_views=1, size=4, area=(0.04, 0.36))["gsd"][0]
        for seed in range(1000)
    ]
    gsds = np.sort(np.sqrt(np.prod(drawn, axis=1)))
    low, high = (0.5 * math.sqrt(a * 40 * 40) / 4 for a in (0.04, 0.36))
    assert low * 0.999 <= gsds[0]
    assert gsds[-1] <= high * 1.001
    uniform = np.log(gsds / low) / np.log(high / low)
    distance = np.abs(uniform - (np.arange(1000) + 0.5) / 1000).max()
    assert distance < 1.63 / math.sqrt(1000)


def test_draws_depend_on_their_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    first, again, other = (sample(image, seed=seed) for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["box"], other["box"])


def test_batch_box_is_one_place_in_view_1_as_displayed():
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)

    def places(batch_seed):
        for seed in range(8):
            got = sample(image, 1.0, seed, batch_seed, view2_box="batch")
            (vertical, horizontal), (first, second) = got["flip"], got["box"]
            start = (second[:2] - first[:2]) / (first[2:] - first[:2])
            stop = (second[2:] - first[:2]) / (first[2:] - first[:2])
            mirror = np.array([vertical, horizontal])
            yield np.where(mirror, 1 - stop, start)

    one, other = list(places(1)), list(places(2))
    np.testing.assert_allclose(one, [one[0]] * 8, atol=1e-5)
    assert np.abs(one[0] - other[0]).max() > 0.01


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
@pytest.mark.parametrize("box", [Box(16, 40, 144, 168), Box(16, 40, 112, 168)])
def test_world_through_the_crop_is_the_crop_of_the_render(label, box):
    scene = Scene(seed=5, index=label, label=label)
    fine = scene.render(top=-48, left=-48, height=192, width=192, gsd=0.5)
    crop = cut(fine, box, 32, "bicubic").astype(float)
    gsd = (0.5 * box.height / 32, 0.5 * box.width / 32)

    def difference(rows):
        top = -48 + 0.5 * box.top + rows * gsd[0]
        left = -48 + 0.5 * box.left
        ground = scene.render(top=top, left=left, height=32, width=32, gsd=gsd)
        return np.abs(crop - ground).mean()

    assert difference(0) < 4  # grey levels
    assert difference(0) < difference(1) / 1.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("area_distribution", "normal"),
        ("view2_from", "view2"),
        ("view2_box", "epoch"),
        ("interpolation", "nearest"),
        ("interpolation2", "BICUBIC"),
        ("area", (0.0, 1.0)),
        ("area", (0.5, 1.1)),
        ("area", (0.5, 0.4)),
        ("area", (0.5,)),
        ("area2", (-0.1, 0.5)),
        ("area2", (math.nan, 0.5)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (1.0, math.inf)),
        ("horizontal_flip", 1.5),
        ("vertical_flip", -0.1),
        ("vertical_flip", math.nan),
        ("size", 0),
        ("size", -16),
    ],
)
def test_bad_settings_name_their_field(field, value):
    with pytest.raises(ValueError, match=rf"views\.{field}=") as caught:
        ViewSampler(**{**SETTINGS, field: value})
    assert "\n" not in str(caught.value)
    assert str(value) in str(caught.value)

"""The built-in world: reproducible, true to scale, and not too easy."""

import concurrent.futures
import hashlib
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmae.data.synthetic.canvas import LAND
from xsmae.data.synthetic.labelled import LandSource
from xsmae.data.synthetic.source import CLASS_NAMES, Scene, SyntheticSource
from xsmae.errors import UserError

# Change this only together with GENERATOR_VERSION.
DIGEST = "2b7b539f0eebb3e3"

PRINT_DIGEST = """
import hashlib
from xsmae.data.synthetic.source import SyntheticSource
source = SyntheticSource(20, seed=3, size=48)
print(hashlib.sha256(b"".join(r.image.tobytes() for r in source)).hexdigest()[:16])
"""


def _digest(source: SyntheticSource) -> str:
    images = b"".join(source[i].image.tobytes() for i in range(len(source)))
    return hashlib.sha256(images).hexdigest()[:16]


def _box_average(image: np.ndarray, side: int) -> np.ndarray:
    rows, columns = image.shape[0] // side, image.shape[1] // side
    return image.reshape(rows, side, columns, side, 3).mean((1, 3), dtype=float)


def test_records_follow_the_source_protocol():
    source = SyntheticSource(30, size=40)
    assert len(bytes.fromhex(source.fingerprint)) == 8
    assert len(source) == 30
    assert source.class_names == CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    record = source[7]
    assert (record.image.shape, record.image.dtype) == ((40, 40, 3), np.uint8)
    assert (record.label, record.id) == (source.labels[7], source.id(7))
    assert len({source.id(i) for i in range(30)}) == 30
    for index in (-1, 30):
        with pytest.raises(IndexError):
            source[index]


def test_the_same_bits_in_every_instance_and_process():
    here = _digest(SyntheticSource(20, seed=3, size=48))
    there = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert here == there.stdout.strip() == DIGEST


def test_any_order_cache_and_pickle_give_the_same_images():
    plain, none = SyntheticSource(8, size=32), SyntheticSource(8, size=32, cache_mib=0)
    expected = [plain[i].image for i in range(8)]
    assert plain[3].image is expected[3]  # kept
    assert none[3].image is not none[3].image
    two = SyntheticSource(8, size=32, cache_mib=2.5 * 3 * 32**2 / 2**20)
    for i in (*range(7, -1, -1), *range(8)):
        np.testing.assert_array_equal(two[i].image, expected[i])
        np.testing.assert_array_equal(none[i].image, expected[i])
    assert len(two._rendered) == 2
    loaded = pickle.loads(pickle.dumps(plain))
    assert not len(loaded._rendered)
    assert loaded.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(loaded[5].image, expected[5])


def test_reader_threads_see_the_same_images():
    source = SyntheticSource(12, size=32)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: source[i % 12].image, range(48)))
    fresh = SyntheticSource(12, size=32)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(image, fresh[i % 12].image)


def test_labels_are_balanced_shuffled_and_a_prefix_of_a_longer_source():
    source = SyntheticSource(1000)
    assert source.labels.dtype == np.int64
    assert np.bincount(source.labels).tolist() == [100] * 10
    assert len(np.unique(source.labels.reshape(-1, 10), axis=0)) > 90
    short = SyntheticSource(15, size=32)
    longer = SyntheticSource(400, size=32)
    np.testing.assert_array_equal(short.labels, longer.labels[:15])
    np.testing.assert_array_equal(short[14].image, longer[14].image)


def test_gsds_are_log_uniform_in_their_range():
    source = SyntheticSource(400, gsd=0.5, gsd_spread=2)
    octaves = np.log2([source.image_gsd(i) / 0.5 for i in range(400)])
    assert np.histogram(octaves, 4, (-1, 1))[0].min() > 70
    assert np.abs(octaves).max() <= 1.0001
    assert SyntheticSource(3, gsd=0.7, gsd_spread=1).image_gsd(2) == 0.7


def test_another_seed_is_another_world():
    one, two = (SyntheticSource(10, seed=seed, size=32) for seed in (0, 1))
    assert not set(map(one.id, range(10))) & set(map(two.id, range(10)))
    for label in range(10):
        (i,), (j,) = (np.flatnonzero(s.labels == label) for s in (one, two))
        assert np.abs(one[i].image.astype(int) - two[j].image).mean() > 3


def test_fingerprint_and_repr_change_with_every_argument():
    arguments = {"num_images": 20, "seed": 1, "size": 64, "gsd": 0.5, "gsd_spread": 3}
    changed = [{}] + [{name: value} for name, value in arguments.items()]
    sources = [SyntheticSource(**({"num_images": 10} | c)) for c in changed]
    assert len({s.fingerprint for s in sources}) == len({repr(s) for s in sources}) == 6
    assert SyntheticSource(10, cache_mib=1).fingerprint == sources[0].fingerprint


@settings(max_examples=60, deadline=None)
@given(
    label=st.integers(0, 9),
    index=st.integers(0, 10**6),
    gsd=st.tuples(st.floats(0.1, 6), st.floats(0.1, 6)),
    corner=st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
    cut=st.tuples(*[st.integers(0, 19)] * 4),
)
def test_crop_of_render_is_render_of_crop(label, index, gsd, corner, cut):
    scene = Scene(0, index, label)
    (top, left), (y, x, below, beside) = corner, cut
    whole = scene.render(top=top, left=left, height=40, width=40, gsd=gsd)
    part = scene.render(
        top=top + y * gsd[0],
        left=left + x * gsd[1],
        height=40 - y - below,
        width=40 - x - beside,
        gsd=gsd,
    )
    np.testing.assert_array_equal(part, whole[y : 40 - below, x : 40 - beside])


def test_a_large_render_painted_in_strips_has_no_seams():
    scene = Scene(0, 0, CLASS_NAMES.index("residential"))
    whole = scene.render(top=0, left=0, height=300, width=300, gsd=1)
    part = scene.render(top=80, left=150, height=150, width=20, gsd=1)
    np.testing.assert_array_equal(whole[80:230, 150:170], part)


@pytest.mark.parametrize("label", range(10), ids=CLASS_NAMES)
@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("gsd", [0.5, 1.3])
def test_coarser_render_is_the_area_average_of_the_finer(label, times, gsd):
    for index in range(3):
        window = {"top": -40, "left": -30}
        scene = Scene(7, index, label)
        fine = scene.render(**window, height=96, width=96, gsd=gsd)
        side = 96 // times
        coarse = scene.render(**window, height=side, width=side, gsd=gsd * times)
        error = np.abs(_box_average(fine, times) - coarse)
        assert error.mean() < 3  # grey levels; a pixel's shift gives about 10
        wrong_place = np.abs(_box_average(np.roll(fine, times, 0), times) - coarse)
        assert error.mean() < 0.7 * wrong_place.mean()


def test_pixels_may_be_oblong():
    scene = Scene(7, 1, CLASS_NAMES.index("river"))
    fine = scene.render(top=0, left=0, height=64, width=64, gsd=0.8)
    oblong = scene.render(top=0, left=0, height=32, width=64, gsd=(1.6, 0.8))
    average = fine.reshape(32, 2, 64, 3).mean(1)
    assert np.abs(average - oblong).mean() < 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_images", 0), ("num_images", 2.5), ("seed", -1), ("size", 31)]
    + [("gsd", bad) for bad in (0, -1, 1e9, float("nan"), float("inf"))]
    + [("gsd_spread", 0.5), ("gsd_spread", float("nan")), ("cache_mib", -1)],
)
def test_bad_argument_is_one_line_that_names_it(name, value):
    with pytest.raises(UserError, match=name) as error:
        SyntheticSource(**({"num_images": 10} | {name: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"gsd": 0}, {"gsd": (1, float("nan"))}, {"height": 0}, {"width": -3}]
)
def test_bad_window_is_refused(bad):
    window = {"top": 0, "left": 0, "height": 8, "width": 8, "gsd": 1.0}
    with pytest.raises(UserError):
        Scene(0, 0, 0).render(**(window | bad))


@pytest.fixture(scope="module")
def two_worlds() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of two worlds: the bank, and the images to classify."""
    sources = SyntheticSource(600, seed=0), SyntheticSource(200, seed=1)
    return [(np.stack([r.image for r in s]), s.labels) for s in sources]


def _statistics(images: np.ndarray) -> np.ndarray:
    """Mean, std, min and max per channel."""
    pixels = images.reshape(len(images), -1, 3)
    functions = np.mean, np.std, np.min, np.max
    return np.concatenate([f(pixels, axis=1) for f in functions], axis=1)


def _thumbnail(images: np.ndarray) -> np.ndarray:
    small = images.reshape(len(images), 8, 12, 8, 12, 3).mean((2, 4))
    return small.reshape(len(images), -1)


def _mean_colour(images: np.ndarray) -> np.ndarray:
    return images.mean((1, 2))


@pytest.mark.parametrize(
    ("control", "most"), [(_statistics, 0.46), (_thumbnail, 0.42), (_mean_colour, 0.32)]
)
def test_colour_and_contrast_do_not_tell_the_classes(two_worlds, control, most):
    """kNN (k = 20, cosine, exp(sim / 0.07)); the quickstart's bank adds 8 points."""
    (bank, labels), (queries, expected) = two_worlds
    features = control(bank), control(queries)
    mean, std = features[0].mean(0), features[0].std(0)
    units = [(f - mean) / std for f in features]
    units = [u / np.linalg.norm(u, axis=1, keepdims=True) for u in units]
    similarity = units[1] @ units[0].T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.07)
    votes = (weights[:, :, None] * np.eye(10)[labels[nearest]]).sum(1)
    accuracy = np.mean(votes.argmax(1) == expected)
    assert 0.15 < accuracy < most  # 0.1 is chance


def _land(scene: Scene, side: int, gsd: float) -> np.ndarray:
    half = side * gsd / 2
    window = {"top": -half, "left": -half, "height": side, "width": side}
    return scene.render_land(**window, gsd=gsd)


def test_land_shows_what_the_scene_is_named_after():
    source = SyntheticSource(40, seed=5)
    expected = {
        "annual_crop": "field", "forest": "tree", "lake": "water", "meadow": "grass",
        "parking": "paved",
    }  # fmt: skip
    shares = {name: np.zeros(len(LAND)) for name in CLASS_NAMES}
    for index in range(40):
        scene = source.scene(index)
        counts = np.bincount(_land(scene, 48, 1.0).ravel(), minlength=len(LAND))
        shares[scene.class_name] += counts / (4 * 48**2)
    for name, land in expected.items():
        assert LAND[shares[name].argmax()] == land, (name, shares[name])
    for land, names in (
        ("building", ("industrial", "residential")),
        ("water", ("lake", "river")),
    ):
        where = {n for n in CLASS_NAMES if shares[n][LAND.index(land)] > 0.03}
        assert where == set(names), land
    assert (sum(shares.values()) > 0.01).all()


def test_land_is_that_of_the_same_pixels_in_any_window():
    scene = Scene(seed=2, index=3, label=CLASS_NAMES.index("residential"))
    window = {"top": -20.0, "left": -32.0, "height": 80, "width": 96, "gsd": 0.5}
    whole = scene.render_land(**window)
    part = scene.render_land(top=-12, left=-22, height=30, width=40, gsd=0.5)
    np.testing.assert_array_equal(part, whole[16:46, 20:60])
    # Roofs and streets have edges in the image where the classes change.
    image = scene.render(**window).astype(float).mean(axis=2)
    step = np.abs(np.diff(image, axis=1))
    edge = np.diff(whole.astype(int), axis=1) != 0
    assert step[edge].mean() > 3 * step[~edge].mean()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_coarse_land_is_the_majority_of_the_fine_land(name):
    scene = Scene(seed=4, index=1, label=CLASS_NAMES.index(name))
    fine, coarse = _land(scene, 160, 0.5), _land(scene, 40, 2.0)
    blocks = fine.reshape(40, 4, 40, 4).transpose(0, 2, 1, 3).reshape(40, 40, 16)
    counts = (blocks[..., None] == np.arange(len(LAND))).sum(axis=2)
    assert (counts.argmax(axis=-1) == coarse).mean() > 0.85
    clear = counts.max(axis=-1) >= 13
    assert (counts.argmax(axis=-1) == coarse)[clear].mean() > 0.99


def test_the_source_of_land_has_images_with_masks():
    images, source = (
        SyntheticSource(12, seed=3, size=40),
        LandSource(12, seed=3, size=40),
    )
    assert source.class_names == LAND
    assert len(source.colours) == len(LAND)
    assert (len(source), source.dtype) == (12, "uint8")
    for index in (0, 7):
        record, gsd = source[index], images.image_gsd(index)
        np.testing.assert_array_equal(record.image, images[index].image)
        np.testing.assert_array_equal(record.mask, _land(images.scene(index), 40, gsd))
        assert (record.gsd, record.id) == ((gsd, gsd), images.id(index))
        assert source[index].mask is record.mask
    assert len({source.scene(i) for i in range(12)}) == 12
    again = pickle.loads(pickle.dumps(source))
    assert (again.fingerprint, again[7].mask.tolist()) == (
        source.fingerprint, source[7].mask.tolist(),
    )  # fmt: skip
    assert source.fingerprint not in (images.fingerprint, LandSource(12).fingerprint)

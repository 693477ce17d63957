"""Features of whole images, the kNN vote, the kNN monitor and its controls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.encoders import mean_colour
from tests.support.sources import ColourSource
from xsmae.data.records import Record
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    extract,
    image_statistics,
    read_images,
    spread,
    square,
    standardize,
)
from xsmae.evaluation.tasks import knn
from xsmae.evaluation.tasks.knn import KnnMonitor, knn_predict, normalize


def says_nothing(images, gsd):
    return {"cls": np.ones((len(images), 2)), "mean": np.zeros((len(images), 2))}


# The vote


def brute_force(bank, labels, queries, classes, k, temperature):
    """Wu et al. 2018: the k most similar by cosine vote with exp(sim / t)."""
    predicted = []
    for query in queries.astype(np.float64):
        norms = np.linalg.norm(bank, axis=1) * np.linalg.norm(query)
        similarity = bank @ query / norms
        votes = np.zeros(classes)
        for index in np.argsort(-similarity)[:k]:
            votes[labels[index]] += np.exp(similarity[index] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_vote_is_brute_force(k, temperature, chunk):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 5)), rng.normal(size=(23, 5))
    labels = rng.integers(0, 4, 60)
    found = knn_predict(
        bank,
        labels,
        queries,
        num_classes=4,
        k=k,
        temperature=temperature,
        chunk=chunk,
    )
    expected = brute_force(bank, labels, queries, 4, k, temperature)
    np.testing.assert_array_equal(found, expected)


def angles(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.005, 1), (0.07, 1), (100.0, 0)]
)
def test_the_weight_is_exp_of_similarity_over_temperature(temperature, expected):
    """One close neighbour against two far ones at 40 degrees: 1 - cos 40 = 0.234."""
    found = knn_predict(
        angles(0, 40, -40),
        [1, 0, 0],
        angles(0),
        num_classes=2,
        k=3,
        temperature=temperature,
    )
    assert found == [expected]


def test_the_weights_balance_at_ln_2():
    """Two votes at 40 degrees equal one at 0 degrees if t = (1 - cos 40) / ln 2."""
    balance = (1 - np.cos(np.deg2rad(40))) / np.log(2)
    votes = {
        factor: int(
            knn_predict(
                angles(0, 40, -40),
                [1, 0, 0],
                angles(0),
                num_classes=2,
                k=3,
                temperature=factor * balance,
            )[0]
        )
        for factor in (0.99, 1.01)
    }
    assert votes == {0.99: 1, 1.01: 0}


def test_a_bank_smaller_than_k_votes_whole():
    bank, labels = angles(0, 5, 100), [0, 0, 1]
    kwargs = {"num_classes": 2, "temperature": 100.0}
    queries = angles(100, 0)
    assert knn_predict(bank, labels, queries, k=20, **kwargs).tolist() == [0, 0]
    assert knn_predict(bank, labels, queries, k=1, **kwargs).tolist() == [1, 0]


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_the_length_of_a_feature_does_not_matter(bank_scale, query_scale):
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(30, 4)), rng.normal(size=(9, 4))
    labels = rng.integers(0, 3, 30)
    kwargs = {"num_classes": 3, "k": 5}
    np.testing.assert_array_equal(
        knn_predict(bank * bank_scale, labels, queries * query_scale, **kwargs),
        knn_predict(bank, labels, queries, **kwargs),
    )


def test_normalize_keeps_zero_vectors():
    unit = np.asarray(normalize(np.array([[3.0, 4.0], [0.0, 0.0]])))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]], rtol=1e-6)


# Whole images


@given(st.integers(1, 300), st.integers(0, 300))
def test_spread(total, most):
    found = spread(total, most)
    assert len(found) == (min(total, most) or total)
    assert found[0] == 0
    assert found[-1] < total
    steps = np.diff(found)
    assert (steps >= 1).all()
    assert np.ptp(steps) <= 1 if len(steps) else True


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_square_is_central_and_keeps_account_of_the_gsd(shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    same, gsd = square(image, 0.3, 40)
    top, left = (shape[0] - 40) // 2, (shape[1] - 40) // 2
    np.testing.assert_array_equal(same, image[top : top + 40, left : left + 40])
    assert gsd == 0.3
    small, gsd = square(image, 0.3, 10)
    assert small.shape == (10, 10, 3)
    assert gsd == pytest.approx(0.3 * 4)
    np.testing.assert_allclose(small.mean((0, 1)), same.mean((0, 1)), atol=0.6)
    assert square(image, 0.3, 80)[1] == pytest.approx(0.15)


def test_square_is_antialiased():
    image = (np.indices((64, 64)).sum(0) % 2 * 255)[..., None].repeat(3, -1)
    np.testing.assert_allclose(square(image.astype(np.uint8), 1.0, 8)[0], 127.5, atol=4)


def test_images_are_read_in_order_and_bad_ones_left_out():
    source = ColourSource(10, bad=[1, 4, 5])
    found = list(read_images(source, np.arange(9, -1, -1), size=6, batch_size=4))
    assert [batch.index.tolist() for batch in found] == [[9, 8, 7, 6], [3, 2], [0]]
    for batch in found:
        np.testing.assert_array_equal(batch.labels, batch.index % 3)
        # 12 pixels become 6, so the GSD (1 + index) doubles.
        expected = 2.0 * (1 + batch.index[:, None]).repeat(2, axis=1)
        np.testing.assert_allclose(batch.gsd, expected)
        for image, index in zip(batch.images, batch.index, strict=True):
            expected, _ = square(source[index].image, 1.0, 6)
            np.testing.assert_array_equal(image, expected)


def test_batch_of_bad_images_alone_is_left_out():
    source = ColourSource(8, bad=range(4))
    found = list(read_images(source, np.arange(8), size=6, batch_size=4))
    assert [batch.index.tolist() for batch in found] == [[4, 5, 6, 7]]


def test_images_without_labels():
    class Unlabelled(ColourSource):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return Record(record.image, record.gsd, None, record.id)

    (batch,) = read_images(Unlabelled(2), np.arange(2), size=6, batch_size=4)
    assert batch.labels.tolist() == [-1, -1]


def test_features_in_order_and_encode_sees_one_shape():
    seen = []

    def encode(images, gsd):
        seen.append((images.shape, gsd.shape))
        assert (gsd > 0).all()  # also the padding
        return {"gsd": gsd, "sum": images.sum((1, 2, 3))}

    source = ColourSource(11, bad=[2])
    indices = np.array([10, 3, 2, 7, 0, 1, 5])
    features, labels = extract(encode, source, indices, size=6, batch_size=4)
    assert seen == [((4, 6, 6, 3), (4, 2))] * 2
    good = np.array([10, 3, 7, 0, 1, 5])
    np.testing.assert_array_equal(labels, good % 3)
    np.testing.assert_allclose(features["gsd"][:, 0], 2 * (1 + good))
    sums = [square(source[i].image, 1.0, 6)[0].sum() for i in good]
    np.testing.assert_array_equal(features["sum"], sums)


def test_the_size_of_the_batch_does_not_matter():
    source, indices = ColourSource(11), np.arange(11)
    one, labels = extract(image_statistics, source, indices, size=6, batch_size=4)
    other, again = extract(image_statistics, source, indices, size=6, batch_size=11)
    np.testing.assert_array_equal(one["statistics"], other["statistics"])
    np.testing.assert_array_equal(labels, again)


def test_no_usable_image_is_told():
    source = ColourSource(3, bad=range(3))
    with pytest.raises(UserError, match=r"none of the 3 images .* ColourSource\(3\)"):
        extract(mean_colour, source, np.arange(3), size=6, batch_size=2)


def test_image_statistics():
    images = np.zeros((2, 2, 2, 3), np.uint8)
    images[1, ..., 0] = [[0, 10], [20, 30]]
    images[1, ..., 2] = 255
    found = image_statistics(images, np.ones((2, 2)))["statistics"]
    std = np.sqrt(125)
    expected = [15, 0, 255, std, 0, 0, 0, 0, 255, 30, 0, 255]
    np.testing.assert_allclose(found, [[0] * 12, expected], rtol=1e-6)


def test_standardize_by_the_numbers_of_the_training_part():
    train = np.array([[0.0, 5], [2, 5], [4, 5]])
    scaled, test = standardize(train, np.array([[2.0, 5], [10, 5]]))
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled.std(0), [1, 0], atol=1e-5)
    np.testing.assert_allclose(test, [[0, 0], [8 / np.sqrt(8 / 3), 0]], rtol=1e-5)


# The monitor


def monitor(train=None, test=None, **changes):
    arguments = {
        "size": 8,
        "k": 5,
        "temperature": 0.07,
        "max_train": 0,
        "max_test": 0,
        "batch_size": 8,
        **changes,
    }
    return KnnMonitor(
        train or ColourSource(30), test or ColourSource(15, seed=1), **arguments
    )


def test_monitor_of_an_easy_source():
    easy = monitor()
    assert easy.accuracy(mean_colour) == {"cls": 1.0, "mean": 1.0}
    controls = easy.controls(says_nothing)
    assert controls["image_statistics"] == 1.0
    assert controls["random_encoder_cls"] == pytest.approx(1 / 3)
    assert controls.keys() == {
        "image_statistics",
        "random_encoder_cls",
        "random_encoder_mean",
    }


def test_the_monitor_says_how_far_it_is(monkeypatch):
    said = []
    monitor(say=said.append).accuracy(mean_colour)
    assert said == []  # less than ten seconds
    monkeypatch.setattr(knn, "EVERY", 0.0)
    monitor(say=said.append).accuracy(mean_colour)
    counts = [f"{n}/30 images" for n in (8, 16, 24, 30)]
    counts += [f"{n}/15 images" for n in (8, 15)]
    assert said == [f"kNN: features of {count}" for count in counts]


class MislabelledSource(ColourSource):
    """The labels of the first five images are wrong."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        label = (found.label + (index < 5)) % 3
        return Record(found.image, found.gsd, label, found.id)


def test_accuracy_is_the_fraction_right():
    found = monitor(test=MislabelledSource(15)).accuracy(mean_colour)
    assert found == {"cls": pytest.approx(10 / 15), "mean": pytest.approx(10 / 15)}


def test_monitor_reads_no_more_than_asked():
    seen = []

    def encode(images, gsd):
        seen.append(gsd[:, 0] * 8 / 12 - 1)
        return mean_colour(images, gsd)

    monitor(max_train=10, max_test=5, batch_size=16).accuracy(encode)
    train, test = (np.round(indices).astype(int) for indices in seen)
    np.testing.assert_array_equal(train[:10], np.arange(0, 30, 3))
    np.testing.assert_array_equal(test[:5], np.arange(0, 15, 3))


def test_parts_with_other_classes_are_refused():
    other = ColourSource(15)
    other.class_names = ("red", "green")
    said = "classes .*blue.*knn.train"
    with pytest.raises(UserError, match=said) as caught:
        monitor(test=other)
    assert "\n" not in str(caught.value)


def test_monitor_stops_when_asked_to():
    calls = []

    def encode(images, gsd):
        calls.append(len(images))
        return mean_colour(images, gsd)

    stopped = monitor(should_stop=lambda: len(calls) >= 2)
    with pytest.raises(KeyboardInterrupt):
        stopped.accuracy(encode)
    assert len(calls) == 2


def test_monitor_is_asked_in_the_search_too():
    """`should_stop` also feeds the watchdog, so it must be called often."""
    calls, asked_after = [], []

    def encode(images, gsd):
        calls.append(len(images))
        return mean_colour(images, gsd)

    asked = monitor(should_stop=lambda: bool(asked_after.append(len(calls))))
    asked.accuracy(encode)
    batches = len(calls)
    # Once before each batch, and at least once per feature after the last.
    assert asked_after.count(batches) >= 2

"""Result rows on disk, intervals, scales, cached features, and leaks."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.encoders import counting_encoder, mean_colour
from tests.support.measurements import job, predict_nearest
from tests.support.rows import PROTOCOL, some_row
from tests.support.sources import ColourSource, Fingerprinted, Permuted
from xsmae.errors import UserError
from xsmae.evaluation.cache import cached_features
from xsmae.evaluation.features import encode_batches, square
from xsmae.evaluation.intervals import bootstrap_interval
from xsmae.evaluation.measure import (
    measure,
    predictions,
)
from xsmae.evaluation.parts import identical_images
from xsmae.evaluation.rows import append, append_all, read
from xsmae.evaluation.scales import Scale, base_size, create_scales

# Rows


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    average = some_row(
        scale="average", scales=[50.0, 100.0], size=[32, 64], confusion=None
    )
    assert append(path, some_row())
    assert append(path, average)
    assert read(path) == [some_row(), average]
    assert [r.identity for r in read(path)] == [some_row().identity, average.identity]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["schema"] == 1 for line in lines)
    assert all(line["protocol_key"] == PROTOCOL.key for line in lines)


def test_a_row_is_added_once(tmp_path):
    path = tmp_path / "results.jsonl"
    assert append(path, some_row())
    # The same measurement again, on another machine and under another data name.
    named = dataclasses.replace(PROTOCOL, data={**PROTOCOL.data, "name": "other"})
    assert not append(path, some_row(value=0.5, seconds=9.0, run={}, protocol=named))
    others = [
        some_row(seed=1),
        some_row(feature="cls"),
        some_row(scale=50.0, size=32),
        some_row(encoder={**some_row().encoder, "digest": "f" * 16}),
        some_row(protocol=dataclasses.replace(PROTOCOL, gsd_policy="fixed")),
        some_row(protocol=dataclasses.replace(PROTOCOL, options={"k": 5})),
        some_row(protocol=dataclasses.replace(PROTOCOL, base_size=65)),
    ]
    assert all(append(path, row) for row in others)
    assert len(read(path)) == 8


def test_many_rows_are_added_together(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, some_row(seed=1))
    with path.open("a") as file:
        file.write('{"schema": 1, "protocol')
    rows = [some_row(seed=seed) for seed in (0, 1, 2, 0)]
    assert append_all(path, rows) == [some_row(seed=0), some_row(seed=2)]
    assert [row.seed for row in read(path)] == [1, 0, 2]
    before = path.read_bytes()
    assert append_all(path, rows) == []
    assert path.read_bytes() == before


def append_some(path, first):
    for seed in range(first, first + 10):
        append(path, some_row(seed=seed))


def test_processes_do_not_get_in_each_others_way(tmp_path):
    path = tmp_path / "results.jsonl"
    start = multiprocessing.get_context("spawn").Process
    workers = [start(target=append_some, args=(path, first)) for first in (0, 5, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(row.seed for row in read(path)) == list(range(20))


def test_half_a_line_at_the_end_is_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, some_row())
    with path.open("a") as file:
        file.write('{"schema": 1, "protocol')
    assert len(read(path)) == 1
    assert append(path, some_row(seed=1))
    assert [row.seed for row in read(path)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2 of .*JSONDecodeError"),
        ("[]", "line 2 of .*TypeError"),
        ("{}", "line 2 of .*KeyError.*schema"),
        ('{"schema": 9}', "line 2 of .* has schema 9, expected 1"),
        ('{"schema": 1, "protocol_key": 0, "protocol": {}}', "line 2 of .*missing 8"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, said):
    path = tmp_path / "results.jsonl"
    append(path, some_row())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=said):
        read(path)


def test_a_disk_that_fills_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append(path, some_row())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:50]))
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        append(path, some_row(seed=1))
    assert path.read_bytes() == before
    # Nothing is written even if the first of several rows would have had room.
    size = len(before) + 50
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:size]))
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        append_all(path, [some_row(seed=1), some_row(seed=2)])
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert append(path, some_row(seed=1))


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write to .*results.jsonl"):
        append(tmp_path / "results.jsonl", some_row())


# Intervals


@pytest.mark.parametrize(("accuracy", "images"), [(0.7, 500), (0.5, 210)])
def test_the_interval_covers_the_truth_as_often_as_it_says(accuracy, images):
    sets = 1000
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(sets):
        right = rng.random(images) < accuracy
        low, high = bootstrap_interval(right, seed=seed, resamples=1000)
        covered += low <= accuracy <= high
    # Four standard deviations of the binomial, plus the percentile bootstrap's own
    # error for so few images, below one point.
    tolerance = 4 * np.sqrt(0.95 * 0.05 / sets)
    assert 0.95 - tolerance - 0.01 < covered / sets < 0.95 + tolerance


def test_the_interval_of_an_average_over_scales_covers_it():
    """Images of different difficulty, each right at some of four scales."""
    sets, images = 600, 200
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(sets):
        chance = rng.beta(2, 1, images)  # mean 2 / 3
        right = rng.random((4, images)) < chance
        low, high = bootstrap_interval(right.mean(0), seed=seed, resamples=1000)
        covered += low <= 2 / 3 <= high
    tolerance = 4 * np.sqrt(0.95 * 0.05 / sets)
    assert 0.95 - tolerance - 0.01 < covered / sets < 0.95 + tolerance


def test_the_interval_is_that_of_drawing_images():
    scores = np.random.default_rng(2).choice([0, 0.25, 1.0], 300)
    rng = np.random.default_rng(3)
    means = scores[rng.integers(0, 300, (20_000, 300))].mean(1)
    expected = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(scores, seed=0, resamples=20_000)
    np.testing.assert_allclose(found, expected, atol=0.004)


def test_the_interval_is_seeded_and_knows_no_order():
    scores = np.arange(50) % 3 == 0
    assert bootstrap_interval(scores, seed=0) == bootstrap_interval(
        scores[::-1], seed=0
    )
    assert bootstrap_interval(scores, seed=0) != bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(np.ones(9), seed=0) == (1.0, 1.0)


# Scales


def test_sizes_are_multiples_of_the_patch():
    found = create_scales([12.5, 25, 50, 100], base=256, patch_size=16)
    assert [scale.size for scale in found] == [32, 64, 128, 256]
    found = create_scales([30, 100], base=150, patch_size=16)
    assert [scale.size for scale in found] == [48, 144]
    assert [scale.gsd_factor for scale in found] == [1, 1]
    fixed = create_scales([50], base=64, patch_size=8, gsd_policy="fixed")
    assert fixed == [Scale(50, 32, 0.5)]


def test_a_scale_below_one_patch_is_refused():
    said = "12.5 % of 64 px is 8 px.*patch of 16 px"
    with pytest.raises(UserError, match=said):
        create_scales([12.5, 25], base=64, patch_size=16)


def test_base_size_is_the_images_own_or_256():
    assert base_size(ColourSource(5)) == 12

    class Large(ColourSource):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return dataclasses.replace(found, image=np.zeros((300, 400, 3), np.uint8))

    assert base_size(Large(5)) == 256
    with pytest.raises(UserError, match="can be used"):
        base_size(ColourSource(2, bad=[0, 1]))


def test_area_averages_every_pixel_alike():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = image.reshape(8, 8, 8, 8, 3).mean((1, 3))
    found, _ = square(image, 1.0, 8)
    # Pillow rounds twice, once per axis.
    np.testing.assert_allclose(found, expected, atol=1.0)
    # Enlarging does not just repeat pixels.
    larger, gsd = square(image, 1.0, 128)
    bicubic = Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(larger, bicubic)
    assert gsd == 0.5


# Cached features


SCALE = Scale(50, 6, 1.0)


def kept(tmp_path, encoder, source, said=None, scale=SCALE, **options):
    return cached_features(
        encoder,
        source,
        scale,
        cache=tmp_path / "cache",
        batch_size=4,
        say=(said if said is not None else []).append,
        **options,
    )


def test_kept_features_are_those_computed(tmp_path):
    source = Fingerprinted(11, bad=[2, 4, 5, 6, 7])
    calls = []
    for expected_calls in (2, 2):
        found = kept(tmp_path, counting_encoder(calls), source)
        assert len(calls) == expected_calls
        batches = list(
            encode_batches(mean_colour, source, np.arange(11), size=6, batch_size=4)
        )
        for name in ("cls", "mean"):
            expected = np.concatenate([encoded[name] for _, encoded in batches])
            np.testing.assert_array_equal(
                found.feature(name), expected.astype(np.float32)
            )
        assert found.positions.tolist() == [0, 1, 3, 8, 9, 10]
        np.testing.assert_allclose(found.gsd[:, 0], 2 * (1.0 + found.positions))
    assert found.computed == 0


def test_others_may_read_kept_features(tmp_path):
    before = os.umask(0o022)
    try:
        kept(tmp_path, counting_encoder([]), Fingerprinted(11))
    finally:
        os.umask(before)
    files = list((tmp_path / "cache").glob("*/*/*"))
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_two_extractions_at_once_count_every_image_once(tmp_path):
    source, began = Fingerprinted(18), []

    def encode(images, gsd):  # another process with other batches at the same time
        if not began:
            began.append(True)
            cached_features(
                counting_encoder([]), source, SCALE,
                cache=tmp_path / "cache", batch_size=5, say=lambda line: None,
            )  # fmt: skip
        return mean_colour(images, gsd)

    found = kept(tmp_path, counting_encoder([], encode=encode), source)
    assert found.positions.tolist() == list(range(18))
    alone = kept(tmp_path / "other", counting_encoder([]), source)
    for name in ("mean", "pixels", "gsd"):
        np.testing.assert_array_equal(found.feature(name), alone.feature(name))


@pytest.mark.parametrize("batches_before", [0, 1, 3])
def test_a_stopped_extraction_computes_nothing_twice(tmp_path, batches_before):
    source, calls = Fingerprinted(18), []
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, counting_encoder(calls, fail_after=batches_before), source)
    found = kept(tmp_path, counting_encoder(calls), source)
    assert len(calls) == 5  # 18 images in fours
    assert found.computed == 18 - 4 * batches_before
    assert found.positions.tolist() == list(range(18))
    # This holds for any batches of the next call.
    np.testing.assert_array_equal(
        found.feature("mean"),
        cached_features(
            counting_encoder([]), source, SCALE, cache=tmp_path / "other", batch_size=18
        ).feature("mean"),
    )


def test_should_stop_is_looked_at_between_batches(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        kept(
            tmp_path,
            counting_encoder(calls),
            Fingerprinted(18),
            should_stop=lambda: len(calls) >= 2,
        )
    kept(tmp_path, counting_encoder(calls), Fingerprinted(18))
    assert len(calls) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_computed_again(tmp_path, damage):
    source, calls, said = Fingerprinted(12), [], []
    expected = kept(tmp_path, counting_encoder(calls), source).feature("mean")
    file = sorted((tmp_path / "cache").glob("*/*/[0-9]*"))[1]
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-100] ^= 4
    file.write_bytes({"cut": content[:-9], "empty": b""}.get(damage, content))
    found = kept(tmp_path, counting_encoder(calls), source, said)
    assert len(calls) == 3 + 1
    (damaged,) = (line for line in said if "damaged" in line)
    assert str(file) in damaged
    np.testing.assert_array_equal(found.feature("mean"), expected)


def test_what_decides_the_features_decides_the_place(tmp_path):
    calls = []
    encoder = counting_encoder(calls)
    variants = [
        {"source": Fingerprinted(4)},
        {"source": Fingerprinted(4, seed=1)},
        {"source": Fingerprinted(4), "scale": Scale(50, 8, 1.0)},
        {"source": Fingerprinted(4), "scale": Scale(50, 6, 0.5)},
        {
            "source": Fingerprinted(4),
            "encoder": dataclasses.replace(encoder, digest="1" * 16),
        },
    ]
    for number, variant in enumerate(variants, 1):
        for _ in range(2):
            kept(tmp_path, **{"encoder": encoder, **variant})
        assert len(calls) == number


def test_the_gsd_told_is_the_one_after_resizing_or_that_of_all(tmp_path):
    """Images of 12 px and 1 + index metres, resized to 6 and 3 px."""
    source = Fingerprinted(4)
    for policy, factors in (("true", (2, 4)), ("fixed", (1, 1))):
        scales = create_scales([50, 25], base=12, patch_size=3, gsd_policy=policy)
        assert [scale.size for scale in scales] == [6, 3]
        for scale, factor in zip(scales, factors, strict=True):
            calls = []
            found = kept(tmp_path, counting_encoder(calls), source, scale=scale)
            expected = factor * np.arange(1.0, 5)[:, None].repeat(2, axis=1)
            np.testing.assert_allclose(found.gsd, expected)
            np.testing.assert_allclose(calls, [expected])


def test_features_that_are_not_finite_are_refused(tmp_path):
    def broken(images, gsd):
        return {"cls": np.full((len(images), 2), np.nan)}

    with pytest.raises(UserError, match=r"cls features that are not finite .*'0\.png'"):
        kept(tmp_path, counting_encoder([], encode=broken), Fingerprinted(3))
    assert not list((tmp_path / "cache").glob("*/*/*"))


# From features to rows


def test_labels_of_the_test_images_reach_no_prediction(tmp_path):
    """Other test labels change the score but no prediction."""
    found, values = [], []
    for number, kind in enumerate((Fingerprinted, Permuted)):
        folder = tmp_path / str(number)
        this = job(folder, kind(15, seed=1))
        train, test = (
            cached_features(
                this.encoder, part, this.scales[0], cache=this.cache, say=this.say
            )
            for part in (this.parts.train, this.parts.test)
        )
        found.append(
            predictions(this, "statistics", train, test, predict=predict_nearest)
        )
        values.append([row.value for row in measure(this)])
    np.testing.assert_array_equal(*found)
    assert values == [[1.0] * 3, [0.0] * 3]


def test_the_rows_are_read_as_often_for_many_scales_as_for_one(tmp_path, monkeypatch):
    results, reads = tmp_path / "results.jsonl", []
    read_bytes = Path.read_bytes

    def counted(path):
        if path == results:
            reads[-1] += 1
        return read_bytes(path)

    append(results, some_row())
    monkeypatch.setattr(Path, "read_bytes", counted)
    for seed, percents in enumerate(([100], [25, 50, 75, 100])):
        reads.append(0)
        scales = create_scales(percents, base=12, patch_size=1)
        measure(job(tmp_path, Fingerprinted(15, seed=1), scales=scales, seed=seed))
    monkeypatch.undo()
    assert reads == [2, 2]
    assert len(read(results)) == 1 + 1 + 5


def test_rows_of_every_scale_and_their_average(tmp_path):
    test = Fingerprinted(15, seed=1, bad=[3])
    rows = measure(job(tmp_path, test))
    assert [row.scale for row in rows] == [50.0, 100.0, "average"]
    assert read(tmp_path / "results.jsonl") == rows
    assert rows[0].num_test == 14
    assert rows[0].confusion == [[4, 0, 0], [0, 5, 0], [0, 0, 5]]
    assert rows[0].unusable == {"train": 0, "test": 1}
    assert rows[0].per_class == {"red": 1.0, "green": 1.0, "blue": 1.0}


def test_equal_pixels_are_found():
    train, test = Fingerprinted(6), Fingerprinted(5)  # same seed, so the same images
    pixels = [
        next(
            iter(
                encode_batches(
                    mean_colour, source, np.arange(len(source)), size=6, batch_size=9
                )
            )
        )[0].pixels
        for source in (train, test)
    ]
    assert identical_images(*pixels) == [(i, i) for i in range(5)]
    other = np.zeros((2, 16), np.uint8)
    assert identical_images(pixels[0], other) == []
    assert identical_images(other, other) == [(0, 0), (1, 0)]

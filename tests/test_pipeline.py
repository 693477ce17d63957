"""The batches of a run: threads, processes, resuming, bad images."""

import dataclasses
import functools
import itertools
import json
import logging
import re

import numpy as np
import pytest

from xsmae.data.pipeline import allowed_rejections, make_batches
from xsmae.data.records import BaseSource, Record
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError, UserError
from xsmae.models.position import relative_box
from xsmae.run.rejected import RejectedImages

SAMPLER = ViewSampler(
    num_views=2,
    size=8,
    area=(0.25, 1.0),
    area2=(0.25, 0.75),
    ratio=(3 / 4, 4 / 3),
    area_distribution="log_uniform",
    view2_from="source",
    view2_box="sample",
    interpolation="bicubic",
    interpolation2="bicubic",
    horizontal_flip=0.5,
    vertical_flip=0.5,
)


class NoiseSource(BaseSource):
    """Images of noise; the indices in `bad` raise BadImageError."""

    bands = ("red", "green", "blue")
    class_names = ()
    labels = None

    def __init__(self, size, bad=()):
        self.size, self.bad = size, frozenset(bad)

    def __repr__(self):
        return f"NoiseSource({self.size})"

    def __len__(self):
        return self.size

    def id(self, index):
        return f"{index:02}.png"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError(f"{index} is no image")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (20, 16, 3), np.uint8)
        return Record(image, 0.5, None, self.id(index))


def batches(source=None, sampler=SAMPLER, **changes):
    """Batches of 4 from 10 images: 5 steps are 2 epochs."""
    arguments = {
        "seed": 3,
        "batch_size": 4,
        "start_step": 0,
        "num_steps": 5,
        "max_rejected_fraction": 0.3,
        **changes,
    }
    return list(make_batches(source or NoiseSource(10), sampler, **arguments))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def column(found, name):
    return np.concatenate([batch[name] for batch in found])


# The same batches from any number of threads and processes


def test_shapes():
    (batch,) = batches(num_steps=1)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((4, 2, 8, 8, 3), np.uint8),
        "box": ((4, 2, 4), np.float32),
        "gsd": ((4, 2, 2), np.float32),
        "flip": ((4, 2), bool),
        "index": ((4,), np.int64),
        "requested": ((4,), np.int64),
    }


def test_a_sample_is_of_the_image_that_index_says():
    whole = {"area": (1.0, 1.0), "horizontal_flip": 0.0, "vertical_flip": 0.0}
    sampler = dataclasses.replace(SAMPLER, **whole, ratio=(0.8, 0.8), size=20)
    source = NoiseSource(10)
    for batch in batches(source, sampler, num_steps=2):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            expected = source[index].image
            np.testing.assert_allclose(
                image[0].mean((0, 1)), expected.mean((0, 1)), atol=1
            )


@pytest.mark.parametrize("threads", [0, 1, 7])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_change_nothing(threads, prefetch):
    found = batches(num_threads=threads, prefetch=prefetch)
    assert_same(found, batches())


def test_worker_processes_change_nothing():
    logging.getLogger("absl").setLevel(logging.ERROR)
    source = NoiseSource(10, bad=[2, 3])
    iterator = make_batches(
        source,
        SAMPLER,
        seed=3,
        batch_size=4,
        start_step=1,
        num_steps=5,
        max_rejected_fraction=0.3,
        num_workers=2,
        prefetch=1,
    )
    found = list(iterator)
    del iterator  # ends the workers
    assert_same(found, batches(source)[1:])


@pytest.mark.parametrize("start_step", [1, 3, 5])
def test_resuming_goes_on_exactly(start_step):
    assert_same(batches(start_step=start_step), batches()[start_step:])


def test_a_longer_run_begins_as_a_shorter_one():
    assert_same(batches(num_steps=11)[:5], batches())


@pytest.mark.parametrize("view2_box", ["sample", "batch"])
def test_parts_of_the_processes_put_together_are_the_batch(view2_box):
    sampler = dataclasses.replace(SAMPLER, view2_box=view2_box)
    parts = [
        batches(sampler=sampler, process_index=i, process_count=2, start_step=1)
        for i in range(2)
    ]
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_same(joined, batches(sampler=sampler)[1:])


def test_batch_that_does_not_divide_over_the_processes_is_refused():
    with pytest.raises(UserError, match=r"batch_size=4, .* 3 processes"):
        batches(process_count=3)


def test_every_epoch_sees_each_image_once_in_another_order():
    index = column(batches(num_steps=15), "index").reshape(6, 10)
    np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(order) for order in index}) == 6


def test_an_image_is_cropped_anew_in_every_epoch():
    found = batches(num_steps=10)
    index, box = column(found, "index"), column(found, "box")
    for image in range(10):
        assert len({b.tobytes() for b in box[index == image]}) == 4


def test_seed_changes_order_and_crops():
    one, other = batches(), batches(seed=4)
    assert not np.array_equal(column(one, "index"), column(other, "index"))
    sort = [np.argsort(column(b, "index"), kind="stable") for b in (one, other)]
    boxes = [column(b, "box")[s] for b, s in zip((one, other), sort, strict=True)]
    assert not np.isclose(*boxes).all(axis=(1, 2)).any()


@pytest.mark.parametrize("view2_from", ["source", "view1"])
def test_one_box_a_batch(view2_from):
    sampler = dataclasses.replace(SAMPLER, view2_box="batch", view2_from=view2_from)
    found = batches(sampler=sampler)
    places = [np.asarray(relative_box(b["box"], b["flip"]))[:, 1] for b in found]
    for place in places:
        np.testing.assert_allclose(place, place[:1].repeat(4, 0), atol=1e-5)
    for one, other in itertools.combinations(places, 2):
        assert np.abs(one[0] - other[0]).max() > 1e-3
    assert len(np.unique(column(found, "box")[:, 0, 0])) == 20  # view 1 is a sample's


@pytest.mark.parametrize(("images", "batch"), [(3, 4), (1, 2)])
def test_fewer_images_than_a_batch_are_refused(images, batch):
    said = rf"NoiseSource.* {images} images, .* batch of {batch}"
    with pytest.raises(UserError, match=said) as caught:
        batches(NoiseSource(images), batch_size=batch)
    assert "\n" not in str(caught.value)


# Bad images


def test_bad_images_are_replaced_by_the_next_good_one():
    found = batches(NoiseSource(10, bad=[2, 3, 9]))
    requested, index = column(found, "requested"), column(found, "index")
    expected = {2: 4, 3: 4, 9: 0}
    np.testing.assert_array_equal(index, [expected.get(i, i) for i in requested])
    good = batches()
    np.testing.assert_array_equal(requested, column(good, "index"))
    # The draws depend only on the position, and other samples do not change.
    np.testing.assert_array_equal(column(found, "box"), column(good, "box"))
    same = index == requested
    images, expected = column(found, "image"), column(good, "image")
    np.testing.assert_array_equal(images[same], expected[same])
    assert (images[~same] != expected[~same]).any(axis=(1, 2, 3, 4)).all()


def test_bad_images_are_counted_and_listed_once(tmp_path, caplog):
    source = NoiseSource(10, bad=[2, 3])
    path = tmp_path / "rejected.jsonl"
    rejected = RejectedImages(path, source, max_fraction=0.3)
    replaced = [
        rejected.check(batch, step=i)
        for i, batch in enumerate(batches(source, num_steps=10))
    ]
    assert sum(replaced) == 2 * 4
    assert max(replaced) <= 4
    assert len(rejected) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(0 <= row.pop("step") < 10 for row in rows)
    assert sorted(rows, key=lambda row: row["id"]) == [
        {"schema": 1, "id": "02.png", "reason": "2 is no image"},
        {"schema": 1, "id": "03.png", "reason": "3 is no image"},
    ]
    assert sorted(re.findall("[23] is no image", caplog.text)) == [
        "2 is no image", "3 is no image"
    ]  # fmt: skip


def test_good_images_leave_no_list(tmp_path):
    rejected = RejectedImages(tmp_path / "r", NoiseSource(10), max_fraction=0.0)
    assert [rejected.check(batch, step=1) for batch in batches()] == [0] * 5
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_resumed_run_lists_nothing_twice(tmp_path, cut):
    """Also if a kill cut `cut` bytes off the last line."""
    source = NoiseSource(10, bad=[2, 3])
    path = tmp_path / "rejected.jsonl"
    found = batches(source, num_steps=10)
    first = RejectedImages(path, source, max_fraction=0.3)
    for step, batch in enumerate(found[:5], 1):
        first.check(batch, step=step)
    before = path.read_text()
    assert len(before.splitlines()) == 2
    path.write_text(before[: len(before) - cut])
    resumed = RejectedImages(path, source, max_fraction=0.3, resume_step=5)
    assert len(resumed) == (1 if cut > 1 else 2)  # cut=1 removes only the newline
    for step, batch in enumerate(found[5:], 6):
        resumed.check(batch, step=step)
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(ids) == sorted(json.loads(x)["id"] for x in before.splitlines())
    assert len(RejectedImages(path, source, max_fraction=0.3, resume_step=10)) == 2


def test_what_later_steps_of_a_killed_run_found_is_found_again(tmp_path):
    source = NoiseSource(10, bad=[2, 3])
    path = tmp_path / "rejected.jsonl"
    rejected = RejectedImages(path, source, max_fraction=0.3)
    for step, batch in enumerate(batches(source, num_steps=10), 1):
        rejected.check(batch, step=step)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    resumed = RejectedImages(path, source, max_fraction=0.3, resume_step=min(steps) - 1)
    assert len(resumed) == 0
    assert path.read_text() == ""
    assert len(RejectedImages(path, source, max_fraction=0.3)) == 0


def run_until_it_stops(source, path, fraction, **changes):
    rejected = RejectedImages(path, source, max_fraction=fraction)
    found = batches(source, max_rejected_fraction=fraction, **changes)
    with pytest.raises(UserError) as caught:
        list(map(functools.partial(rejected.check, step=1), found))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_over_the_limit_the_run_stops_and_names_the_files(tmp_path):
    path = tmp_path / "rejected.jsonl"
    message = run_until_it_stops(NoiseSource(10, bad=[2, 5, 7]), path, 0.2)
    assert len(path.read_text().splitlines()) == 3
    assert message.startswith("3 of 10 images")
    assert "2 allowed" in message
    for index in (2, 5, 7):
        assert f"{index:02}.png ({index} is no image)" in message
    assert " more. " not in message  # all are named
    assert "--config.input.max_rejected_fraction=0.2" in message
    assert "xsmae check-data" in message
    assert path.name in message


def test_of_many_bad_images_the_first_are_named(tmp_path):
    source = NoiseSource(50, bad=range(25))
    message = run_until_it_stops(source, tmp_path / "r", 0.46, num_steps=12)
    assert message.startswith("24 of 50 images")
    assert message.count("is no image)") == 20
    assert "and 4 more" in message


@pytest.mark.parametrize(
    ("num_images", "fraction", "allowed"),
    [
        (48, 0.01, 1), (100, 0.01, 1), (250, 0.01, 2), (100, 0.29, 29), (48, 0.0, 0),
        (10, 0.99, 9), (10, 1.0, 9), (1, 0.5, 0), (2, 0.01, 1),
    ],
)  # fmt: skip
def test_how_many_bad_images_are_allowed(num_images, fraction, allowed):
    assert allowed_rejections(num_images, fraction) == allowed


def test_one_bad_image_of_a_few_stops_no_run(tmp_path):
    source = NoiseSource(48, bad=[5])
    rejected = RejectedImages(tmp_path / "r", source, max_fraction=0.01)
    found = batches(source, max_rejected_fraction=0.01, num_steps=12)
    assert sum(rejected.check(batch, step=1) for batch in found) == 1
    assert len(rejected) == 1
    assert all((batch["index"] >= 0).all() for batch in found)


def test_as_many_as_the_limit_are_allowed(tmp_path):
    source = NoiseSource(10, bad=[2, 3, 4])
    rejected = RejectedImages(tmp_path / "r", source, max_fraction=0.3)
    for batch in batches(source, max_rejected_fraction=0.3):
        rejected.check(batch, step=1)
    assert len(rejected) == 3


def test_no_limit_at_all_is_none_bad(tmp_path):
    message = run_until_it_stops(NoiseSource(10, bad=[6]), tmp_path / "r", 0.0)
    assert message.startswith("1 of 10 images")


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.99, 1.0])
def test_a_source_of_bad_images_stops(tmp_path, fraction):
    source = NoiseSource(10, bad=range(10))
    message = run_until_it_stops(source, tmp_path / "r", fraction, num_steps=1)
    assert "of 10 images" in message


def test_an_image_that_is_good_again_is_listed_as_that(tmp_path):
    source = NoiseSource(10, bad=[2])
    found = batches(source)
    source.bad = frozenset()
    rejected = RejectedImages(tmp_path / "r", source, max_fraction=0.3)
    for batch in found:
        rejected.check(batch, step=1)
    assert "a second one did not" in json.loads((tmp_path / "r").read_text())["reason"]

"""Fuzzes the readers of user files: a one-line error or a valid result.

`make test` tries 100 cases of each, `make test-faults` 1,000. The fuzz tests of the
image decoder and the checkpoint reader are in test_images.py and test_torch_file.py.
"""

import contextlib
import json
import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from xsmae.data.fmow import FmowSource
from xsmae.data.folder import FolderSource
from xsmae.data.tables import CsvSource
from xsmae.errors import BadImageError, UserError

pytestmark = pytest.mark.fuzz

# Every case may write to the folders of the fixtures.
fuzzed = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PATHS = st.sampled_from(
    [
        "a.png", "b.png", "in/c.png", "none.png", "../secret.png", "/etc/passwd", "in",
        "in/../../secret.png", "C:\\a.png", "in\\c.png", "out/secret.png", "out.png",
        "", ".", "a.png\0", "~/a.png", "a.png ", "%61.png", "à.png", "a" * 5000,
    ]
)  # fmt: skip
CELLS = st.one_of(PATHS, st.text(max_size=8), st.floats().map(str), st.just("0.5"))
HEADS = st.lists(
    st.sampled_from(["path", "gsd", "label", "PATH", "image_path", "", "x", "a;b"]),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def folder(tmp_path):
    """A root with three images, one image outside, and links that point outside."""
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    for path in (root / "a.png", root / "b.png", root / "in/c.png"):
        Image.new("RGB", (40, 40), (1, 2, 3)).save(path)
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "secret/secret.png")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "out.png").symlink_to(tmp_path / "secret/secret.png")
    return root


@st.composite
def tables(draw):
    """The bytes of a CSV: valid rows, or wrong cells, delimiters and bytes."""
    delimiter = draw(st.sampled_from([",", ";", "\t"]))
    rows = [draw(HEADS), *draw(st.lists(st.lists(CELLS, max_size=4), max_size=5))]
    if draw(st.booleans()):  # a table with at most one wrong row
        rows = [["path", "gsd"], ["a.png", "0.5"], ["in/c.png", "2"], *rows[2:3]]
    quote = draw(st.sampled_from(["", '"']))
    text = "\n".join(delimiter.join(f"{quote}{c}{quote}" for c in row) for row in rows)
    content = text.encode("utf-8-sig" if draw(st.booleans()) else "utf-8", "replace")
    return content + draw(st.one_of(st.just(b""), st.binary(max_size=6)))


@contextlib.contextmanager
def or_one_line(refusal):
    """Runs the block; it may raise `refusal`, with a message of one line."""
    try:
        yield
    except refusal as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"lines: {error}") from error


def assert_sound(source, root):
    """Every record lies in the root and has GSD and pixels, or is a one-line error."""
    real = os.path.realpath(root)
    for index in range(len(source)):
        path = os.path.realpath(source.path(index))
        assert os.path.commonpath([real, path]) == real
        with or_one_line(BadImageError):
            record = source[index]
            assert math.isfinite(record.gsd)
            assert record.gsd > 0
            assert record.image.dtype == np.uint8
            assert tuple(record.image[0, 0]) != (255, 0, 0)


@fuzzed
@given(content=tables(), gsd=st.sampled_from([None, 0.5]))
def test_tables(folder, content, gsd):
    """No row reaches outside the root: `..`, a drive, an absolute path or a link."""
    table = folder / "table.csv"
    table.write_bytes(content)
    with or_one_line(UserError):
        assert_sound(CsvSource(table, gsd=gsd), folder)


@fuzzed
@given(content=tables())
def test_tables_of_gsds(folder, content):
    table = folder.parent / "gsd.csv"
    table.write_bytes(content)
    for name in ("out", "out.png"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    with or_one_line(UserError):
        assert_sound(FolderSource(folder / "in", gsd_csv=table), folder)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.just(10**400), st.just("NaN"),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=8,
)  # fmt: skip
BOXES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {}, optional={"category": JSON, "box": st.one_of(JSON, st.lists(st.floats()))}
    ),
    st.lists(
        st.fixed_dictionaries(
            {"category": st.sampled_from(["zoo", "false_detection", 7])},
            optional={"box": st.lists(st.integers(-50, 150), min_size=3, max_size=5)},
        ),
        max_size=3,
    ),
)
METADATA = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "gsd": st.one_of(st.just(0.5), JSON),
            "bounding_boxes": BOXES,
            "more": JSON,
        },
    ),
)


@pytest.fixture
def fmow(tmp_path):
    place = tmp_path / "root/train/zoo/zoo_0"
    place.mkdir(parents=True)
    image = place / "zoo_0_0_rgb.jpg"
    Image.new("RGB", (100, 80), (0, 0, 200)).save(image)
    return image


@fuzzed
@given(metadata=METADATA, cut=st.integers(0, 40), noise=st.binary(max_size=3))
def test_metadata_of_fmow(fmow, metadata, cut, noise):
    """JSON with missing fields or wrong types, or no JSON at all."""
    content = json.dumps(metadata).encode()
    if cut % 4 == 0:
        content = content[:cut] + noise + content[cut:]
    fmow.with_suffix(".json").write_bytes(content)
    root = fmow.parents[3]
    with or_one_line(UserError):  # no GSD in any file
        assert_sound(FmowSource(root), root)

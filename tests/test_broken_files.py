"""Every file of the corpus is read, or refused for the expected reason."""

import random
import re

import numpy as np
import pytest
from PIL import ImageFile

from tests.support.corpus import FORMATS, READ, corpus, encoded, scene
from xsmae.data.folder import FolderSource
from xsmae.data.images import decode
from xsmae.data.tables import CsvSource
from xsmae.errors import BadImageError

CORPUS = {name: (content, outcome) for name, content, outcome in corpus()}
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}


def outcome_of(read):
    """The result of `read`: the pixels' shape and bytes, or the error message."""
    try:
        pixels = read()
    except BadImageError as error:
        return str(error)
    assert pixels.dtype == np.uint8
    return pixels.shape, pixels.tobytes()


def write(folder, name, content):
    path = folder / f"image{SUFFIX.get(re.match('[A-Z]*', name)[0], '.jpg')}"
    path.write_bytes(content)
    return path


def test_the_names_are_no_two_alike():
    assert len(CORPUS) == len(list(corpus()))


@pytest.mark.parametrize("name", CORPUS)
def test_outcome(name, tmp_path):
    """Bytes, a folder and a table give the same result, also the second time."""
    content, expected = CORPUS[name]
    path = write(tmp_path, name, content)
    (tmp_path / "images.csv").write_text(f"path,gsd\n{path.name},0.5\n")
    sources = (FolderSource(tmp_path, gsd=0.5), CsvSource(tmp_path / "images.csv"))
    found = [outcome_of(lambda: decode(content)), outcome_of(lambda: decode(path))]
    for source in sources:
        found += [outcome_of(lambda source=source: source[0].image)] * 2
    assert all(one == found[0] for one in found)
    if expected == READ:
        height, width, channels = found[0][0]
        assert {height, width} == {64, 72}
        assert channels == 3
    else:
        with pytest.raises(BadImageError, match=expected) as caught:
            decode(content)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CORPUS if "declare" in name])
def test_what_is_declared_is_never_decoded(name, tmp_path, monkeypatch):
    """A few bytes may declare a huge image; nothing decodes it or allocates memory."""

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    source = FolderSource(write(tmp_path, name, CORPUS[name][0]).parent, gsd=0.5)
    with pytest.raises(BadImageError) as caught, source.open(0) as record:
        record.image.pixels(1.0)
    assert "decoded: decoded" not in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
def test_flipped_bits(file_format):
    """A damaged JPEG, WebP or TIFF may give wrong pixels, but always the same ones.

    A PNG has checksums, so a damaged PNG is refused or read correctly.
    """
    whole = encoded(scene(), file_format)
    rng, pixels = random.Random(0), decode(whole)
    for _ in range(200):
        content = bytearray(whole)
        place = rng.randrange(len(content) * 8)
        content[place // 8] ^= 1 << place % 8
        first = outcome_of(lambda content=content: decode(bytes(content)))
        assert first == outcome_of(lambda content=content: decode(bytes(content)))
        if file_format == "PNG" and not isinstance(first, str):
            assert first == (pixels.shape, pixels.tobytes())

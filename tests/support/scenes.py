"""Scenes to embed, the command, and kills of it."""

from __future__ import annotations

import functools

import numpy as np

from tests.support.rasters import write
from xsmae import cli
from xsmae.weights.encoder import load_encoder

CHIP = 16
TIMED = {"TIFFTAG_DATETIME": "2019:09:04 10:20:30"}
HEIGHT, WIDTH = 90, 70  # rows of 5 chips, the last of each moved back
PROFILE = {"photometric": "rgb", "nodata": 0, "tags": TIMED}


def make_scene(path, height=HEIGHT, width=WIDTH, **options):
    rng = np.random.default_rng(height)
    data = rng.integers(1, 256, (3, height, width)).astype(np.uint8)
    data[:, :40, :25] = 0
    path.parent.mkdir(exist_ok=True)
    return write(path, data, **{**PROFILE, **options})


@functools.cache
def loaded(folder, **options):
    return load_encoder(folder, **options)


def call(*words):
    return cli.main(["xsmae", "embed", *map(str, words)])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


class Killed(BaseException):
    pass


def run_killed(monkeypatch, encoder, scene, out, place, number, *words):
    """Calls the command; raises in the `number`th call of a function, before it."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    home, attribute = place
    function = getattr(home, attribute)
    with monkeypatch.context() as patch:
        patch.setattr(home, attribute, counted)
        options = [f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
        assert call(scene, *options, *words) == 0
    return len(calls)

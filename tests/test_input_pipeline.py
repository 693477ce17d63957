"""The benchmark of the loaders runs, and its reference is correct."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(input_pipeline, "SCENES", {64: 2, 300: 2})


def test_a_line_a_case_and_a_table(small, tmp_path):
    found = input_pipeline.measure_views(tmp_path, quality=90, rounds=2, seconds=0.001)
    cases = [json.loads(json.dumps(case)) for case in found]
    assert [(c["side"], c["view2_from"]) for c in cases] == [
        (side, view2_from) for side in (64, 300) for view2_from in ("source", "view1")
    ]
    for case in cases:
        assert min(case[name] for name in ("reference", "whole", "ours", "ratio")) > 0
    assert len(input_pipeline.table(cases).splitlines()) == 2 + len(cases)
    assert {"date", "device", "pillow"} < input_pipeline.machine().keys()


def test_scenes_are_saved_once(small, tmp_path):
    folder = input_pipeline.save_scenes(tmp_path, 64, 90)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == 2
    input_pipeline.save_scenes(tmp_path, 64, 90)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_reference_cuts_view_2_out_of_view_1(tmp_path):
    path = tmp_path / "image.png"
    rows, columns = np.mgrid[:200, :200]
    ramp = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    for seed in range(20):
        first, second = input_pipeline.reference(path, random.Random(seed)).astype(int)
        assert first.shape == second.shape == (128, 128, 3)
        for band in (0, 1):
            assert first[..., band].min() - 2 <= second[..., band].min()
            assert second[..., band].max() <= first[..., band].max() + 2
            span = np.ptp(first[..., band]) / 200
            assert 0.4 < span <= 1
            assert 0.35 < np.ptp(second[..., band]) / np.ptp(first[..., band]) < 1

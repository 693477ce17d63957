"""The benchmark of embedding runs, and prints what it says."""

import json

import pytest

from tests.support.rasters import REASON

pytest.importorskip("rasterio", reason=REASON)


def test_a_line_a_round_and_a_table(capsys, monkeypatch):
    from benchmarks import embed_scenes

    monkeypatch.setattr(embed_scenes, "CHIP", 32)
    monkeypatch.setattr(embed_scenes, "TILE", 16)
    embed_scenes.main(["--size=tiny", "--rows=3", "--rounds=2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"own"')]
    assert len(rows) == 2
    for row in rows:
        assert row["ratio"] == pytest.approx(row["embed"] / row["own"])
        assert min(row.values()) > 0
    assert lines[-1].startswith("| tiny | ")

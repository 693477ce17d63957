"""The official cases in `../shared/parity`, and checks that detect differences.

The tests skip if that folder does not exist.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support import parity

CASES = Path(__file__).parent.parent.parent / "shared" / "parity"
pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason=f"no official cases: {CASES} does not exist"
)
NAMES = sorted(path.stem for path in CASES.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    rows = parity.check(CASES / f"{name}.json")
    failed = [f"{row.array}: {row.error:.1e}" for row in rows if not row.passed]
    assert failed == []
    kinds = {row.array.partition("/")[0].partition("_")[0] for row in rows}
    assert {"pred", "mask", "loss", "grad"} <= kinds
    assert len(rows) > 50


def test_there_are_all_systems():
    prefixes = ("cross_scale_mae", "mae", "satmae", "scale_mae")
    assert all(any(n.startswith(p) for n in NAMES) for p in prefixes)


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("pred", lambda x: x * 1.001),
        ("loss_total", lambda x: x + 1e-4),
        ("grad_norm/blocks.1.attn.qkv.weight", lambda x: x * 1.01),
        ("unheard_of", None),
    ],
)
def test_a_difference_is_a_failure(array, change, tmp_path, capsys):
    for suffix in (".json", ".pth"):
        shutil.copy(CASES / f"mae{suffix}", tmp_path)
    arrays = dict(np.load(CASES / "mae.npz"))
    arrays[array] = np.ones(3) if change is None else change(arrays[array])
    np.savez(tmp_path / "mae.npz", **arrays)
    assert parity.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "0 passed, 1 failed" in printed
    assert [line for line in printed.splitlines() if "FAILED" in line and array in line]


def test_a_case_that_cannot_be_run_has_failed(tmp_path, capsys):
    for suffix in (".json", ".npz", ".pth"):
        shutil.copy(CASES / f"mae{suffix}", tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    assert parity.main([str(tmp_path)]) == 1
    assert "1 passed, 1 failed" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "nothing")]) == 2

"""The benchmark of segmentation runs, and counts what it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import segmentation

FLAGS = [
    "--encoder=random:tiny,patch_size=8,embed_dim=16,depth=2,num_heads=2", "--crop=16",
    "--batch_size=2", "--rounds=2", "--memory=50",
    "--heads=linear,knn,upernet_trained",
]  # fmt: skip


def test_a_line_a_head_and_a_table():
    found = segmentation.measure(segmentation.parse(FLAGS))
    results = {row["head"]: row for row in json.loads(json.dumps(found))}
    assert list(results) == ["linear", "knn", "upernet_trained"]
    for head, row in results.items():
        trained = head != "knn"
        assert ("train" in row) == trained
        assert (row["peak_gb"] is not None) == trained
        for phase in ("train", "predict")[not trained :]:
            low, high = row[phase]["range"]
            assert 0 < low <= row[phase]["pixels_per_second"] <= high
    flop = {
        (head, phase): row[phase]["flop_per_pixel"]
        for head, row in results.items()
        for phase in ("train", "predict")
        if phase in row
    }
    # A step of the linear layer does not run the encoder.
    assert flop["linear", "train"] < flop["linear", "predict"]
    # A gradient costs about two more runs, 9 windows of 4 crops cost 9 / 4.
    ratio = flop["upernet_trained", "train"] / flop["upernet_trained", "predict"]
    assert 2.5 < ratio * 9 / 4 < 4
    # Each of two blocks has 12 x width^2 products for each patch.
    encoder = 9 / 4 * 2 * 2 * 12 * 16**2 / 8**2
    assert encoder < flop["linear", "predict"] < 3 * encoder
    # The search of 50 patches; its memory is not part of a program.
    assert flop["knn", "predict"] > 9 / 4 * 2 * 50 * 16 / 8**2 + encoder
    assert len(segmentation.table(found).splitlines()) == 2 + 5
    assert {"date", "device", "computes"} < segmentation.machine().keys()


def test_all_turns_of_a_loop_are_counted():
    products = jnp.ones((5, 16, 16))
    program = jax.jit(
        lambda x: jax.lax.scan(lambda c, w: (c @ w, None), x, products)[0]
    )
    x = np.ones((4, 16), np.float32)
    found = segmentation.flops([lambda: program.lower(x)])
    assert found == pytest.approx(5 * 2 * 4 * 16 * 16, rel=0.05)


def test_heads_that_are_none(capsys):
    with pytest.raises(SystemExit):
        segmentation.parse(["--heads=linear,mlp"])
    assert "linear, knn, upernet" in capsys.readouterr().err

"""The linear probe: scikit-learn, the choice of the penalty, the command."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from xsmae.cli import probe as linear_probe
from xsmae.errors import UserError
from xsmae.evaluation.rows import read
from xsmae.evaluation.tasks.probe import fit, hold_out, sweep_predict


def clusters(n, classes=4, width=10, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = 3 * np.random.default_rng(1).normal(size=(classes, width))
    features = centres[labels] + spread * rng.normal(size=(n, width))
    return features.astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("data", ["separable", "random"])
def test_the_fit_is_scikit_learns(data, penalty):
    features, labels = clusters(300, spread=1.0 if data == "separable" else 30.0)
    (found,) = fit(features, labels, num_classes=4, penalties=[penalty])
    standardised = (features - found.mean) / found.std
    expected = LogisticRegression(C=1 / (penalty * 300), tol=1e-8, max_iter=10_000)
    expected.fit(standardised, labels)
    scale = np.abs(expected.coef_).max()
    np.testing.assert_allclose(found.kernel, expected.coef_.T, atol=1e-3 * scale)
    # The bias may differ by a constant, on which no prediction depends.
    bias = np.asarray(found.bias) - np.mean(found.bias)
    expected_bias = expected.intercept_ - expected.intercept_.mean()
    np.testing.assert_allclose(bias, expected_bias, atol=2e-3 * max(scale, 1))
    agree = found.predict(features) == expected.predict(standardised)
    assert agree.mean() > 0.995


def test_separable_classes_are_told_apart():
    features, labels = clusters(400, spread=0.3)
    queries, expected = clusters(200, spread=0.3, seed=5)
    predicted = sweep_predict(features, labels, queries, num_classes=4)
    assert (predicted == expected).mean() == 1


def test_random_labels_stay_at_chance():
    features, labels = np.random.default_rng(0).normal(size=(2, 600, 20)), None
    labels = np.random.default_rng(1).integers(0, 4, 600)
    predicted = sweep_predict(features[0], labels, features[1], num_classes=4)
    other = np.random.default_rng(2).integers(0, 4, 600)
    assert abs((predicted == other).mean() - 0.25) < 0.08


def test_the_penalty_is_chosen_for_what_was_held_out():
    """Few images in many dimensions: without a penalty the fit memorises them."""
    features, labels = clusters(60, width=200, spread=25.0)
    said = []
    options = {"penalties": (1e-6, 1.0), "say": said.append, "num_classes": 4}
    sweep_predict(features, labels, features[:1], **options)
    assert said[0].startswith("penalty 1 ")
    features, labels = clusters(400, spread=3.0)
    options["penalties"] = (1e-4, 1e4)
    sweep_predict(features, labels, features[:1], **options)
    assert said[1].startswith("penalty 0.0001 ")


def test_hold_out_is_stratified_and_seeded():
    labels = np.array([0] * 50 + [1] * 10 + [2])
    held = hold_out(labels, fraction=0.2, seed=3)
    assert [held[labels == c].sum() for c in range(3)] == [10, 2, 0]
    np.testing.assert_array_equal(held, hold_out(labels, fraction=0.2, seed=3))
    assert (held != hold_out(labels, fraction=0.2, seed=4)).any()
    with pytest.raises(UserError, match=r"2 training images.*penalty"):
        sweep_predict(np.eye(3), np.arange(3), np.eye(3), num_classes=3)


def test_a_stop_is_between_iterations():
    features, labels = clusters(50)
    with pytest.raises(KeyboardInterrupt):
        fit(
            features, labels, num_classes=4, penalties=[1.0],
            should_stop=lambda: True,
        )  # fmt: skip


SMALL = [
    "--encoder=random:tiny,embed_dim=16,depth=1,num_heads=2,patch_size=8",
    "--data=configs/quickstart.py",
    "--data.size=32",
    "--train.num_images=60",
    "--test.num_images=30",
    "--scales=50,100",
    "--penalties=0.01,1",
]


def test_the_binary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert linear_probe.main(["xsmae", *SMALL]) == 0
    rows = read(tmp_path / "results.jsonl")
    assert {row.protocol.task for row in rows} == {"linear_probe"}
    assert rows[0].protocol.options["penalties"] == [0.01, 1.0]
    # Two scales and their average, for two features and two controls.
    assert len(rows) == 2 * 3 + 2 * 3
    assert "held-out training images" in capsys.readouterr().out
    assert linear_probe.main(["xsmae", *SMALL]) == 0
    assert len(read(tmp_path / "results.jsonl")) == len(rows)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--penalties=a,b", "penalties=a,b"),
        ("--penalties=-1", "penalties=-1"),
        ("--validation=1", "validation=1.0"),
        ("--penalty=1", "penalty"),
    ],
)
def test_wrong_flags_are_one_line(flag, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert linear_probe.main(["xsmae", *SMALL, flag]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

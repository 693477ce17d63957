"""kNN of standardised features and of other blocks: features, caches, tables."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support.encoders import counting_encoder, tiny_encoder
from tests.support.rows import PROTOCOL, some_row
from tests.support.sources import Fingerprinted, HeldOut
from xsmae.cli import knn, results
from xsmae.errors import UserError
from xsmae.evaluation.evaluate import evaluate
from xsmae.evaluation.rows import append, read
from xsmae.evaluation.tables import create_tables, markdown
from xsmae.evaluation.tasks.catalogue import create_task
from xsmae.evaluation.terminal import terminal_table
from xsmae.evaluation.variants import at_block

TRAIN, TEST = Fingerprinted(30), HeldOut(15, seed=1)


def measured(encoder, folder, **options):
    how = {"k": 3, "scales": (100,), "controls": False, "cache": folder / "cache"}
    return evaluate(encoder, TRAIN, TEST, **how | options)


# Standardised features


def constant_beside(images, gsd):
    """The colour, tiny beside a dimension that depends on the image alone."""
    colour = images.mean(axis=(1, 2))
    large = 1000 + 100 * images[:, 0, 0, :1].astype(float)
    found = np.concatenate([1e-3 * colour, large], axis=1)
    return {"cls": found, "mean": found}


def test_standardising_makes_every_dimension_count(tmp_path):
    encoder = counting_encoder([], encode=constant_beside)
    plain, _ = measured(encoder, tmp_path)
    standard, _ = measured(encoder, tmp_path, standardize=True)
    assert plain.value < 0.6
    assert standard.value == 1.0
    assert plain.feature_scaling == "none"
    assert standard.feature_scaling == "standardised by the training part"
    assert plain.protocol.options == {"k": 3, "temperature": 0.07}
    assert standard.protocol.options["standardize"] is True


def test_the_statistics_are_those_of_the_bank(tmp_path):
    """An offset of the test images alone stays, and hides their colours."""

    class Coarse(HeldOut):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return dataclasses.replace(record, gsd=record.gsd + 100)

    def shifted(images, gsd):
        features = images.mean(axis=(1, 2)) + 1e6 * (gsd[:, :1] > 100)
        return {"cls": features, "mean": features}

    encoder = counting_encoder([], encode=shifted)
    for test, value in ((TEST, 1.0), (Coarse(15, seed=1), 1 / 3)):
        row = evaluate(
            encoder, TRAIN, test, k=3, standardize=True, controls=False, base_size=12,
            feature="cls", cache=tmp_path / str(value),
        )[0]  # fmt: skip
        assert row.value == pytest.approx(value)


def test_across_scales_too(tmp_path):
    encoder = counting_encoder([], encode=constant_beside)
    how = {"task": "knn_cross_scale", "scales": (50, 100), "feature": "cls"}
    (plain,) = measured(encoder, tmp_path, **how)
    (standard,) = measured(encoder, tmp_path, standardize=True, **how)
    assert np.array(standard.cells)[..., 0].min() == 1.0
    assert plain.value < 0.6
    assert standard.protocol.title == "knn_cross_scale (standardize=True)"


# Blocks


def test_tokens_of_a_block_are_those_that_leave_it():
    encoder = tiny_encoder().weights
    images = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), np.uint8)
    gsd = np.full((2, 2), 10.0, np.float32)
    network = encoder.network
    x = network.embed(encoder.bands.normalize(images), gsd=gsd)
    graphdef, layers = nnx.split(network.blocks)
    for block in (1, 2, 3):
        layer = jax.tree.map(lambda leaf, at=block - 1: leaf[at], layers)
        x = nnx.merge(graphdef, layer)(x)
        found = encoder.tokens(images, gsd=gsd, block=block)
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        network.norm(x), encoder.tokens(images, gsd=gsd), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UserError, match="block=4, expected 1 to 3"):
        encoder.tokens(images, gsd=gsd, block=4)


def test_the_features_pool_the_tokens_of_the_block():
    whole = tiny_encoder()
    images = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), np.uint8)
    gsd = np.full((2, 2), 10.0, np.float32)
    found = at_block(whole, 2).encode(images, gsd)
    tokens = np.asarray(whole.weights.tokens(images, gsd=gsd, block=2))
    np.testing.assert_array_equal(found["cls"], tokens[:, 0])
    np.testing.assert_allclose(found["mean"], tokens[:, 1:].mean(axis=1), rtol=1e-5)
    assert not np.allclose(found["cls"], whole.encode(images, gsd)["cls"])


def test_blocks_have_features_of_their_own_in_the_cache(tmp_path, capsys):
    blocks = (None, 1, 3, None, 1, 3)
    computed = []
    for block in blocks:
        rows = measured(tiny_encoder(), tmp_path, block=block)
        computed.append("images/s" in capsys.readouterr().out)
        assert {row.encoder["digest"] for row in rows} == {tiny_encoder().digest}
    assert computed == [True] * 3 + [False] * 3
    # A standardised feature is the same one on disk.
    measured(tiny_encoder(), tmp_path, block=1, standardize=True)
    assert "images/s" not in capsys.readouterr().out


def test_the_controls_get_the_same_treatment(tmp_path):
    encoder = dataclasses.replace(tiny_encoder(), kind="encoder")
    rows = measured(encoder, tmp_path, block=1, standardize=True, controls=True)
    kinds = {row.encoder["kind"] for row in rows}
    assert kinds == {"encoder", "random", "statistics", "thumbnail"}
    assert {row.feature_scaling for row in rows} == {
        "standardised by the training part"
    }
    of = {(row.encoder["kind"], row.feature): row for row in rows}
    # Its own weights are as random, from the same seed.
    assert of["random", "cls"].value == of["encoder", "cls"].value
    assert len({row.protocol.key for row in rows}) == 1


@pytest.mark.parametrize("task", ["knn", "knn_cross_scale"])
@pytest.mark.parametrize("block", [0, 4, -1])
def test_a_block_that_is_not_there_is_refused(tmp_path, block, task):
    with pytest.raises(UserError, match=f"block={block}, .* 3 blocks: give 1 to 3"):
        measured(tiny_encoder(), tmp_path, task=task, block=block, scales=(50, 100))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--encoder=statistics", "--block=1"], "block=1, but encoder=statistics has"),
        (["--encoder=random:tiny,depth=2", "--block=3"], "2 blocks: give 1 to 2"),
        (["--encoder=random:tiny,depth=2", "--block=x"], "block"),
        (["--encoder=statistics", "--standardize=perhaps"], "standardize"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(tmp_path, capsys, arguments, said):
    status = knn.main(
        [
            "knn", "--data=quickstart", "--data.num_images=40", "--test.num_images=20",
            f"--results={tmp_path / 'rows.jsonl'}", *arguments,
        ]
    )  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert not (tmp_path / "rows.jsonl").exists()


def test_other_tasks_have_no_such_options():
    with pytest.raises(UserError, match="linear_probe has no option block"):
        create_task("linear_probe", block=1)


# Tables


def variant(**options):
    return dataclasses.replace(PROTOCOL, options={**PROTOCOL.options, **options})


VARIANTS = [{}, {"standardize": True}, {"block": 2}, {"block": 3, "standardize": True}]


def test_tables_name_what_differs_and_mix_nothing(tmp_path):
    rows = [some_row(protocol=variant(**options)) for options in VARIANTS]
    titles = [
        "knn, tiles",
        "knn (standardize=True), tiles",
        "knn (block=2), tiles",
        "knn (standardize=True, block=3), tiles",
    ]
    tables = create_tables(rows)
    assert [table.heading for table in tables] == titles
    assert [len(table.lines) for table in tables] == [1] * 4
    # Each names them alone too.
    for row, title in zip(rows, titles, strict=True):
        assert create_tables([row])[0].heading == title
        text = markdown(create_tables([row]))
        assert ("without the final norm" in text) == ("block" in row.protocol.options)
        shown = terminal_table([row])
        assert ("standardize" in shown) == ("standardize" in row.protocol.options)
    for row in rows:
        append(tmp_path / "rows.jsonl", row)
    assert read(tmp_path / "rows.jsonl") == rows
    results.write_report([tmp_path / "rows.jsonl"], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("confusion_*.png"))) == 4

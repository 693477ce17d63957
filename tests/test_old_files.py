"""Files of earlier versions still load: `tests/data/v1`, written by version 0.1."""

import json
from pathlib import Path

import ml_collections
import numpy as np

import xsmae
from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.step import verify
from xsmae.evaluation.rows import read
from xsmae.evaluation.tables import create_tables
from xsmae.trainer import create_trainer

OLD = Path(__file__).parent / "data" / "v1"


def test_an_encoder():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    features = xsmae.load_encoder(OLD / "encoder")(images, gsd=1.5)
    expected = json.loads((OLD / "features.json").read_text())
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_checkpoint():
    config = ml_collections.ConfigDict(json.loads((OLD / "config.json").read_text()))
    trainer = create_trainer(config, num_images=4000)
    checkpoints = Checkpoints(OLD / "checkpoints", read_only=True)
    try:
        state = checkpoints.restore(2, trainer.state_shapes(), fingerprint=None)
    finally:
        checkpoints.close()
    assert int(state.step) == 2
    assert verify(OLD / "checkpoints" / "2")


def test_result_rows():
    path = OLD / "results.jsonl"
    rows = read(path)
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.protocol.key for row in rows] == [row["protocol_key"] for row in saved]
    (table,) = create_tables(rows)
    assert len(rows) == sum(len(line.cells) for line in table.lines) == 18

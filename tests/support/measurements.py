"""A measurement on the sources of `sources.py`, and its parts."""

import functools

from tests.support.rows import PROTOCOL
from tests.support.sources import Fingerprinted
from xsmae.evaluation.measure import Measurement, of_frozen_features
from xsmae.evaluation.parts import Parts
from xsmae.evaluation.scales import create_scales
from xsmae.evaluation.subjects import pixel_control


def predict_nearest(bank, labels, queries, *, num_classes):
    """The class of the nearest neighbour."""
    distance = ((queries[:, None] - bank) ** 2).sum(-1)
    return labels[distance.argmin(1)]


def job(tmp_path, test, **changes):
    fields = {
        "encoder": pixel_control("statistics"),
        "parts": Parts("colours", Fingerprinted(30), test),
        "scales": create_scales([50, 100], base=12, patch_size=1),
        "protocol": PROTOCOL,
        "features": ["statistics"],
        "seed": 0,
        "outcomes": functools.partial(of_frozen_features, predict=predict_nearest),
        "results": tmp_path / "results.jsonl",
        "cache": tmp_path / "cache",
        "say": lambda line: None,
    }
    return Measurement(**{**fields, **changes})

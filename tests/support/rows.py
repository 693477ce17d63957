"""A protocol and a result row; each test changes the part that it checks."""

from xsmae.evaluation.measure import INTERVAL
from xsmae.evaluation.rows import Protocol, Result

PROTOCOL = Protocol(
    task="knn",
    metric="accuracy",
    data={
        "name": "tiles",
        "classes": 2,
        "train": {"images": 20, "fingerprint": "a" * 16, "split": "b" * 16},
        "test": {"images": 10, "fingerprint": "c" * 16, "split": "d" * 16},
    },
    base_size=64,
    resize="area",
    gsd_policy="true",
    options={"k": 20, "temperature": 0.07},
    interval=INTERVAL,
)


def some_row(**changes):
    fields = {
        "protocol": PROTOCOL,
        "encoder": {
            "name": "ours", "kind": "encoder", "digest": "e" * 16, "pooling": "mean",
            "normalization": "none",
        },
        "feature": "mean",
        "feature_scaling": "none",
        "scale": 100.0,
        "size": 64,
        "gsd_told": 10.0,
        "seed": 0,
        "value": 0.8,
        "low": 0.7,
        "high": 0.9,
        "class_names": ["field", "roof"],
        "per_class": {"field": 0.6, "roof": 1.0},
        "confusion": [[3, 2], [0, 5]],
        "num_train": 20,
        "num_test": 10,
        "unusable": {"train": 0, "test": 0},
        "leaks": {"pixel_identical_test_images": 0},
        "seconds": 1.0,
        "images_per_second": 30.0,
        "run": {"time": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip
    return Result(**{**fields, **changes})

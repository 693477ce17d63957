"""Result rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping

from xsmae.bands import BANDS, UNITS
from xsmae.evaluation.rows import Result


def csv_text(results: Iterable[Result]) -> str:
    """One line per row; the protocol's key and fields are columns."""
    fields = (
        "protocol", "task", "metric", "data", "classes", "train_images", "test_images",
        "train_fingerprint", "test_fingerprint", "train_split", "test_split",
        "base_size", "crop", "resize", "gsd_policy", "options", "encoder", "kind",
        "digest", "normalization", "feature", "feature_scaling", "scale", "size",
        "gsd_told", "seed", "value", "low", "high", "pixel_identical_test_images",
        "bands", "units", "metrics", "per_class", "cells",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in results:
        protocol, data = row.protocol, row.protocol.data
        writer.writerow(
            {
                "protocol": protocol.key,
                **{n: getattr(protocol, n) for n in ("task", "metric", "base_size")},
                **{n: getattr(protocol, n) for n in ("crop", "resize", "gsd_policy")},
                "data": data["name"],
                "classes": data["classes"],
                "train_images": row.num_train,
                "test_images": row.num_test,
                **{
                    f"{part}_{name}": data[part][name]
                    for part in ("train", "test")
                    for name in ("fingerprint", "split")
                },
                "options": " ".join(f"{k}={v}" for k, v in protocol.options.items()),
                "encoder": row.encoder["name"],
                **{n: row.encoder[n] for n in ("kind", "digest", "normalization")},
                **{n: getattr(row, n) for n in ("feature", "feature_scaling", "seed")},
                **{n: getattr(row, n) for n in ("value", "low", "high")},
                **{n: _joined(getattr(row, n)) for n in ("scale", "size", "gsd_told")},
                "pixel_identical_test_images": row.leaks["pixel_identical_test_images"],
                "bands": " ".join(row.encoder.get("bands", BANDS)),
                "units": data.get("units", UNITS),
                "metrics": _numbers({k: v[0] for k, v in (row.metrics or {}).items()}),
                "per_class": _numbers(row.per_class),
                "cells": _numbers(_cells(row)),
            }
        )
    return text.getvalue()


def _cells(row: Result) -> dict[str, float]:
    """`BANK>QUERIES`, two scales in percent -> accuracy, of rows with cells."""
    return {
        f"{bank:g}>{queries:g}": cell[0]
        for bank, cells in zip(row.scales or (), row.cells or (), strict=False)
        for queries, cell in zip(row.scales, cells, strict=True)
    }


def _numbers(values: Mapping[str, float]) -> str:
    return "; ".join(f"{name}={value:.6g}" for name, value in values.items())


def _joined(value) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

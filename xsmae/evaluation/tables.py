"""Result rows side by side: one table a protocol, as Markdown, CSV and plain text."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence

from xsmae.evaluation.rows import AVERAGE, Protocol, Result

# In the order of a table: what is measured first, then what it has to beat.
KINDS = ("encoder", "random", "thumbnail", "statistics")
FEATURE_NAMES = {"cls": "class token", "mean": "mean patch"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: who was measured, and its rows by column."""

    name: str
    kind: str
    digest: str
    feature: str
    seed: int
    cells: dict[tuple, Result]


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of one protocol. columns: as `Result.column`, the average last."""

    protocol: Protocol
    columns: list[tuple]
    lines: list[Line]


def create_tables(results: Iterable[Result]) -> list[Table]:
    """A table a protocol, in the order in which the protocols appear.

    Of rows with one identity the first is taken.
    """
    grouped: dict[str, dict[tuple, Line]] = {}
    protocols = {}
    for row in results:
        protocols.setdefault(row.protocol.key, row.protocol)
        lines = grouped.setdefault(row.protocol.key, {})
        who = (row.encoder["digest"], row.feature, row.seed)
        if who not in lines:
            name, kind = row.encoder["name"], row.encoder["kind"]
            lines[who] = Line(name, kind, *who, {})
        lines[who].cells.setdefault(row.column, row)
    tables = []
    for key, lines in grouped.items():
        columns = {column for line in lines.values() for column in line.cells}
        average = sorted(c for c in columns if c[0] == AVERAGE)
        ordered = sorted(c for c in columns if c[0] != AVERAGE) + average
        # Stable: within a kind, as they were measured.
        lines = sorted(lines.values(), key=lambda line: _rank(line.kind))
        tables.append(Table(protocols[key], ordered, lines))
    return tables


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else 0


def label(line: Line, table: Table) -> str:
    """What a table calls a line; with digest or seed where the name alone is shared."""
    same = [other for other in table.lines if other.name == line.name]
    text = line.name
    if len({other.digest for other in same}) > 1:
        text += f" [{line.digest[:6]}]"
    if len({other.seed for other in same}) > 1:
        text += f", seed {line.seed}"
    return text


def heading(column: tuple, table: Table) -> str:
    """`50 % (128 px)`, `average`; of several averages which scales they are of."""
    if column[0] != AVERAGE:
        return f"{column[0]:g} % ({column[1]} px)"
    if sum(other[0] == AVERAGE for other in table.columns) == 1:
        return "average"
    return "average of " + ", ".join(
        f"{p:g} % ({s} px)" for p, s in zip(*column[1:], strict=True)
    )


def cell(row: Result | None) -> str:
    """Percent and its interval, `80.6 [79.5, 81.6]`."""
    if row is None:
        return "-"
    value, low, high = (100 * x for x in (row.value, row.low, row.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def markdown(tables: Sequence[Table]) -> str:
    """Every table with its whole protocol under it."""
    parts = ["# Results", ""]
    for table in tables:
        protocol = table.protocol
        parts += [f"## {protocol.task}, {protocol.data['name']} ({protocol.key})", ""]
        header = ["", "feature", *(heading(c, table) for c in table.columns)]
        parts += [_row(header), _row(["---", "---", *["---:"] * len(table.columns)])]
        for line in table.lines:
            feature = FEATURE_NAMES.get(line.feature, line.feature)
            cells = [cell(line.cells.get(column)) for column in table.columns]
            parts.append(_row([label(line, table), feature, *cells]))
        parts += ["", *(f"- {text}" for text in statements(table)), ""]
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in cells)} |"


def statements(table: Table) -> list[str]:
    """The protocol in full, a fact a line, and what the lines differ in beside it."""
    protocol, rows = (
        table.protocol,
        [r for ln in table.lines for r in ln.cells.values()],
    )
    data, interval = protocol.data, protocol.interval
    parts = (data["train"], data["test"])
    facts = [
        f"{protocol.metric} in percent with its {100 * interval['level']:g} % interval "
        f"({interval['method']}, {interval['resamples']} resamples)",
        f"data: {data['name']}, {data['classes']} classes, {parts[0]['images']} "
        f"training and {parts[1]['images']} test images; fingerprints "
        f"{parts[0]['fingerprint']} / {parts[1]['fingerprint']}, splits "
        f"{parts[0]['split']} / {parts[1]['split']}",
        f"images: {protocol.crop} of the source to the column's size, "
        f"{protocol.resize}; 100 % is {protocol.base_size} px, to the nearest multiple "
        "of the patch",
        "GSD told to the encoder: "
        + (
            "the true one of each scale"
            if protocol.gsd_policy == "true"
            else "that of 100 % at every scale (an ablation)"
        ),
        f"{protocol.task}: "
        + ", ".join(f"{k}={v}" for k, v in protocol.options.items()),
    ]
    leaked = max(row.leaks["pixel_identical_test_images"] for row in rows)
    if leaked:
        facts.append(
            f"{leaked} test image(s) equal a training image pixel for pixel; they count"
        )
    unusable = max(sum(row.unusable.values()) for row in rows)
    if unusable:
        facts.append(f"{unusable} image(s) that cannot be used are left out")
    for line in table.lines:
        row = next(iter(line.cells.values()))
        told = [
            f"{c[0]:g} %: {line.cells[c].gsd_told:.4g}"
            for c in table.columns
            if c[0] != AVERAGE and c in line.cells and line.cells[c].gsd_told
        ]
        images, features = (
            "as they are" if text == "none" else text
            for text in (row.encoder["normalization"], row.feature_scaling)
        )
        fact = (
            f"{label(line, table)}: digest {line.digest}, images {images}, features "
            f"{features}, seed {line.seed}, "
            + (f"median GSD told {', '.join(told)} m" if told else "reads no GSD")
        )
        if fact not in facts:
            facts.append(fact)
    return facts


def csv_text(results: Iterable[Result]) -> str:
    """A line a row, with the protocol's key and its parts in columns."""
    fields = (
        "protocol", "task", "metric", "data", "classes", "train_images", "test_images",
        "train_fingerprint", "test_fingerprint", "train_split", "test_split",
        "base_size", "crop", "resize", "gsd_policy", "options", "encoder", "kind",
        "digest", "normalization", "feature", "feature_scaling", "scale", "size",
        "gsd_told", "seed", "value", "low", "high", "pixel_identical_test_images",
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
            }
        )
    return text.getvalue()


def _joined(value) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def terminal_table(results: Sequence[Result]) -> str:
    """What a binary prints at its end."""
    lines = []
    for table in create_tables(results):
        rows = [["", "", *(heading(c, table) for c in table.columns)]]
        for line in table.lines:
            cells = [cell(line.cells.get(column)) for column in table.columns]
            rows.append([label(line, table), line.feature, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            first = [text.ljust(w) for text, w in zip(row[:2], widths, strict=False)]
            others = zip(row[2:], widths[2:], strict=True)
            lines.append("  ".join([*first, *(text.rjust(w) for text, w in others)]))
        lines += ["", *_warnings(table)]
    return "\n".join(["", *lines])


def _warnings(table: Table) -> list[str]:
    rows = [row for line in table.lines for row in line.cells.values()]
    leaks = next(
        (r.leaks for r in rows if r.leaks["pixel_identical_test_images"]), None
    )
    if leaks is None:
        return []
    example = leaks["example"]
    return [
        f"{leaks['pixel_identical_test_images']} test image(s) equal a training image "
        f"pixel for pixel, e.g. {example['test']} and {example['train']}"
    ]

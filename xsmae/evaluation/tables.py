"""Tables of result rows, one per protocol, as Markdown."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from xsmae.evaluation.cells import cell, explain_marks
from xsmae.evaluation.details import details, without_truth
from xsmae.evaluation.matrices import MEANS, columns_of, explain_means, matrices
from xsmae.evaluation.naming import (
    bands_of,
    changes,
    data_names,
    encoder_names,
    headings,
)
from xsmae.evaluation.rows import AVERAGE, Protocol, Result

# The order of lines in a table: encoders first, then the controls.
KINDS = ("encoder", "random", "thumbnail", "statistics")
FEATURE_NAMES = {"cls": "class token", "mean": "mean patch"}
BEATS = "beats controls"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: an encoder and its rows by column.

    name: unique among the encoders and seeds of the report.
    """

    name: str
    kind: str
    digest: str
    feature: str
    seed: int
    cells: dict[tuple, Result]

    @property
    def feature_name(self) -> str:
        """`class token`, `mean patch`, or the feature of a pixel control."""
        return FEATURE_NAMES.get(self.feature, self.feature)


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of one protocol. columns: `Result.column`s, averages last.

    data: the name of the data, unique in the report. heading: task and data, also
    unique.
    """

    protocol: Protocol
    data: str
    heading: str
    columns: list[tuple]
    lines: list[Line]


def create_tables(results: Iterable[Result]) -> list[Table]:
    """One table per protocol, in the order in which protocols appear.

    Of rows with the same identity, only the first counts.
    """
    rows = list(results)
    protocols = {row.protocol.key: row.protocol for row in reversed(rows)}
    encoders = {row.encoder["digest"]: row.encoder for row in reversed(rows)}
    names = encoder_names(encoders)
    seeds = collections.defaultdict(set)
    grouped: dict[str, dict[tuple, dict[tuple, Result]]] = {}
    for row in rows:
        digest = row.encoder["digest"]
        seeds[digest].add(row.seed)
        lines = grouped.setdefault(row.protocol.key, {})
        cells = lines.setdefault((digest, row.feature, row.seed), {})
        for column, shown in columns_of(row).items():
            cells.setdefault(column, shown)

    def line(digest: str, feature: str, seed: int, cells: dict) -> Line:
        name = names[digest] + f", seed {seed}" * (len(seeds[digest]) > 1)
        return Line(name, encoders[digest]["kind"], digest, feature, seed, cells)

    data, titles = data_names(protocols), headings(protocols)
    tables = []
    for key, of_table in grouped.items():
        columns = {column for cells in of_table.values() for column in cells}
        average = sorted(c for c in columns if c[0] == AVERAGE)
        ordered = sorted(c for c in columns if c[0] != AVERAGE) + average
        lines = [line(*who, cells) for who, cells in of_table.items()]
        # The sort is stable: within a kind, lines keep the order of measurement.
        lines.sort(key=lambda line: _rank(line.kind))
        tables.append(Table(protocols[key], data[key], titles[key], ordered, lines))
    return tables


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else 0


def heading(column: tuple, table: Table) -> str:
    """`50 % (128 px)`, or a mean over scales, with them if a table has several."""
    if column[0] != AVERAGE:
        windows = "windows of " if keeps_size(table.protocol) else ""
        return f"{column[0]:g} % ({windows}{column[1]} px)"
    mean = MEANS[column[3]] if column[3:] else "average"
    if len({other[:3] for other in table.columns if other[0] == AVERAGE}) == 1:
        return mean
    return f"{mean} of " + ", ".join(
        f"{p:g} % ({s} px)" for p, s in zip(*column[1:3], strict=True)
    )


def keeps_size(protocol: Protocol) -> bool:
    """True if 100 % is the images' own size, as in segmentation."""
    return not protocol.base_size


def rival(line: Line, table: Table) -> tuple[tuple, Line] | None:
    """The column in which a line is compared, and the best control there.

    The column is the average over scales, or else 100 %, or else the largest scale: the
    first of these in which both the line and a control have a row. The best control has
    the highest value there, over all features and seeds. It is chosen by the test
    images, which favours the controls. None if the line is a control, or if no control
    has a row in any column of the line.
    """
    if line.kind == "encoder":
        columns = sorted(table.columns, key=lambda c: (c[0] == AVERAGE, c[0] == 100.0))
        for column in reversed(columns):
            controls = [
                other
                for other in table.lines
                if other.kind != "encoder" and column in other.cells
            ]
            if column in line.cells and controls:
                return column, max(controls, key=lambda c: c.cells[column].value)
    return None


def verdict(line: Line, table: Table) -> str:
    """Whether an encoder clearly beats the best control; see `rival`.

    `yes`: the lower end of its interval is above the upper end of the control's. `no`:
    its value is not above the control's. `not told`: its value is above the control's,
    but the intervals overlap. `no control`: there is nothing to compare with. `-`: the
    line is a control.
    """
    if line.kind != "encoder":
        return "-"
    found = rival(line, table)
    if found is None:
        return "no control"
    column, control = found
    row, other = line.cells[column], control.cells[column]
    if row.low > other.high:
        return "yes"
    return "not told" if row.value > other.value else "no"


def rivals(table: Table) -> list[str]:
    """The controls that a table's encoders are compared with, one line per column."""
    compared = dict(filter(None, (rival(line, table) for line in table.lines)))
    return [
        f"{BEATS}: compared at {heading(column, table)} with the best control, "
        f"{control.name}, {control.feature_name}: {cell(control.cells[column])}"
        for column, control in compared.items()
    ]


def markdown(
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType({}),
) -> str:
    """All tables, each followed by its protocol and figures; digests in an appendix.

    figures: protocol key -> (title, file) of each figure. The files are links relative
    to the document.
    """
    parts = ["# Results", ""]
    for table in tables:
        parts += [f"## {_literal(table.heading)}", ""]
        header = ["", "feature", *(heading(c, table) for c in table.columns), BEATS]
        parts += [_row(header)]
        parts += [_row(["---", "---", *["---:"] * len(table.columns), "---"])]
        for line in table.lines:
            cells = [cell(line.cells.get(column)) for column in table.columns]
            parts.append(
                _row([line.name, line.feature_name, *cells, verdict(line, table)])
            )
        parts += ["", *_details(table), *_matrices(table)]
        parts += [*(f"- {_literal(text)}" for text in statements(table)), ""]
        for title, file in figures.get(table.protocol.key, ()):
            parts += [f"![{_literal(title)}]({file})", ""]
    return "\n".join([*parts, *appendix(tables)])


def _details(table: Table) -> list[str]:
    """The other metrics, and the IoU of each class, of each row of a segmentation."""
    header, lines = details(table.lines)
    if not lines:
        return []
    ruler = _row(["---", "---", *["---:"] * (len(header) - 2)])
    return [_row(header), ruler, *map(_row, lines), ""]


def _matrices(table: Table) -> list[str]:
    """The cells of each row of an evaluation across scales."""
    parts = []
    for title, (header, *lines) in matrices(table.lines):
        ruler = ["---", *["---:"] * (len(header) - 1)]
        parts += [f"{_literal(title)}:", "", *map(_row, (header, ruler, *lines)), ""]
    return parts


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_literal, cells))} |"


def _literal(text: str) -> str:
    """Escape a name for Markdown: no formulas, no emphasis, one line."""
    return re.sub(r"([\\`*<$|])", r"\\\1", " ".join(text.split()))


def appendix(tables: Sequence[Table]) -> list[str]:
    """The digests of protocols, data and encoders, and the numbered classes."""
    lines = [f"- {t.heading}: protocol {t.protocol.key}" for t in tables]
    for table in tables:
        parts = [
            f"{part} fingerprint {table.protocol.data[part]['fingerprint']}, split "
            f"{table.protocol.data[part]['split']}"
            for part in ("train", "test")
        ]
        row = next(iter(table.lines[0].cells.values()))
        classes = ", ".join(f"{i} {name}" for i, name in enumerate(row.class_names))
        lines.append(f"- {table.data}: {'; '.join(parts)}; classes {classes}")
    every = [line for table in tables for line in table.lines]
    lines += [f"- {line.name}: digest {line.digest}" for line in every]
    facts = map(_literal, dict.fromkeys(lines))
    return ["## Appendix: digests and classes", "", *facts, ""]


def statements(table: Table) -> list[str]:
    """The protocol, one fact per line, then the differences between the lines."""
    protocol = table.protocol
    data, interval = protocol.data, protocol.interval
    rows = [row for line in table.lines for row in line.cells.values()]
    facts = [
        f"{protocol.metric} in percent with its {100 * interval['level']:g} % interval "
        f"({interval['method']}, {interval['resamples']} resamples)",
        f"data: {table.data}, {data['classes']} classes, {data['train']['images']} "
        f"training and {data['test']['images']} test images" + values_of(protocol),
        _images(protocol),
        "GSD given to the encoder: "
        + (
            "the true GSD of each scale"
            if protocol.gsd_policy == "true"
            else "the GSD of 100 % at every scale (an ablation)"
        ),
        f"{protocol.task}: "
        + ", ".join(f"{k}={v}" for k, v in protocol.options.items()),
        *changes(protocol),
        *explain_means(table.lines),
        *_compared(table),
        *without_truth(table.lines),
        *explain_marks(table.lines),
    ]
    leaked = max(row.leaks["pixel_identical_test_images"] for row in rows)
    if leaked:
        facts.append(
            f"{leaked} test image(s) have the pixels of a training image; they count"
        )
    unusable = max(sum(row.unusable.values()) for row in rows)
    if unusable:
        facts.append(f"{unusable} unusable image(s) are left out")
    for line in table.lines:
        row = next(iter(line.cells.values()))
        told = [f"{scale:g} %: {gsd:.4g}" for scale, gsd in _told(line)]
        images, features = (
            "as they are" if text == "none" else text
            for text in (row.encoder["normalization"], row.feature_scaling)
        )
        fact = (
            f"{line.name}: images {images}, features {features}, seed {line.seed}, "
            + (f"median GSD given {', '.join(told)} m" if told else "reads no GSD")
        )
        if fact not in facts:
            facts.append(fact)
    return facts


def _told(line: Line) -> list[tuple[float, float]]:
    """The scales of a line and the GSD that its encoder got, if it reads the GSD."""
    found = {}
    for row in line.cells.values():
        if row.gsd_told and (row.scale != AVERAGE or row.cells):
            scales = row.scales if row.cells else [row.scale]
            found |= zip(scales, np.ravel(row.gsd_told), strict=True)
    return sorted(found.items())


def _images(protocol: Protocol) -> str:
    """How images are cut and resized."""
    if keeps_size(protocol):
        return (
            f"images: whole, in {protocol.crop}; resized to the column's percentage of "
            f"their own size ({protocol.resize})"
        )
    return (
        f"images: {protocol.crop} of the source, resized to the size of the scale "
        f"({protocol.resize}); 100 % is {protocol.base_size} px; sizes are multiples "
        "of the patch size"
    )


def values_of(protocol: Protocol) -> str:
    """The bands and units of rasters, for the end of a sentence."""
    if "bands" not in protocol.data:
        return ""
    return f", bands {', '.join(bands_of(protocol))}, {protocol.data['units']}"


def _compared(table: Table) -> list[str]:
    """An explanation of the column of verdicts."""
    if not (found := rivals(table)):
        return [f"{BEATS}: no control has a row here to compare with"]
    return [
        *found,
        f"{BEATS}: yes if the line's whole interval is above the control's; no if its "
        "value is not above the control's; not told if its value is above but the "
        "intervals overlap. The control is the best of this table over all controls, "
        "features and seeds, chosen by the test images. Each line is compared by its "
        "own feature",
    ]

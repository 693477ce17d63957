"""What devices send each other in a step, read from the compiled program's text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\("
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
# TPUs: the axes of a mesh, and those, or parts of those, that a group goes along.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One kind of exchange among groups of `group` devices.

    count: how often in a step. size: bytes in all, of the whole array that is reduced
    or gathered. sent: bytes that each device sends, in a ring.
    """

    kind: str
    group: int
    count: int
    size: float
    sent: float


def read_collectives(text: str, devices: int) -> list[Collective]:
    """Those of an optimised HLO module for `devices`, loops counted as often as they
    run. Raises ValueError where the text does not tell how often that is."""
    lines, entry = _computations(text)
    found = collections.defaultdict(lambda: [0, 0.0])
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        for line in lines[name]:
            inner = times
            if " while(" in line:
                inner = times * _trips(line, lines)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.-]+", branches)
            waiting += [(other, inner) for other in called if other in lines]
            operation = _OPERATION.search(line)
            if operation:
                group = _group(line, devices)
                counted = found[operation["kind"], group]
                counted[0] += times
                counted[1] += times * _size(operation, group)
    return sorted(
        Collective(kind, group, count, size, _sent(kind, group) * size)
        for (kind, group), (count, size) in found.items()
        if group > 1
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    lines, name, entry = {}, "", ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """How often a loop runs: said of it, or what its condition compares with."""
    said = _TRIPS.search(line)
    if said:
        return int(said[1])
    condition = _CONDITION.search(line)
    constants = _CONSTANT.findall("\n".join(lines[condition[1]]))
    if len(constants) != 1:
        raise ValueError(f"how often a loop runs is not told: {line.strip()[:100]}")
    return int(constants[0])


def _group(line: str, devices: int) -> int:
    mesh = _MESH.search(line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        along = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in along)
    groups = _GROUPS.search(line)
    if groups is None:
        return devices
    return int(groups[1]) if groups[1] else len(groups[2].split(","))


def _size(operation: re.Match, group: int) -> float:
    """Bytes of the whole array: a gather's result, what a scatter begins with."""
    total = sum(
        math.prod(int(n) for n in sizes.split(",") if n)
        * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) / 8)
        for kind, sizes in _ARRAY.findall(operation["shape"])
    )
    if operation["kind"] == "reduce-scatter":
        return total * group
    if operation["start"] and operation["kind"] == "all-gather":
        return total * group / (group + 1)  # the operands are named as well
    if operation["start"] and operation["kind"] == "collective-permute":
        return total / 2
    return total


def _sent(kind: str, group: int) -> float:
    """The part of the whole that a device sends in a ring of `group`."""
    if kind == "collective-permute":
        return 1.0
    return (group - 1) / group * (2 if kind == "all-reduce" else 1)

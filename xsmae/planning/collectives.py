"""Reads from a compiled program's text which data devices exchange in a step."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np

from xsmae.errors import UserError

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
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\}|\{\})")
# Groups in short form: arange in one shape, transposed, then read in another shape.
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# TPUs: the axes of a mesh, and the axes (or parts of axes) along which groups lie.
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<counts>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<along>[^}]*)\}"
)
# TPUs split an exchange into pieces that look like whole exchanges.
_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One kind of exchange in groups of `group` devices on `hosts` hosts.

    count: times per step. size: total bytes of the arrays that are reduced or gathered.
    sent: bytes that each device sends, if devices form a ring.
    """

    kind: str
    group: int
    hosts: int
    count: int
    size: float
    sent: float

    @property
    def cards(self) -> int:
        """How many devices of a host share the traffic to other hosts (in a ring)."""
        ring = self.kind in ("all-reduce", "all-gather", "reduce-scatter")
        return self.group // self.hosts if ring else 1


def read_collectives(text: str, devices: int, a_host: int) -> list[Collective]:
    """The collectives of an optimised HLO module for `devices` devices.

    a_host: consecutive devices per host. An exchange in a loop counts as often as the
    loop runs. Raises UserError if the text does not show how often a loop runs, or
    which devices take part.
    """
    lines, entry = _computations(text)
    found = collections.defaultdict(lambda: [0, 0.0])
    chains = {}
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
                groups = _groups(line, devices)
                group = groups.shape[1]
                hosts = max(len(set(members // a_host)) for members in groups)
                key = operation["kind"], group, hosts
                size = _size(operation, group)
                chain = _CHAIN.search(line)
                if chain:
                    # Pieces also occur in loops, but outside them only once: take that.
                    least = chains.get(chain[1], (key, times, size))[1]
                    chains[chain[1]] = key, min(times, least), size
                else:
                    found[key][0] += times
                    found[key][1] += times * size
    for key, times, size in chains.values():
        found[key][0] += times
        found[key][1] += times * size
    return sorted(
        Collective(kind, group, hosts, count, size, _sent(kind, group) * size)
        for (kind, group, hosts), (count, size) in found.items()
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
    """How often a loop runs: its annotation, or the constant in its condition."""
    said = _TRIPS.search(line)
    if said:
        return int(said[1])
    condition = _CONDITION.search(line)
    constants = _CONSTANT.findall("\n".join(lines[condition[1]]))
    if len(constants) != 1:
        raise _unread("how often a loop runs", line)
    return int(constants[0])


def _groups(line: str, devices: int) -> np.ndarray:
    """Which devices exchange data, [groups, devices per group]; or pairs."""
    counted = _COUNTED.search(line)
    if counted:
        shape, counts, order = (_numbers(part or "") for part in counted.groups())
        return _counted(counts, order).reshape(shape)
    mesh = _MESH.search(line)
    if mesh:
        return _along(mesh)
    groups = _GROUPS.search(line)
    if groups is None and "replica_groups=" in line:
        raise _unread("which devices exchange data", line)
    if groups is None or groups[1] == "{}":
        return np.arange(devices)[None]
    rows = [_numbers(row) for row in re.findall(r"\{([\d,]+)\}", groups[1])]
    return np.array(rows)


def _counted(counts: list[int], order: list[int]) -> np.ndarray:
    return np.arange(math.prod(counts)).reshape(counts).transpose(order or None)


def _along(mesh: re.Match) -> np.ndarray:
    """Groups along axes of a mesh, or along parts of axes, `:(before)size`."""
    axes = re.findall(r"'(\w+)'=(\d+)", mesh["sizes"])
    sizes = {axis: int(size) for axis, size in axes}
    numbers = _counted(
        _numbers(mesh["counts"] or "") or [math.prod(sizes.values())],
        _numbers(mesh["order"] or ""),
    )
    taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh["along"])
    parts = {
        axis: (int(before or 1), int(size or sizes[axis]))
        for axis, before, size in taken
    }
    split = []
    for axis, size in sizes.items():
        before, along = parts.get(axis, (1, 1))
        split += [before, along, size // before // along]
    middle = range(1, len(split), 3)
    numbers = np.moveaxis(numbers.reshape(split), middle, range(-len(middle), 0))
    return numbers.reshape(-1, math.prod(along for _, along in parts.values()))


def _unread(what: str, line: str) -> UserError:
    return UserError(
        f"cannot read {what} from {line.strip()[:200]!r}: install the versions of "
        "constraints.txt"
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _size(operation: re.Match, group: int) -> float:
    """Bytes of the whole array: the result of a gather, the operand of a scatter."""
    total = sum(
        math.prod(int(n) for n in sizes.split(",") if n)
        * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) / 8)
        for kind, sizes in _ARRAY.findall(operation["shape"])
    )
    if operation["start"] and operation["kind"] in ("all-gather", "reduce-scatter"):
        return total * group / (group + 1)  # the shape also lists the operands
    if operation["kind"] == "reduce-scatter":
        return total * group
    if operation["start"] and operation["kind"] == "collective-permute":
        return total / 2
    return total


def _sent(kind: str, group: int) -> float:
    """The share of the array that each device sends in a ring of `group`."""
    if kind == "collective-permute":
        return 1.0
    return (group - 1) / group * (2 if kind == "all-reduce" else 1)

"""The lists of all config fields, from the configs, the methods and their comments.

    python docs/config_fields.py

prints them. A field's meaning is the comment above it or behind it in the code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from xsmae.configs import common

from xsmae import methods
from xsmae.config import INSTALLED_CONFIGS, RANGES, flatten, read_config
from xsmae.ranges import expected_number
from xsmae.run import choices

METHODS_FOLDER = Path(methods.__file__).parent
SIZE = "base"  # of the network whose fields are shown
SHARED = "mae"  # the method that has no fields but its loss term's


class Comments:
    """The comments of a Python file, by line."""

    def __init__(self, path: Path):
        text = path.read_text()
        self.tree = ast.parse(text)
        self._above: dict[int, str] = {}
        self._behind: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                alone = token.line.lstrip().startswith("#")
                found = self._above if alone else self._behind
                found[token.start[0]] = token.string.removeprefix("#").strip()

    def of(self, first: int, last: int) -> str:
        """The comment lines above line `first`, and what stands behind up to `last`."""
        start = first
        while start - 1 in self._above:
            start -= 1
        lines = [self._above[line] for line in range(start, first)]
        lines += [self._behind[n] for n in range(first, last + 1) if n in self._behind]
        return " ".join(lines)


def common_meanings() -> dict[str, str]:
    """Dotted field -> its comment in configs/common.py."""
    found = Comments(Path(common.__file__))
    (function,) = (
        node
        for node in found.tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_common"
    )
    groups, meanings = {"config": ""}, {}
    for statement in ast.walk(function):
        if not isinstance(statement, ast.Assign):
            continue
        names = [n for target in statement.targets for n in _names(target, groups)]
        for target in statement.targets:
            if isinstance(target, ast.Name) and names:
                groups[target.id] = f"{names[0]}."
        meaning = found.of(statement.lineno, statement.end_lineno)
        meanings |= dict.fromkeys(names, meaning)
    return meanings


def _names(target: ast.expr, groups: Mapping[str, str]) -> Iterator[str]:
    """The dotted fields that an assignment to `target` sets."""
    if isinstance(target, ast.Tuple):
        for part in target.elts:
            yield from _names(part, groups)
    elif isinstance(target, ast.Attribute):
        owner = target.value
        path = [target.attr]
        while isinstance(owner, ast.Attribute):
            path.insert(0, owner.attr)
            owner = owner.value
        if isinstance(owner, ast.Name) and owner.id in groups:
            yield groups[owner.id] + ".".join(path)


def method_meanings(name: str) -> dict[str, str]:
    """Dotted field -> its comment in the method's own file."""
    found = Comments(METHODS_FOLDER / f"{name}.py")
    (function,) = (
        node
        for node in found.tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "fields"
    )
    (given,) = (node for node in ast.walk(function) if isinstance(node, ast.Return))
    return dict(_entries(given.value, found, ""))


def _entries(node: ast.expr, found: Comments, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant):
            continue  # the fields of another method, which its own file explains
        if isinstance(value, ast.Dict):
            yield from _entries(value, found, f"{prefix}{key.value}.")
        else:
            yield prefix + key.value, found.of(key.lineno, value.end_lineno)


def data_meanings(path: Path) -> dict[str, str]:
    """Field of `data` -> its comment in a config file."""
    found, meanings = Comments(path), {}
    for node in ast.walk(found.tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.targets[0]) == "config.data"
            for word in node.value.keywords if called else ():
                meaning = found.of(word.value.lineno, word.value.end_lineno)
                meanings[word.arg] = meaning
    return meanings


def common_page() -> str:
    """The fields that every config has."""
    config = common.get_common(preset="published", size=SIZE, method=SHARED)
    own = flatten_fields(methods.METHODS[SHARED], "published")
    config.method = common.parse_argument(None)["method"]
    meanings = common_meanings()
    return "\n".join(
        entry(name, meanings[name], shown(name, config), allowed(name, RANGES))
        for name in flatten(config.to_dict())
        if name not in own
    )


def method_page(name: str) -> str:
    """The fields that a method adds, or sets anew, with the value of each preset."""
    method = methods.METHODS[name]
    meanings = common_meanings()
    for other in (*methods.METHODS, name):  # its own comments come last, and count
        meanings |= {k: v for k, v in method_meanings(other).items() if v}
    presets = {
        f"`{preset}`": flatten_fields(method, preset) for preset in method.presets
    }
    entries = []
    for field in next(iter(presets.values())):
        values = {preset: code(found[field]) for preset, found in presets.items()}
        same = len(set(values.values())) == 1
        told = next(iter(values.values()))
        if not same:
            told = ", ".join(f"{value} in {preset}" for preset, value in values.items())
        ranges = allowed(field, {**RANGES, **method.ranges})
        meaning = meanings.get(field, "")
        if field.endswith(".weight"):
            meaning = meaning or "The weight of this loss term; 0 switches it off"
        entries.append(entry(field, meaning, told, ranges))
    if method.unused:
        lacked = ", ".join(f"`{field}`" for field in method.unused)
        entries.append(f"It has no {lacked}.\n")
    return "\n".join(entries)


def flatten_fields(method: methods.Method, preset: str) -> dict[str, Any]:
    """A method's own fields, dotted, for a network of SIZE."""
    model = common.get_common(preset="published", size=SIZE, method=SHARED).model
    groups = method.fields(preset, size=SIZE, model=model.to_dict())
    return flatten({name: dict(values) for name, values in groups.items()})


def config_page(path: Path) -> str:
    """What a config sets: its `data`, and what differs from the common fields."""
    config = read_config(str(path), path.stem)
    start = common.get_common(preset="corrected", size=size_of(config))
    base = flatten(start.to_dict())
    found = flatten(config.to_dict())
    meanings, entries = data_meanings(path), []
    for name, value in found.items():
        group, _, field = name.partition(".")
        if group == "data" or name not in base or base[name] != value:
            meaning = meanings.get(field, "") if group == "data" else ""
            entries.append(entry(name, meaning, shown(name, config)))
    about = ast.get_docstring(Comments(path).tree)
    return "\n".join([about, "", *entries])


def size_of(config: ml_collections.ConfigDict) -> str:
    """The name of a config's default size, by the width of its network."""
    widths = {encoder[0]: name for name, (encoder, _) in common.SIZES.items()}
    return widths[config.model.embed_dim]


def config_files() -> list[Path]:
    """The configs that come with xsmae, without what they share."""
    files = sorted(INSTALLED_CONFIGS.glob("[a-z]*.py"))
    return [path for path in files if path.name != "common.py"]


def shown(name: str, config: ml_collections.ConfigDict) -> str:
    """The value of a field, or who sets it."""
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    if config[last] is not None:
        return code(config[last])
    return "chosen at the start" if name in choices.FIELDS else "none"


def code(value: Any) -> str:
    """A value as the command line takes it."""
    return f"`{rounded(value)}`" if value != "" else ""


def rounded(value: Any) -> str:
    """A value's text, without digits that mean nothing."""
    if isinstance(value, tuple):
        return f"({', '.join(map(rounded, value))}{',' * (len(value) == 1)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def allowed(name: str, ranges: Mapping[str, tuple[float, float]]) -> str:
    """The numbers that a field may have."""
    return expected_number(*ranges[name]) if name in ranges else ""


def entry(name: str, meaning: str, value: str, ranges: str = "") -> str:
    """A field and its description, as an item of a Markdown definition list."""
    if re.match(r"[a-z]{2}", meaning):
        meaning = meaning[0].upper() + meaning[1:]
    if meaning:
        meaning = f"{meaning.removesuffix('.')}. "
    ranges = f" ({ranges})" if ranges else ""
    return f"`{name}`\n: {meaning}Default: {value or 'an empty text'}{ranges}.\n"


def pages() -> dict[str, str]:
    """File name -> its content."""
    found = {"common.md": common_page()}
    for name in methods.METHODS:
        found[f"method_{name}.md"] = method_page(name)
    for path in config_files():
        found[f"config_{path.stem}.md"] = config_page(path)
    return found


def write(folder: Path) -> None:
    """Write every page into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (folder / name).write_text(content + "\n")


if __name__ == "__main__":
    for content in pages().values():
        print(content, end="\n\n")

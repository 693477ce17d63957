"""The import rule: imports go down and have no cycles; files stay short.

`python -m tests.test_imports` prints the rooms and everything that breaks the rule.
"""

import ast
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From bottom to top. A module may import from its own line and from earlier lines.
LINES = (
    ("errors", "ranges", "bands", "process", "ops"),
    ("models", "losses", "optim", "sharding"),
    ("config", "data"),
    ("train_state", "methods", "configs"),
    ("checkpoints", "trainer"),
    ("weights", "planning"),
    ("evaluation",),
    ("scenes", "figures"),
    ("run",),
    ("train",),
    ("cli",),
    ("main", "linear_probe", "__main__", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(LINES) for room in rooms}
MAX_TOP_LEVEL = 12
MAX_LINES = 350


def read_sources():
    """Module name without `xsmae.` -> text; packages without `.__init__`."""
    found = {}
    for folder in (ROOT / "xsmae", ROOT / "configs"):
        base = ROOT if folder.name == "configs" else folder
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


def read_packages():
    """The packages that pyproject.toml installs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return set(settings["tool"]["setuptools"]["packages"])


def imports(text, modules):
    """The modules that a text imports, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [x if _inner(x) in modules else node.module for x in names]
        else:
            continue
        yield from (_inner(x) for x in names if x and x.startswith("xsmae."))


def _inner(name):
    return name.removeprefix("xsmae.")


def violations(sources, packages):
    """One line for each violation of the rule."""
    graph = {n: {*imports(text, sources)} - {n} for n, text in sources.items()}
    for name, imported in sorted(graph.items()):
        room = name.partition(".")[0]
        if room not in LEVEL:
            yield f"{name}: no line of the rule has {room}"
            continue
        for other in sorted(imported):
            if LEVEL[room] < LEVEL.get(other.partition(".")[0], -1):
                yield f"{name} imports {other}, which is above it"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle: {' <- '.join(error.args[1])}"
    folders = {name.rpartition(".")[0] for name in sources} - {""}
    top = {n for n in sources if "." not in n} - folders - {"__init__", "__main__"}
    if len(top) > MAX_TOP_LEVEL:
        yield f"{len(top)} modules outside the rooms, at most {MAX_TOP_LEVEL}"
    for name, text in sorted(sources.items()):
        lines = text.count("\n")
        if lines > MAX_LINES and not name.startswith("data.synthetic"):
            yield f"{name} has {lines} lines, at most {MAX_LINES}"
    for folder in sorted(folders):
        if f"xsmae.{folder}" not in packages:
            yield f"xsmae.{folder} is not among the packages of pyproject.toml"


def test_the_rule_holds():
    sources = read_sources()
    assert {"ops.attention.api", "data", "configs.common", "__main__"} <= sources.keys()
    assert list(violations(sources, read_packages())) == []


UP = "losses imports config, which is above it"


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"losses": "import xsmae.ops.gelu", "ops.gelu": "import jax"}, None),
        ({"losses": "from xsmae.config import load", "config": ""}, UP),
        ({"losses": "import xsmae.config as c", "config": ""}, UP),
        ({"losses": "def f():\n from xsmae import config", "config": ""}, UP),
        ({"ops.a": "import xsmae.ops.b", "ops.b": "import xsmae.ops.a"}, "a circle: "),
        ({"tools": ""}, "tools: no line"),
        ({"weights.x": ""}, "xsmae.weights is not among the packages"),
        ({"ops.x": "\n" * 350}, None),
        ({"ops.x": "\n" * 351}, "ops.x has 351 lines"),
        ({"data.synthetic.x": "\n" * 351}, None),
        (dict.fromkeys(["__init__", "__main__", *LEVEL][:14], ""), None),
        (dict.fromkeys(["__init__", "__main__", *LEVEL][:15], ""), "13 modules"),
    ],
)
def test_what_breaks_the_rule_is_found(sources, found):
    packages = {"xsmae.ops", "xsmae.data", "xsmae.data.synthetic"}
    said = list(violations(sources, packages))
    assert len(said) == (found is not None), said
    assert all(line.startswith(found) for line in said)


def main():
    """Prints the rooms and all violations; returns 1 if there are any."""
    for rooms in LINES:
        print("  " + "  ".join(rooms))
    found = list(violations(read_sources(), read_packages()))
    print("\n".join(found) or "the rule holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The documentation: its commands, flags, links, snippets and fields are real."""

import ast
import copy
import importlib.util
import itertools
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from xsmae.configs import common

import xsmae
from tests.support.encoders import make_encoder
from xsmae import cli
from xsmae.config import flatten, override, read_config
from xsmae.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Pages that hold another file, whose own text is checked, or has no such parts.
INCLUDED = {
    "docs/changelog.md": "CHANGELOG.md",
    "docs/contributing.md": "CONTRIBUTING.md",
    "docs/measurements.md": "benchmarks/RESULTS.md",
}
PARTS = ("data", "train", "test")  # groups of fields that the flags of evaluations set


def blocks(text, language):
    return [found[3] for found in FENCE.finditer(text) if found[2] == language]


def prose(text):
    return FENCE.sub("", text)


def commands():
    """Page and arguments of everything that a page says to type."""
    for page, text in TEXTS.items():
        shown = "\n".join(blocks(text, "")).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`((?:xsmae|make|python -m) [^`]+)`", prose(text))
        for line in [*shown, *(" ".join(code.split()) for code in inline)]:
            line = line.strip()
            if re.match(r"(srun |)(xsmae [a-z]|python -m |make [a-z])", line):
                yield page, shlex.split(line.removeprefix("srun "), comments=True)


COMMANDS = list(commands())


def listed_flags(name, capsys):
    """Flag -> whether it takes a value, as the help of a command lists them."""
    assert cli.main(["xsmae", name, "--help"]) == 0
    found = re.findall(r"^  --(\[no\])?([\w.]+)", capsys.readouterr().out, re.MULTILINE)
    return {flag: not switch for switch, flag in found}


def test_the_pages_have_commands_to_check():
    names = {words[1] for _, words in COMMANDS if words[0] == "xsmae"}
    assert names >= set(cli.COMMANDS)
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_flags_of_commands_are_defined(name, capsys):
    flags = listed_flags(name, capsys)
    for page, words in COMMANDS:
        if words[:2] != ["xsmae", name]:
            continue
        for word in words[2:]:
            if not word.startswith("--") or word in ("--help", "--helpfull"):
                continue
            flag, given, _ = word.removeprefix("--").partition("=")
            group = flag.partition(".")[0]
            if group in ("config", *PARTS) and "." in flag:
                assert "data" in flags or "config" in flags, (page, word)
                continue
            no = flag.removeprefix("no")
            assert flag in flags or no in flags, (page, word)
            assert given or not flags.get(flag, flags.get(no)), (page, word)


def test_names_of_commands_modules_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = " ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)).split()
    for page, words in COMMANDS:
        if words[0] == "xsmae":
            assert words[1] in cli.COMMANDS, (page, words)
        elif words[0] == "make":
            for word in (w for w in words[1:] if "=" not in w):
                assert word in targets, (page, words)
        elif words[2] != "pip":
            assert importlib.util.find_spec(words[2]), (page, words)


def test_configs_and_fields_of_commands_exist():
    checked = 0
    for page, words in COMMANDS:
        given = dict.fromkeys(("config", *PARTS))
        for name in given:
            given[name] = [w for w in words if w.startswith(f"--{name}.")]
        called = {"config", "data"} & {
            w.removeprefix("--").partition("=")[0] for w in words if "=" in w
        }
        if words[0] != "xsmae" or not called:
            continue
        (flag,) = called
        value = next(w for w in words if w.startswith(f"--{flag}=")).partition("=")[2]
        if value.isupper():  # NAME: any config
            continue
        config = read_config(value, f"{page}: {value}")
        for name, fields in given.items():
            target = config if name == "config" else copy.deepcopy(config.data)
            for field in fields:
                # Words in capitals stand for a value of the reader's.
                stands = re.fullmatch(r"[A-Z]+", field.partition("=")[2])
                if stands and not isinstance(_value(target, field), str | None):
                    continue
                override(target, [field], name)
                checked += 1
    assert checked > 60


def _value(config, field):
    for name in field.partition("=")[0].split(".")[1:]:
        config = config[name]
    return config


def anchors(page):
    """The headings of a page as its links name them."""
    text = prose(TEXTS.get(page) or (ROOT / page).read_text())
    text = re.sub(r"[`*]", "", text)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
    return {*slugs, *(f"{s}-{n}" for s in slugs for n in range(1, 9))}


def test_links_lead_to_files_and_headings():
    count = 0
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if re.match(r"https?:", target):
                continue
            path, _, anchor = target.partition("#")
            place = (ROOT / page).parent / path if path else ROOT / page
            if path.startswith("generated/"):  # copied when the site is built
                place = ROOT / path.removeprefix("generated/")
            assert place.exists(), (page, target)
            name = os.path.relpath(place, ROOT)
            assert not anchor or anchor in anchors(INCLUDED.get(name, name)), target
            count += 1
    assert count > 60


def test_every_page_is_in_the_contents():
    index = TEXTS["docs/index.md"]
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    lines = [line for tree in trees for line in tree.split("\n")]
    listed = {line.rpartition("<")[2].rstrip(">") for line in lines}
    pages = {Path(page).stem for page in TEXTS if page.startswith("docs/")}
    assert pages - {"index"} <= listed
    assert {"start", "faq", "api"} <= pages


def test_lengths():
    assert len(TEXTS["README.md"].splitlines()) <= 160
    assert len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 60


def test_no_page_has_the_name_of_one_that_sphinx_writes():
    """Sphinx would overwrite it without a warning."""
    written = {"search", "genindex", "py-modindex", "modindex"}
    assert not written & {page.stem for page in (ROOT / "docs").glob("*.md")}


def test_snippets_use_the_public_names():
    found = set()
    for page, text in TEXTS.items():
        for code in blocks(text, "python"):
            for node in ast.walk(ast.parse(code)):
                if (
                    isinstance(node, ast.Attribute)
                    and ast.unparse(node.value) == "xsmae"
                ):
                    assert node.attr in xsmae.__all__, (page, node.attr)
                    found.add(node.attr)
    assert found == set(xsmae.__all__) - {"Encoder", "export"}


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_first_snippet_runs(page, tmp_path, monkeypatch, capsys):
    make_encoder(tmp_path / "runs/mine", position="gsd", patch_size=8)
    (tmp_path / "IMAGES/forest").mkdir(parents=True)
    for index in range(8):
        pixels = np.full((48, 40, 3), 30 * index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"IMAGES/forest/{index}.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # of GSDs
        exec(compile(blocks(TEXTS[page], "python")[0], page, "exec"), names)
    assert np.isfinite(np.asarray(names["features"])).all()
    if page == "README.md":
        assert names["paths"][names["nearest"][0]].name == "0.jpg"
        assert "0.jpg" in capsys.readouterr().out


def test_errors_of_the_faq_are_in_the_code():
    said = []
    for path in (ROOT / "xsmae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                said.append("".join(p if isinstance(p, str) else "\0" for p in parts))
    quoted = re.findall(
        r'"([^"]+)"',
        "\n".join(re.findall(r"^### (.*)$", TEXTS["docs/faq.md"], re.MULTILINE)),
    )
    assert len(quoted) > 15
    for error in quoted:
        for part in (p.strip() for p in error.split("...")):
            assert any(part in text for text in said), (error, part)


@pytest.fixture(scope="module")
def generated():
    """The module that makes the lists of fields."""
    path = ROOT / "docs/config_fields.py"
    spec = importlib.util.spec_from_file_location("config_fields", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_is_in_the_lists(generated):
    pages = generated.pages()
    rows = {
        name: set(re.findall(r"^`([\w.]+)`$", text, re.MULTILINE))
        for name, text in pages.items()
    }
    for method, preset in itertools.chain.from_iterable(
        ((name, preset) for preset in METHODS[name].presets) for name in METHODS
    ):
        fields = common.get_common(preset, "tiny", method)
        known = rows["common.md"] | rows[f"method_{method}.md"]
        assert set(flatten(fields.to_dict())) <= known
    for path in generated.config_files():
        config = flatten(read_config(str(path), path.stem).to_dict())
        data = {name for name in config if name.startswith("data.")}
        assert data <= rows[f"config_{path.stem}.md"]
    page = TEXTS["docs/config_fields.md"]
    assert set(re.findall(r"generated/(\w+\.md)", page)) == set(pages)


def test_lists_show_values_ranges_and_comments(generated):
    pages = generated.pages()
    found = pages["common.md"]
    assert re.search(r"`batch_size`\n: \w.* Default: `512` \(1 or more\).\n", found)
    found = pages["method_cross_scale_mae.md"]
    assert re.search(
        r"`loss.contrastive.temperature`\n: .* Default: `0.1` in `corrected`, `0.5` in "
        r"`published` \(above 0\).\n",
        found,
    )
    found = pages["config_folder.md"]
    assert "`views.size`\n: Default: chosen at the start.\n" in found
    assert re.search(r"`data.gsd`\n: \w.* Default: none.\n", found)


def test_version_and_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {xsmae.__version__}\n" in citation
    assert "Maofeng" in citation
    licence = (ROOT / "LICENSE").read_text()
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Copyright the xsmae authors" in licence

"""Names in any script on the figures: drawn by a font that has them, else as codes."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from tests.test_protocol import some_row
from xsmae.cli.results import write_report
from xsmae.evaluation.rows import append
from xsmae.figures import fonts
from xsmae.figures.results import confusion_matrix

TREE, WOOD = "\u68ee", "\u6797"


@pytest.fixture
def only_dejavu(monkeypatch):
    """The fonts of a bare machine, whatever this one has."""
    entries = [f for f in font_manager.fontManager.ttflist if "DejaVu" in f.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    for function in (fonts._others, fonts._characters):
        function.cache_clear()
    yield
    for function in (fonts._others, fonts._characters):
        function.cache_clear()


@pytest.fixture
def font_with_a_tree(only_dejavu, tmp_path):
    """A font of one character, installed for a test."""
    path = tmp_path / "tree.ttf"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "tree"])
    builder.setupCharacterMap({ord(TREE): "tree"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "tree": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "tree": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Tree Sans", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    font_manager.fontManager.addfont(path)


def test_what_no_font_has_is_written_in_codes(only_dejavu):
    assert fonts.drawable("roof$x_$, Wälder, \u0641") == "roof$x_$, Wälder, \u0641"
    assert fonts.drawable(f"a {TREE}\nb") == "a \\u68ee\nb"
    assert fonts.drawable("\x07\udcff\U0001f332") == "\\x07\\udcff\\U0001f332"
    assert fonts.families(TREE) == [fonts.BASE]


def test_another_font_draws_what_it_has(font_with_a_tree):
    assert fonts.families(f"a {TREE}") == [fonts.BASE, "Tree Sans"]
    assert fonts.families("a") == [fonts.BASE]
    assert fonts.drawable(TREE + WOOD) == TREE + "\\u6797"


NAMES = ["森林", "غابة", "क्षेत्र" * 6, "roof$x_$y{$", "a\nb"]


def row_of(names):
    confusion = [[3 * (i == j) for i in range(len(names))] for j in range(len(names))]
    per_class = dict.fromkeys(names, 1.0)
    return some_row(class_names=names, per_class=per_class, confusion=confusion)


def test_no_glyph_is_missing_from_a_figure(only_dejavu, tmp_path):
    encoder = {**some_row().encoder, "name": NAMES[0]}
    row = row_of(NAMES)
    append(tmp_path / "results.jsonl", row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(tmp_path / "a.png", row, encoder["name"], data=NAMES[1])
        write_report([tmp_path / "results.jsonl"], tmp_path / "out")
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 2000  # long codes are cut
    text = (tmp_path / "out" / "results.md").read_text()
    assert "classes 0 森林, 1 غابة" in text  # the numbers that stand in the figure


def test_a_figure_is_drawn_in_the_fonts_that_it_needs(font_with_a_tree, tmp_path):
    sizes = []
    for name in (TREE, "\\u68ee"):
        path = tmp_path / "confusion.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            confusion_matrix(path, row_of([name, "roof"]), "ours", data="tiles")
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes[0] != sizes[1]

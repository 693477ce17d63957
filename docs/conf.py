"""The documentation's site: `make docs`."""

import re
import shutil
import sys
from pathlib import Path

import xsmae

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"

sys.path.insert(0, str(DOCS))
import config_fields  # noqa: E402, the module beside this file

project = "xsmae"
author = "The xsmae authors"
copyright = "The xsmae authors, Apache 2.0"
version = release = xsmae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generated/*.md"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
default_role = "code"
highlight_language = "text"
smartquotes = False  # docstrings and commands have quotes that must stay

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Types of other projects are shown, not linked: the build needs no network.
nitpick_ignore_regex = [(r"py:.*", r"(?!xsmae\.).*"), (r"py:.*", r"xsmae\..*\..*")]

html_theme = "furo"
html_title = "xsmae"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}


def generate(app) -> None:
    """Write the pages that come from code, and copy the notebooks into the site."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    config_fields.write(GENERATED)
    notebooks = GENERATED / "notebooks"
    notebooks.mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, notebooks)


# How a docstring begins what it says of one or several arguments, and of errors.
ARGUMENT = r"(?:^|(?<=[.;] ))(?=[a-z_]+(?:, [a-z_]+)*: )"
ERRORS = r"(?=Raises [A-Z]\w+ )"


def lay_out(app, what, name, obj, options, lines: list[str]) -> None:
    """Lay out a docstring: examples as code, arguments as a list.

    An example is a paragraph that is indented by four. A paragraph of arguments has a
    sentence for each that begins with its name and a colon.
    """
    shown: list[str] = []
    for number, paragraph in enumerate("\n".join(lines).split("\n\n")):
        first = paragraph.strip().partition(" ")[0]
        if re.match(r" {4}\S", paragraph) and number:
            shown += [".. code-block:: python", "", *paragraph.split("\n")]
        elif re.fullmatch(r"[a-z_]+[:,]", first) and "\n " not in paragraph:
            for part in re.split(f"{ARGUMENT}|{ERRORS}", " ".join(paragraph.split())):
                argument, colon, about = part.partition(": ")
                listed = colon and re.fullmatch(r"[a-z_, ]+", argument)
                shown += ["", f"* **{argument}**: {about}" if listed else part]
        else:
            shown += paragraph.split("\n")
        shown.append("")
    lines[:] = shown


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
    # Before napoleon, which indents the sections that it rewrites.
    app.connect("autodoc-process-docstring", lay_out, priority=400)

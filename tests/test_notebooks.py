"""The notebooks: they run, on small settings, and are kept as they ran."""

import copy
import json
import re
import socket
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from tests.support.execute_notebooks import (
    NOTEBOOKS,
    execute,
    install_kernel,
    set_parameters,
)
from tests.support.rasters import REASON
from xsmae.process.files import read_jsonl

SMALL = {
    "data.size": 32,
    "views.size": 32,
    "model.mask_ratio": 0.75,
    "model.embed_dim": 12,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.decoder_embed_dim": 16,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "batch_size": 16,
    "log_every": 5,
    "knn.batch_size": 32,
}
SETTINGS = {
    "quickstart": {
        "STEPS": 40,
        "TRAIN_IMAGES": 80,
        "TEST_IMAGES": 40,
        "SCALES": (50, 100),
        "PICTURE_SIZE": 32,
        "MORE": {**SMALL, "optim.learning_rate": 2e-2},
    },
    "linear_probe": {
        "SCALES": (25, 50),
        "IMAGES_PER_CLASS": 6,
        "PENALTIES": (1,),
        "STEPS": 20,
        "MORE": {**SMALL, "data.num_images": 40},
    },
    "geotiff": {
        "STEPS": 20,
        "WINDOW": 64,
        "SIDE": 128,
        "MORE": {k: v for k, v in SMALL.items() if k != "data.size"},
    },
    "segmentation": {
        "TRAIN_IMAGES": 5,
        "TEST_IMAGES": 3,
        "SIZE": 64,
        "CROP": 32,
        "HEAD_STEPS": 20,
        "SIDE": 96,
        "STEPS": 20,
        "MORE": {**SMALL, "data.num_images": 40},
    },
    "scenes": {
        "CHIP": 32,
        "BLOCK": 48,
        "HITS": 4,
        "STEPS": 20,
        "MORE": {**SMALL, "data.num_images": 40},
    },
}
DRAWING = {
    "quickstart": {"crops", "gsd", "losses", "reconstructions", "pca"},
    "linear_probe": {"sheet", "scales", "confusion", "mistakes"},
    "geotiff": {
        "look", "sheet", "histograms", "map", "losses", "reconstructions", "embed",
    },
    "segmentation": {"look", "predictions", "map"},
    "scenes": {"look", "components", "sheet", "map"},
}  # fmt: skip
WORKDIRS = {
    "quickstart": "quickstart",
    "linear_probe": "linear_probe/short_encoder",
    "geotiff": "geotiff",
    "segmentation": "segmentation/short_encoder",
    "scenes": "scene_vectors/short_encoder",
}
KEPT = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
each = pytest.mark.parametrize("name", sorted(KEPT))


def outputs(notebook, kind):
    """Cell id -> its outputs of a kind, of the cells that have any."""
    found = {
        cell.id: [o for o in cell.outputs if o.output_type == kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    return {name: each for name, each in found.items() if each}


def printed(notebook):
    return "".join(
        o.text for some in outputs(notebook, "stream").values() for o in some
    )


def drawing(notebook):
    """The ids of the cells that show a picture."""
    shown = outputs(notebook, "display_data")
    return {n for n, some in shown.items() if any("image/png" in o.data for o in some)}


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # For what install_kernel sets to be as before afterwards.
        for name in (
            "JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLBACKEND",
        ):  # fmt: skip
            patch.setenv(name, "")
        install_kernel(tmp_path_factory.mktemp("jupyter"))
        yield


@each
def test_it_runs(name, jupyter, tmp_path):
    if name in ("geotiff", "segmentation", "scenes"):
        pytest.importorskip("rasterio", reason=REASON)
    notebook = copy.deepcopy(KEPT[name])
    set_parameters(notebook, SETTINGS[name])
    notebook.cells.append(new_code_cell("print(sys.executable)", id="interpreter"))
    execute(notebook, tmp_path)
    assert notebook.cells[-1].outputs[0].text.strip() == sys.executable
    assert outputs(notebook, "error") == {}
    assert drawing(notebook) == DRAWING[name]
    assert "Traceback" not in printed(notebook)
    rows = read_jsonl(tmp_path / "runs" / WORKDIRS[name] / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    if name == "geotiff":
        found = re.findall(r"(\d+\.\d) % of the same scene", printed(notebook))
        assert len(found) == 3
        assert all(0 < float(share) <= 100 for share in found)
    if name == "segmentation":
        # The rows of the encoder and its controls, and a map without a gap.
        text = printed(notebook)
        kinds = re.findall(r"^(\w+) +mIoU (\d+\.\d) \[", text, re.MULTILINE)
        assert [kind for kind, _ in kinds] == ["encoder", "random", "statistics"]
        assert "scene_classes.tif: (96, 96) pixels in EPSG:32633" in text
    if name == "scenes":
        # Both dates have 5 x 5 chips, and the chip in the middle finds itself.
        text = printed(notebook)
        assert text.count(".parquet: 25 chips") == 2
        assert " 1 1.0000 june_64_64 " in text
        shares = re.findall(r"(\d+\.\d) % find their own place", text)
        assert len(shares) == 2
        assert all(0 <= float(share) <= 100 for share in shares)
    if name == "linear_probe":
        said = re.search(r"(\d+) of (\d+) test images are wrong", printed(notebook))
        assert 0 < int(said[1]) <= int(said[2]) == 20
        # Each control stands in the table with its interval.
        (table,) = (
            output.data["text/markdown"]
            for output in outputs(notebook, "display_data")["table"]
        )
        for control in ("random encoder", "thumbnail", "statistics"):
            assert re.search(rf"\| {control} .*\d\.\d \[\d+\.\d, \d+\.\d\]", table)


@each
def test_it_is_kept_as_it_ran(name):
    notebook = KEPT[name]
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert drawing(notebook) == DRAWING[name]
    assert outputs(notebook, "error") == {}
    assert "Warning" not in printed(notebook)


@each
def test_nothing_of_a_machine_is_kept(name):
    notebook = copy.deepcopy(KEPT[name])
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook, ensure_ascii=False)
    places = re.findall(r"/(?:tmp|home|root|work|content|Users|usr|opt|var)/\S*", text)
    assert places == []
    assert socket.gethostname() not in text
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
    path = next(path for path in NOTEBOOKS if path.stem == name)
    assert path.stat().st_size < 1.5 * 2**20


@each
def test_without_xsmae_and_source_it_says_so(name, tmp_path):
    """The first cell, where the package is not, nor a checkout around the notebook."""
    first = next(cell for cell in KEPT[name].cells if cell.cell_type == "code")
    hide = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    done = subprocess.run(
        [sys.executable, "-c", hide + first.source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "xsmae is not installed: set SOURCE to where pip finds it\n"


@each
def test_source_goes_to_pip(name, tmp_path):
    first = next(cell for cell in KEPT[name].cells if cell.cell_type == "code")
    source = first.source.replace('SOURCE = ""', 'SOURCE = "a-place"')
    hide = (
        "import importlib.util, subprocess\n"
        "importlib.util.find_spec = lambda name: None\n"
        "subprocess.run = lambda command, check: print(*command[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide + source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "-m pip install --quiet a-place\n"

"""Run the notebooks: `python -m tests.support.execute_notebooks [FILE...]`.

Their outputs are replaced in place by those of this run. It is done in an empty folder,
one after the other, as a reader would: a notebook finds what the one before it left.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
# In the order of reading: the second goes on with the encoder of the first.
NOTEBOOKS = [FOLDER / "quickstart.ipynb", FOLDER / "linear_probe.ipynb"]
KERNEL = "this-interpreter"


def install_kernel(folder: Path) -> None:
    """Let Jupyter know this interpreter, and nothing of the user's settings."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": KERNEL,
        "language": "python",
    }
    place = folder / "kernels" / KERNEL
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        os.environ[name] = str(folder)
    # As a reader sees them, wherever this is called from.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Other values for names that the cell tagged `parameters` sets, a line each."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in values.items():
        line = re.compile(rf"^{name} = [^#\n]*", re.MULTILINE)
        cell.source, count = line.subn(f"{name} = {value!r}  ", cell.source)
        if count != 1:
            raise ValueError(f"the parameters set {name} {count} times, expected once")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell with `folder` as the working folder; raises where one fails."""
    client = NotebookClient(
        notebook,
        kernel_name=KERNEL,
        resources={"metadata": {"path": str(folder)}},
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
    )
    try:
        client.execute()
    finally:
        # What a reader's Jupyter looks for, and nothing of this machine.
        notebook.metadata = nbformat.from_dict(
            {
                "kernelspec": {
                    "display_name": "Python 3",
                    "language": "python",
                    "name": "python3",
                },
                "language_info": {"name": "python"},
            }
        )


def main(paths: list[Path]) -> None:
    """Execute the notebooks in place."""
    with tempfile.TemporaryDirectory() as folder:
        install_kernel(Path(folder) / "jupyter")
        work = Path(folder) / "work"
        work.mkdir()
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            print(f"running {path.name}", flush=True)
            execute(notebook, work)
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or NOTEBOOKS)

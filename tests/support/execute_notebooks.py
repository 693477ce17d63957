"""Run the notebooks: `python -m tests.support.execute_notebooks [FILE...]`.

It replaces their outputs in place. The notebooks run one after the other in one empty
folder, as for a reader: a notebook finds the files of the previous one.
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
# In reading order: three notebooks use the encoder of the first.
NAMES = ("quickstart", "linear_probe", "geotiff", "segmentation", "scenes")
NOTEBOOKS = [FOLDER / f"{name}.ipynb" for name in NAMES]
KERNEL = "this-interpreter"


def install_kernel(folder: Path) -> None:
    """Registers this interpreter with Jupyter, and hides the user's settings."""
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
    # Show figures as a reader sees them, wherever this runs.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Replaces values in the cell tagged `parameters`; each name has its own line."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in values.items():
        line = re.compile(rf"^{name} = [^#\n]*", re.MULTILINE)
        cell.source, count = line.subn(f"{name} = {value!r}  ", cell.source)
        if count != 1:
            raise ValueError(f"the parameters set {name} {count} times, expected once")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs every cell with `folder` as the working folder; raises if one fails."""
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
        # The metadata that Jupyter needs, and nothing about this machine.
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
    """Executes the notebooks in place."""
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

"""Execute every notebook of this folder in place; a cell that fails stops with its error."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from pyro_scanvi.storage.files import replacing

FOLDER = Path(__file__).parent


def execute(path: Path) -> None:
    """Run a notebook from its own folder and store its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which change with every run
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)


if __name__ == "__main__":
    # tqdm misses widgets that nobody needs; and a warning would show the path of the kernel.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress,ignore:a file takes other names"
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        print(f"executing {notebook.name}", flush=True)
        execute(notebook)

"""Runs `docs/quickstart.ipynb` and writes its outputs into it. Needs `pip install -e ".[notebook]"`; two minutes.

python -m scripts.studies.notebook
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


def executed(path: Path, folder: Path) -> Any:
    """
    A notebook with its outputs; the file is left as it is.

    Args:
        path (`Path`): the notebook.
        folder (`Path`): its working directory.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def main() -> None:
    notebook = executed(QUICKSTART, QUICKSTART.parent)
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    nbformat.write(notebook, QUICKSTART)


if __name__ == "__main__":
    main()

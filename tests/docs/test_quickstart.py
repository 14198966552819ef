"""The quickstart notebook runs from start to end, learns, and was committed with outputs that it really has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: Any) -> str:
    """All outputs as text, the pictures' data left out."""
    found = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            found += ["".join(text) for text in texts]
    return "\n".join(found)


def accuracies(notebook: Any) -> tuple[float, float]:
    """Before and after, in percent, from the table at the end."""
    (table,) = re.findall(r"before +(\d+\.\d)%.*\n *after +(\d+\.\d)%", printed(notebook))
    return float(table[0]), float(table[1])


def test_the_committed_notebook_was_run_from_start_to_end():
    notebook = json.loads(QUICKSTART.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    before, after = accuracies(notebook)
    assert after > before + 40


def test_the_committed_notebook_tells_nothing_of_the_machine():
    text = printed(json.loads(QUICKSTART.read_text()))
    assert "<iframe" in text
    assert not re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|Users|mnt|var)/\S*", text)
    assert "Warning" not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("nbclient", reason="make test-slow installs Jupyter's kernel")
    from scripts.studies.notebook import executed

    (tmp_path / "docs").mkdir()
    shutil.copy(QUICKSTART, tmp_path / "docs")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    before, after = accuracies(executed(tmp_path / "docs" / QUICKSTART.name, tmp_path / "docs"))
    assert after > before + 40

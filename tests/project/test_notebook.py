"""The notebook's cells run from top to bottom, offline and from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "method.ipynb"


@pytest.fixture(scope="module")
def cells():
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_the_cells_run(cells, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join("".join(cell["source"]) for cell in cells)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MPLBACKEND": "agg",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = [
        text
        for cell in cells
        for output in cell["outputs"]
        if output.get("name") == "stdout"
        for text in output["text"]
    ]
    # The printed lines in the file are those that the cells print, apart from digits.
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        line.split()[0] for line in "".join(printed).splitlines()
    ]


def test_the_file_holds_pictures_and_no_path_of_a_machine(cells):
    pictures = [o for cell in cells for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) >= 6 and NOTEBOOK.stat().st_size < 2**20
    text = NOTEBOOK.read_text("utf-8")
    assert "Traceback" not in text and "site-packages" not in text

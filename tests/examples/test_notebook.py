"""The notebook, run from its first cell to its last by Jupyter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "merge_in_python.ipynb"
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def text(cell: dict[str, Any]) -> str:
    shown = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    outputs = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown]
    return "".join("".join(output) for output in outputs)


def test_the_notebook_runs(tmp_path: Path) -> None:
    done = tmp_path / "done.ipynb"
    command = [sys.executable, "-c", RUN, NOTEBOOK, ROOT, done]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    cells = [text(cell) for cell in json.loads(done.read_text())["cells"] if cell["cell_type"] == "code"]
    assert int(cells[2]) > 100
    assert cells[3].count("'movie'") == 5
    for line in cells[4].splitlines()[-2:]:
        scores = eval(line.partition(" ")[2])
        # The two tasks are close to each other; the merge loses little of what each expert adds to the base.
        assert scores["merged"] >= scores["base"]
    assert cells[5] == "16"


def test_no_outputs_are_committed() -> None:
    assert all(not cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])

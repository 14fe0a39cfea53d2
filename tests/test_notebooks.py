"""The notebooks run from top to bottom, and show what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_notebooks_print_what_they_show() -> None:
    done = subprocess.run(
        [sys.executable, "notebooks/execute.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "HF_DP_FAST": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_as_they_ran(path: Path) -> None:
    assert re.match(r"\d\d_", path.name)
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    printed = "".join(
        "".join(output.get("text", "")) for cell in code_cells(path) for output in cell["outputs"]
    )
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text
    assert not re.search(r"(?<![\w.])/(?:home|Users|root|tmp|var|usr)/", printed)
    assert "execution" not in {key for cell in code_cells(path) for key in cell["metadata"]}

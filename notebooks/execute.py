"""Run every notebook from top to bottom.

    python notebooks/execute.py            # and keep what came out in it
    python notebooks/execute.py --check    # and fail if the kept text is not what comes out now

``HF_DP_FAST=1`` leaves out what takes long. Cells tagged "live" may then print something else, and are not
compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, without times or anything else of this machine."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as profile:
        client = NotebookClient(
            notebook,
            timeout=300,
            record_timing=False,
            resources={"metadata": {"path": str(HERE)}},
        )
        client.execute(env={**os.environ, "IPYTHONDIR": profile})
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def text_of(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell printed, but for those tagged "live"."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code" and "live" not in cell.metadata.get("tags", ())
    ]


def main() -> None:
    """Run all, in the order of their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="keep nothing; compare")
    check = parser.parse_args().check
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        fresh = executed(path)
        if not check:
            nbformat.write(fresh, path)
        elif text_of(fresh) != text_of(nbformat.read(path, as_version=4)):
            sys.exit(f"{path.name}: what it prints is not what it shows. Run: make notebooks")
        print(path.name)


if __name__ == "__main__":
    main()

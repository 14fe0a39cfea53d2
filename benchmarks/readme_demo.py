"""Run the demo and put what it prints into the README, between its two markers.

python benchmarks/readme_demo.py             # runs the demo, about 3 minutes, and writes
python benchmarks/readme_demo.py --dry-run   # prints what is there now
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
COMMAND = "hf-dp demo"


def as_a_terminal_shows(output: str) -> str:
    """What stands on the screen at the end: a progress bar writes over its own line.

    Args:
        output: Everything that was printed, with carriage returns.
    """
    shown = []
    for line in output.split("\n"):
        versions = [part.rstrip() for part in line.split("\r") if part.strip()]
        shown.append(versions[-1] if versions else "")
    return "\n".join(shown).strip("\n")


def with_output(readme: str, output: str) -> str:
    """The README with `output` between the markers.

    Args:
        readme: Its present text.
        output: What the demo printed.

    Raises:
        ValueError: A marker is missing or not alone.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected one {BEGIN} and one {END}.")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n```text\n$ {COMMAND}\n{output}\n```\n{END}{after}"


def demo_output() -> str:
    """Run the command as a person would and return all that it printed."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hf-dp")), "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
        check=True,
        cwd=README.parent,
    )
    # Not text=True, which would turn each carriage return into a line of its own.
    return as_a_terminal_shows(done.stdout.decode("utf-8"))


def main() -> None:
    """Run, and write the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="only print the present block")
    options = parser.parse_args()
    if options.dry_run:
        print(README.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip())
        return
    output = demo_output()
    # Read only now: it may have been edited while the demo ran.
    README.write_text(with_output(README.read_text("utf-8"), output), "utf-8")
    print(output)


if __name__ == "__main__":
    main()

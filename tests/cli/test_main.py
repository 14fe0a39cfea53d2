"""The program as a whole: light to start, and polite about errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_dp
from hf_dp.cli.main import main

ROOT = Path(hf_dp.__file__).parents[1]
EPSILON = (
    "epsilon --sampling-probability 0.01 --noise-multiplier 1.0 --num-steps 1000 --delta 1e-5"
).split()
HEAVY = "{'torch', 'transformers', 'datasets', 'pandas', 'accelerate', 'peft'}"


def started(words: list[str], after: str = "") -> subprocess.CompletedProcess[str]:
    """The program in a fresh interpreter with warnings as errors, then the code `after`."""
    code = (
        "import sys\n"
        "from hf_dp.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    code = done.code\n"
        f"{after}\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_epsilon_is_one_json_object_without_heavy_imports_in_time() -> None:
    after = (
        "import os\n"
        f"print(sorted(({HEAVY} | {{'rich'}}) & set(sys.modules)), file=sys.stderr)\n"
        "print(sum(os.times()[:2]), file=sys.stderr)"
    )
    best = float("inf")
    for _ in range(2):  # the first may warm the file cache
        done = started([*EPSILON, "--json"], after)
        heavy, seconds = done.stderr.splitlines()
        assert (done.returncode, heavy) == (0, "[]")
        best = min(best, float(seconds))
    found = json.loads(done.stdout)
    assert found["epsilon"] == pytest.approx(1.82824, rel=4e-5)
    # Processor time, since other processes cannot add to it; 1.0 s measured, the promise is 2 s.
    assert best < 2.0


def test_noise_and_report_start_without_torch(tmp_path: Path) -> None:
    words = (
        "noise --sampling-probability 0.01 --num-steps 10 --delta 1e-5 --target-epsilon 1".split()
    )
    after = f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    assert started(words, after).stderr.strip() == "[]"
    assert started(["report", str(tmp_path)], after).stderr.strip().endswith("[]")


def test_an_error_is_a_sentence_and_exit_code_two() -> None:
    done = started(["epsilon", *EPSILON[1:-1], "2.0"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: PLDAccountant.delta=2.0: expected")
    assert "Traceback" not in done.stderr


def test_the_installed_program_is_this_one() -> None:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "hf-dp = hf_dp.cli.main:main" in text


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hf_dp", *EPSILON, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["epsilon"] == pytest.approx(1.82824, rel=4e-5)


def test_help_names_every_subcommand(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program("--help")
    assert answer.code == 0
    for name in (
        "epsilon",
        "noise",
        "search-noise",
        "steps",
        "batch-size",
        "plan-users",
        "tuning",
        "compare",
        "ew-tune",
        "lmo-dp",
        "report",
        "explain",
        "demo",
    ):
        assert name in answer.out
        assert hf_dp_program(name, "--help").code == 0


@pytest.mark.parametrize(
    "words", [["epsilom"], ["epsilon", "--frobnicate"], ["epsilon", "--delta", "x"]]
)
def test_unknown_words_are_usage_errors(
    hf_dp_program: Callable[..., Any], words: list[str]
) -> None:
    answer = hf_dp_program(*words)
    assert answer.code == 2
    assert "Error" in answer.err
    assert answer.out == ""


def test_errors_that_are_not_ours_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hf_dp.cli.answer.show", broken)
    monkeypatch.setattr(sys, "argv", ["hf-dp", *EPSILON])
    with pytest.raises(ZeroDivisionError):
        main()

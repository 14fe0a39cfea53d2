"""The program, run in this process; the few tests that need a fresh one start it themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hf_dp.cli.main import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def hf_dp_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """``hf_dp_program("epsilon", "--json", ...)``: exit code and what was printed."""

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hf-dp", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        code = caught.value.code
        return Answer(code if isinstance(code, int) else 0, printed.out, printed.err)

    return run

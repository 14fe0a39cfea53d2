"""Settings for all tests: no network, and one thread, since tiny tensors only lose by sharing cores."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def taken_as_familiar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and losses of the tests are judged by their graphs, as those of known libraries are."""
    monkeypatch.setattr("hf_dp.engines.coverage.foreign_code", lambda model: "")
    monkeypatch.setattr("hf_dp.engines.recorder.still_familiar", lambda model: True)
    monkeypatch.setattr("hf_dp.engines.recorder.is_from_library", lambda loss: True)

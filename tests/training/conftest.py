"""Settings for the tests of training."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from user_runs import Recorded


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_garbage() -> Iterator[None]:
    """The Trainer collects garbage before each run; looking through all of transformers costs 0.3 s."""
    import tiny_runs

    assert tiny_runs
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What each step of a run that protects users is made of."""
    return Recorded(monkeypatch)

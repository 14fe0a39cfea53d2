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


@pytest.fixture(autouse=True)
def no_search_of_an_earlier_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches for noise look for earlier ones in a folder of the tests, not in the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("HF_DP_CACHE", str(folder))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What each step of a run that protects users is made of."""
    return Recorded(monkeypatch)

"""What a search keeps: shapes alone, which are sized and certified anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from searches import searched, spent

from hf_dp.cache_folder import cache_folder
from hf_dp.noise import ScaleMixtureNoise
from hf_dp.noise.search_cache import SearchCache


def test_a_kept_answer_equals_a_fresh_one() -> None:
    fresh = searched(3.0)
    kept = searched(3.0)
    assert (fresh.from_cache, kept.from_cache) == (False, True)
    assert kept.candidates == fresh.candidates
    assert searched(3.0, cached=False).candidates == fresh.candidates
    assert not searched(3.0, cached=False).from_cache
    for other in ({"epsilon": 2.9}, {"dimension": 3}, {"budget": 5}, {"objective": "entropy"}):
        assert not searched(**({"epsilon": 3.0} | other)).from_cache


def test_another_version_asks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    searched()
    monkeypatch.setattr("hf_dp.noise.search_cache.__version__", "0.0.0")
    assert not searched().from_cache


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "k"}', "\x00", '{"law": {"a": 1}}'])
def test_a_corrupt_cache_is_ignored_and_rewritten(text: str) -> None:
    fresh = searched()
    (kept,) = (cache_folder() / "noise_search").glob("*")
    before = kept.read_text("utf-8")
    kept.write_text(text, "utf-8")
    again = searched()
    assert not again.from_cache
    assert again.candidates == fresh.candidates
    assert kept.read_text("utf-8") == before
    assert [path.suffix for path in kept.parent.iterdir()] == [".json"]


def test_a_planted_shape_is_certified_like_any_other() -> None:
    searched()
    (kept,) = (cache_folder() / "noise_search").glob("*")
    planted = json.loads(kept.read_text("utf-8"))
    planted["law"] = {"gamma_shape": 3.0, "gamma_scale": 50.0}
    kept.write_text(json.dumps(planted), "utf-8")
    found = searched()
    assert found.from_cache
    mixture = found.of("lmo")
    assert mixture is not None
    assert isinstance(mixture.mechanism, ScaleMixtureNoise)
    assert mixture.mechanism.law.gamma_shape == 3.0
    assert spent(found, 1.0, "lmo") == mixture.epsilon <= 1.0


def test_a_folder_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DP_CACHE", str(tmp_path / "file"))
    assert not searched().from_cache
    assert not searched().from_cache


def test_a_folder_of_one_s_own_is_taken() -> None:
    assert SearchCache(Path("/a")).folder == Path("/a/noise_search")

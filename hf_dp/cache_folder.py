"""Where downloads and searches are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """``HF_DP_CACHE`` if that is set, else the platform's folder for caches."""
    named = os.environ.get("HF_DP_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hf_dp"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hf_dp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dp"

"""Shapes that searches have found, kept on disk; a kept shape is sized and certified anew each time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dp._version import __version__
from hf_dp.cache_folder import cache_folder
from hf_dp.errors import ConfigurationError
from hf_dp.events import PrivacyEvent, to_json
from hf_dp.scale_law import ScaleLaw

if TYPE_CHECKING:
    from hf_dp.noise.candidates import Question


class SearchCache:
    """A folder of small JSON files, one for each question.

    It holds shapes only, never a size or an epsilon, so a file that is wrong can make noise larger than
    it need be, but not less private. Files that cannot be read or understood count as absent, and a
    folder that cannot be written to is done without.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (cache_folder() if folder is None else folder) / "noise_search"

    def key(self, question: Question, event: PrivacyEvent, settings: tuple[str | int, ...]) -> str:
        """A name for the question: of all that the answer depends on, the library's version included."""
        asked = {
            "question": dataclasses.asdict(question),
            "event": to_json(event),
            "settings": settings,
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def read(self, key: str) -> ScaleLaw | None:
        """The shape that was kept; None if there is none that can be used."""
        try:
            kept = json.loads((self.folder / f"{key}.json").read_text("utf-8"))
            if kept["key"] != key:
                return None
            return ScaleLaw(**kept["law"])
        except (OSError, ValueError, TypeError, KeyError, ConfigurationError):
            return None

    def write(self, key: str, law: ScaleLaw) -> None:
        """Keep a shape; whoever reads meanwhile finds all of the file or none."""
        text = json.dumps({"key": key, "law": dataclasses.asdict(law)}, allow_nan=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.folder, suffix=".part", delete=False
            ) as part:
                part.write(text)
            os.replace(part.name, self.folder / f"{key}.json")
        except OSError:
            return

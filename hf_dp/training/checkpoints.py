"""Which checkpoint a run resumes from: the newest one that was written to its end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dp.errors import ConfigurationError, explain
from hf_dp.ledger import LEDGER_NAME

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_STATE = "trainer_state.json"


def resolve_checkpoint(resume: str | os.PathLike[str] | bool | None, output_dir: str) -> str | None:
    """The folder to resume from, or None.

    A run that is killed while it saves leaves a folder without its last file; the Trainer's own choice
    is the highest number, written out or not.

    Raises:
        ConfigurationError: ``resume=True`` and there is no complete checkpoint.
    """
    if resume is None or resume is False:
        return None
    if resume is not True:
        return os.fspath(resume)
    for folder in _newest_first(Path(output_dir)):
        if is_complete(folder):
            return str(folder)
    if (Path(output_dir) / LEDGER_NAME).exists():
        why = "The run ended before it saved one; what it released is in its ledger all the same."
        remedy = "Start anew with DPArguments(ledger='continue'), which counts those releases."
    else:
        why = "There is none, nor any ledger of an earlier run."
        remedy = "Call train() without it, or give the folder of a checkpoint by its name."
    raise ConfigurationError(
        explain(
            "resume_from_checkpoint",
            resume,
            f"a complete checkpoint in {output_dir!r}",
            why,
            remedy,
        )
    )


def is_complete(folder: Path) -> bool:
    """Whether the Trainer wrote this checkpoint to its end: the state, its last file, can be read."""
    if not (folder / LEDGER_NAME).exists():
        return False
    try:
        TrainerState.load_from_json(str(folder / _STATE))
    except (OSError, json.JSONDecodeError, TypeError, ValueError):
        return False
    return True


def _newest_first(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match.group(1)), folder)
        for folder in output_dir.iterdir()
        if folder.is_dir() and (match := _NAME.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]

"""Which ledger a run writes: a new one, or the fullest copy of the one that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dp.errors import LedgerMismatchError, explain
from hf_dp.events import PrivacyEvent
from hf_dp.ledger import LEDGER_NAME, Ledger, merge_ledgers, read_ledger

_COPIES = f"{PREFIX_CHECKPOINT_DIR}-*/{LEDGER_NAME}"


def open_ledger(
    planned: Collection[PrivacyEvent],
    *,
    output_dir: Path,
    checkpoint: Path | None,
    header: Mapping[str, Any],
    known_run: str | None,
    continues: bool,
    fresh_weights: bool,
) -> Ledger:
    """Create the ledger, or continue the one that is there.

    Args:
        planned: What the steps of this run will write down.
        output_dir: Where the ledger lives.
        checkpoint: The folder that the run resumes from, or None.
        header: The first line, should the ledger be new.
        known_run: The run id that this trainer already wrote, or None.
        continues: Whether the user asked to count an earlier run's spending.
        fresh_weights: Whether every train() starts from new weights (model_init).

    Raises:
        LedgerMismatchError: The ledger belongs to another run or another plan, or the one that this
            trainer's weights were trained under is gone.

    Guarantees:
        * At least as many releases as any copy of this run's ledger in `output_dir`, in the checkpoint
          or beside it (test: test_the_fullest_copy_wins).
    """
    path = output_dir / LEDGER_NAME
    if checkpoint is not None:
        _require_ledger(checkpoint)
    origin = path if checkpoint is None else checkpoint / LEDGER_NAME
    for copy in _copies_of_run(origin, output_dir):
        merge_ledgers(path, copy)
    if checkpoint is None:
        if path.exists() and read_ledger(path).num_releases == 0:
            _remove_empty(path)
        elif known_run is not None and not fresh_weights and _run_of(path) != known_run:
            raise _forgotten(path)
    if not path.exists():
        _refuse_copies(output_dir, None)
        return Ledger.create(path, header)
    ledger = Ledger.open(path)
    try:
        if checkpoint is None and not continues and ledger.run_id != known_run:
            raise _left_behind(output_dir, path)
        _refuse_copies(output_dir, ledger.run_id)
        _same_plan(ledger.header, header, path)
        _only_planned(ledger, planned)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _copies_of_run(origin: Path, output_dir: Path) -> Iterator[Path]:
    """The ledger `origin`, if it exists, then every other copy of the same run within reach."""
    if not origin.exists():
        return
    yield origin
    for folder in {origin.resolve().parent, origin.resolve().parent.parent, output_dir.resolve()}:
        for copy in (folder / LEDGER_NAME, *sorted(folder.glob(_COPIES))):
            if copy.exists() and _run_of(copy) == _run_of(origin):
                yield copy


def _same_plan(written: Mapping[str, Any], planned: Mapping[str, Any], path: Path) -> None:
    """Refuse a ledger of another plan; only the planned number of steps may differ."""
    planned = json.loads(json.dumps(planned))
    for key in ("unit", "relation", "population_size", "users", "coins"):
        if written.get(key) != planned.get(key):
            raise _other_plan(key, written.get(key), planned.get(key), path)
    before, now = dict(written.get("plan", {})), dict(planned["plan"])
    for key in sorted((set(before) | set(now)) - {"num_steps"}):
        if before.get(key) != now.get(key):
            raise _other_plan(f"plan.{key}", before.get(key), now.get(key), path)
    if written.get("preflight") and planned.get("preflight") is False:
        raise LedgerMismatchError(
            explain(
                "DPArguments.preflight",
                False,
                "True, as in the ledger",
                "Its header tells every later reader that model and engine were checked before each start.",
                "Resume with it, or begin a new run in another output_dir.",
            )
        )
    if planned["nonprivate_metrics"] and not written.get("nonprivate_metrics"):
        raise LedgerMismatchError(
            explain(
                "DPArguments.nonprivate_metrics",
                True,
                "False, as in the ledger",
                "Its header tells every later reader whether exact quantities were logged.",
                "Resume without it, or begin a new run in another output_dir.",
            )
        )


def _only_planned(ledger: Ledger, planned: Collection[PrivacyEvent]) -> None:
    """Refuse releases that the curve, which is that of one event, would misstate."""
    if any(run.event not in planned for run in read_ledger(ledger.path).releases):
        raise LedgerMismatchError(
            explain(
                "ledger.releases",
                str(ledger.path),
                "only releases of the plan's step",
                "Something else was recorded too, whose cost the epsilon of this run would leave out.",
                "Use a new output_dir, and account for the releases of both ledgers.",
            )
        )


def _remove_empty(path: Path) -> None:
    """Remove the ledger of a run that failed before its first release: it counts nothing."""
    with Ledger.open(path) as ledger:
        if ledger.num_releases == 0:
            path.unlink()


def _refuse_copies(output_dir: Path, run_id: str | None) -> None:
    """Refuse an output directory with checkpoints of another run, which this one would overwrite."""
    for copy in sorted(output_dir.glob(_COPIES)):
        if _run_of(copy) != run_id:
            raise _left_behind(output_dir, copy)


def _run_of(path: Path) -> str | None:
    """The run that a ledger's first line names; None where there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_other_run(path: Path, run_id: str) -> None:
    """Refuse to overwrite the ledger of another run at `path`."""
    if path.exists() and _run_of(path) != run_id:
        raise LedgerMismatchError(
            explain(
                "output_dir",
                str(path.parent),
                "a folder without the ledger of another run",
                "Saving there would overwrite the record of what that run released.",
                "Save into another folder.",
            )
        )


def _other_plan(key: str, before: object, now: object, path: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            f"{path}: {key}",
            now,
            f"{before!r}, as in the ledger",
            "The releases that it counts were made by another plan, so their cost would be misstated.",
            "Resume with the arguments of the first run (a changed num_steps changes the noise of a "
            "target_epsilon run: set the noise_multiplier from the ledger instead), or use a new "
            "output_dir.",
        )
    )


def _require_ledger(checkpoint: Path) -> None:
    if not (checkpoint / LEDGER_NAME).exists():
        raise LedgerMismatchError(
            explain(
                "resume_from_checkpoint",
                str(checkpoint),
                f"a folder with {LEDGER_NAME}",
                "Without it nobody knows what the checkpoint's training has already spent.",
                "Resume from a checkpoint that DPTrainer wrote, or load its weights into a new run if "
                "they were not trained on this data.",
            )
        )


def _left_behind(output_dir: Path, path: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            "TrainingArguments.output_dir",
            str(output_dir),
            "a directory without an earlier run's ledger",
            f"{path.relative_to(output_dir)} counts what that run released about the data; a new run on "
            "the same data adds to it.",
            "Use train(resume_from_checkpoint=True) to go on, DPArguments(ledger='continue') to start "
            "anew and count both, or another output_dir if the data is different.",
        )
    )


def _forgotten(path: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            "TrainingArguments.output_dir",
            str(path.parent),
            "the ledger of this trainer's earlier train()",
            "The model's weights were trained under it, so what it counts must stay counted.",
            "Use the same output_dir, or a new trainer with a model that was not trained on this data.",
        )
    )

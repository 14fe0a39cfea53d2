"""What a run has spent: its ledger, its epsilon, and whether one more release is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dp.accounting.base import Accountant
from hf_dp.accounting.curve import EpsilonCurve
from hf_dp.coins import Coins
from hf_dp.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    LedgerMismatchError,
    PrivacyError,
    explain,
)
from hf_dp.events import PrivacyEvent
from hf_dp.ledger import LEDGER_NAME, Ledger, merge_ledgers, read_ledger
from hf_dp.plan import PrivacyPlan
from hf_dp.training.arguments import DPArguments

FIXED_COINS = "fixed generator: not private"
SECRET_COINS = "operating system"
_PACKAGES = ("hf_dp", "torch", "transformers", "dp-accounting", "numpy")


@dataclass(frozen=True)
class Claim:
    """A plan together with how it is accounted for.

    Attributes:
        plan: What every step does.
        accountant: Who bounds epsilon.
        delta: Delta of the guarantee.
        target_epsilon: The budget, or None.
        num_examples: Size of the population, as it enters the accounting.
        curve: Epsilon after any number of releases of this plan.
    """

    plan: PrivacyPlan
    accountant: Accountant
    delta: float
    target_epsilon: float | None
    num_examples: int
    curve: EpsilonCurve

    @classmethod
    def of(
        cls, plan: PrivacyPlan, accountant: Accountant, dp_args: DPArguments, num_examples: int
    ) -> Self:
        """Compute the curve; refuse a plan that already passes its target.

        Raises:
            ConfigurationError: One step of the plan costs more than the target epsilon.
        """
        delta = dp_args.delta_for(num_examples)
        curve = accountant.curve(
            plan.step_event, num_steps=plan.num_steps, delta=delta, relation=plan.relation
        )
        target = dp_args.target_epsilon
        if target is not None and curve.epsilon(1) > target:
            raise ConfigurationError(
                explain(
                    "DPArguments.target_epsilon",
                    target,
                    "a budget that allows at least one step of the plan",
                    f"One release already costs epsilon = {curve.epsilon(1):.4g} at delta = {delta:.3g}.",
                    "Use more noise, or a smaller expected_batch_size.",
                )
            )
        return cls(plan, accountant, delta, target, num_examples, curve)

    def header(self, coins: Coins, dp_args: DPArguments) -> dict[str, Any]:
        """What the ledger's first line says about the run."""
        described = self.plan.describe()
        return {
            "unit": described["unit"],
            "relation": described["relation"],
            "population_size": self.num_examples,
            "step_event": described["step_event"],
            "plan": described,
            "accountant": self.accountant.name,
            "accountant_class": f"{type(self.accountant).__module__}.{type(self.accountant).__qualname__}",
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "coins": SECRET_COINS if coins.is_secret else FIXED_COINS,
            "nonprivate_metrics": dp_args.nonprivate_metrics,
            "packages": _versions(),
        }


class Spending:
    """The open ledger of a run. One object decides, records and reports."""

    def __init__(self, claim: Claim, ledger: Ledger) -> None:
        """Use an open `ledger` whose plan is the claim's."""
        self.claim = claim
        self.ledger = ledger
        self._open = True

    @classmethod
    def begin(
        cls,
        claim: Claim,
        *,
        output_dir: Path,
        checkpoint: Path | None,
        header: Mapping[str, Any],
        known_run: str | None,
        continues: bool,
    ) -> Self:
        """Create the ledger, or continue the one that is there.

        Args:
            claim: What this run will do.
            output_dir: Where the ledger lives.
            checkpoint: The folder that the run resumes from, or None.
            header: The first line, should the ledger be new.
            known_run: The run id that this trainer already writes, or None.
            continues: Whether the user asked to count an earlier run's spending.

        Raises:
            LedgerMismatchError: The ledger belongs to another run or another plan.
        """
        path = output_dir / LEDGER_NAME
        if checkpoint is not None:
            _require_ledger(checkpoint)
            merge_ledgers(path, checkpoint / LEDGER_NAME)
        elif path.exists() and read_ledger(path).num_releases == 0:
            _remove_empty(path)
        if not path.exists():
            _refuse_copies(output_dir, None)
            return cls(claim, Ledger.create(path, header))
        ledger = Ledger.open(path)
        try:
            if checkpoint is None and not continues and ledger.run_id != known_run:
                raise _left_behind(output_dir, path)
            _refuse_copies(output_dir, ledger.run_id)
            _same_plan(ledger.header, header, path)
            _only_planned(ledger, claim.plan.step_event)
        except BaseException:
            ledger.close()
            raise
        return cls(claim, ledger)

    @property
    def epsilon(self) -> float:
        """A proven upper bound on what all releases in the ledger cost."""
        return self.claim.curve.epsilon(self.ledger.num_releases)

    @property
    def exhausted(self) -> bool:
        """Whether one more release would pass the target epsilon."""
        target = self.claim.target_epsilon
        return (
            target is not None and self.claim.curve.epsilon(self.ledger.num_releases + 1) > target
        )

    def require(self, claim: Claim) -> None:
        """Refuse to go on under another claim than the one the ledger was opened for.

        Raises:
            PrivacyError: The arguments or the data changed since train() began.
        """
        if self._open and claim is not self.claim:
            raise PrivacyError(
                "DPTrainer.args: expected the arguments and the data with which train() began. Another "
                "batch size, number of steps or data set would be drawn than is accounted for. "
                "Change them before train()."
            )

    def record(self, event: PrivacyEvent, *, step: int) -> None:
        """Write one release down, durably, before it is made.

        Raises:
            BudgetExhaustedError: It would pass the target; nothing was written or released.
        """
        if self.exhausted:
            raise BudgetExhaustedError(
                f"DPArguments.target_epsilon={self.claim.target_epsilon}: expected room for one more "
                f"release after {self.ledger.num_releases}. Going on would break the stated guarantee. "
                "Stop here; the model as it is has the guarantee."
            )
        self.ledger.append(event, step=step)

    def copy_to(self, folder: Path) -> None:
        """Copy the ledger into `folder`, during the run or after it.

        Raises:
            LedgerMismatchError: `folder` holds the ledger of another run.
        """
        _refuse_other_run(folder / LEDGER_NAME, self.ledger.run_id)
        if self._open:
            self.ledger.copy_to(folder)
        else:
            with Ledger.open(self.ledger.path) as ledger:
                ledger.copy_to(folder)

    def close(self) -> None:
        """Close the ledger and give its lock back."""
        self._open = False
        self.ledger.close()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _same_plan(written: Mapping[str, Any], planned: Mapping[str, Any], path: Path) -> None:
    """Refuse a ledger of another plan; only the planned number of steps may differ."""
    planned = json.loads(json.dumps(planned))
    for key in ("unit", "relation", "population_size", "coins"):
        if written.get(key) != planned[key]:
            raise _other_plan(key, written.get(key), planned[key], path)
    before, now = dict(written.get("plan", {})), dict(planned["plan"])
    for key in sorted((set(before) | set(now)) - {"num_steps"}):
        if before.get(key) != now.get(key):
            raise _other_plan(f"plan.{key}", before.get(key), now.get(key), path)

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


def _only_planned(ledger: Ledger, step_event: PrivacyEvent) -> None:
    """Refuse releases that the curve, which is that of one event, would misstate."""
    if any(run.event != step_event for run in read_ledger(ledger.path).releases):
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
    for copy in sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{LEDGER_NAME}")):
        if _run_of(copy) != run_id:
            raise _left_behind(output_dir, copy)


def _run_of(path: Path) -> str | None:
    """The run that a ledger's first line names; None where it is damaged, and so nobody's."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        return str(json.loads(first)["run_id"])
    except (ValueError, KeyError, TypeError):
        return None


def _refuse_other_run(path: Path, run_id: str) -> None:
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

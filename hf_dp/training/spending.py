"""What a run has spent: its ledger, its epsilon, and whether one more release is allowed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from hf_dp.accounting.base import Accountant
from hf_dp.accounting.curve import EpsilonCurve
from hf_dp.coins import Coins
from hf_dp.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    PrivacyError,
    explain,
)
from hf_dp.ledger import LEDGER_NAME, Ledger, read_ledger
from hf_dp.plan import PrivacyPlan
from hf_dp.reports.of_users import in_words
from hf_dp.training.arguments import DPArguments
from hf_dp.training.batches import Place
from hf_dp.training.continuing import open_ledger, refuse_other_run

logger = logging.getLogger(__name__)

_LARGE_DELTA = 0.01
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
        num_units: Size of the population, in examples or users, as it enters the accounting.
        curve: Epsilon after any number of passes of this plan; with most samplers a step is a pass.
        users: What users bring, where users are protected; public, and part of the claim.
    """

    plan: PrivacyPlan
    accountant: Accountant
    delta: float
    target_epsilon: float | None
    num_units: int
    curve: EpsilonCurve
    users: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        plan: PrivacyPlan,
        accountant: Accountant,
        dp_args: DPArguments,
        num_units: int,
        users: Mapping[str, Any] | None = None,
    ) -> Self:
        """Compute the curve; refuse a plan that already passes its target.

        Raises:
            ConfigurationError: One step of the plan costs more than the target epsilon.
        """
        delta = dp_args.delta_for(num_units)
        curve = accountant.curve(
            plan.pass_event, num_steps=plan.num_passes, delta=delta, relation=plan.relation
        )
        target = dp_args.target_epsilon
        if target is not None and curve.epsilon(1) > target:
            raise ConfigurationError(
                explain(
                    "DPArguments.target_epsilon",
                    target,
                    "a budget that allows at least one step of the plan",
                    f"The first step already costs epsilon = {curve.epsilon(1):.4g} at delta = {delta:.3g}.",
                    "Use more noise, or a smaller expected_batch_size.",
                )
            )
        return cls(plan, accountant, delta, target, num_units, curve, users)

    def header(self, coins: Coins, dp_args: DPArguments) -> dict[str, Any]:
        """What the ledger's first line says about the run."""
        described = self.plan.describe()
        return {
            "unit": described["unit"],
            "relation": described["relation"],
            "population_size": self.num_units,
            **({} if self.users is None else {"users": dict(self.users)}),
            "step_event": described["step_event"],
            "plan": described,
            "noise_multiplier": getattr(self.plan.noise, "noise_multiplier", None),
            "accountant": self.accountant.name,
            "accountant_class": f"{type(self.accountant).__module__}.{type(self.accountant).__qualname__}",
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "coins": SECRET_COINS if coins.is_secret else FIXED_COINS,
            "nonprivate_metrics": dp_args.nonprivate_metrics,
            "preflight": dp_args.preflight,
            "packages": _versions(),
        }

    def announce(self, dp_args: DPArguments) -> None:
        """Say what is claimed, and where the data is too small for the default delta to say much."""
        logger.info(
            "hf_dp: %s, delta = %.3g, accountant %s", self.plan, self.delta, self.accountant.name
        )
        if self.users is not None:
            logger.info("hf_dp: users: %s", in_words(self.users))
        if dp_args.target_delta is None and self.delta > _LARGE_DELTA:
            logger.warning(
                "hf_dp: with %d %ss the default delta is as large as %.2g: by so much anything that is "
                "released may be likelier than epsilon allows. Set DPArguments.target_delta, say to 1e-3.",
                self.num_units,
                self.plan.unit,
                self.delta,
            )


class Spending:
    """The open ledger of a run. One object decides, records and reports."""

    def __init__(self, claim: Claim, ledger: Ledger) -> None:
        """Use an open `ledger` whose plan is the claim's."""
        self.claim = claim
        self.ledger = ledger
        self._open = True
        self._num_passes = _passes_in(ledger, claim.plan)
        self._last: Place | None = None

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
        fresh_weights: bool,
    ) -> Self:
        """Create the ledger, or continue the one that is there; see `open_ledger`.

        Raises:
            LedgerMismatchError: The ledger belongs to another run or another plan.
        """
        ledger = open_ledger(
            frozenset({claim.plan.step_event, claim.plan.later_event}),
            output_dir=output_dir,
            checkpoint=checkpoint,
            header=header,
            known_run=known_run,
            continues=continues,
            fresh_weights=fresh_weights,
        )
        return cls(claim, ledger)

    @property
    def epsilon(self) -> float:
        """A proven upper bound on what all releases in the ledger cost."""
        return self.claim.curve.epsilon(self._num_passes)

    @property
    def is_open(self) -> bool:
        """Whether ``train()`` is under way."""
        return self._open

    @property
    def exhausted(self) -> bool:
        """Whether one more release would pass the target epsilon.

        The rest of a pass that was begun is paid for. What a crash left of a pass is not taken up again:
        the resumed run begins a new pass, for which there may be no room.
        """
        last = self._last
        if last is not None and last.index + 1 < self.claim.plan.pass_length:
            return False
        return self._no_room_for_a_pass

    @property
    def _no_room_for_a_pass(self) -> bool:
        target = self.claim.target_epsilon
        return target is not None and self.claim.curve.epsilon(self._num_passes + 1) > target

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

    def record(self, place: Place | None, *, step: int) -> None:
        """Write one release down, durably, before it is made.

        Args:
            place: Which draw is about to be released; None for a batch that is no draw of the loader's,
                which is counted as a pass of its own.
            step: The global step.

        Raises:
            BudgetExhaustedError: It would pass the target; nothing was written or released.
            PrivacyError: The draw, or a later one, was released before; nothing was written.
        """
        last, plan = self._last, self.claim.plan
        if place is not None and last is not None and place <= last:
            raise PrivacyError(
                f"training_step(inputs={place}): expected a draw after {last}. The same draw released "
                "twice costs more than is accounted for. Take batches from the loader in their order."
            )
        begins = place is None or last is None or place.pass_number != last.pass_number
        if begins and self._no_room_for_a_pass:
            raise BudgetExhaustedError(
                f"DPArguments.target_epsilon={self.claim.target_epsilon}: expected room for one more "
                f"release after {self.ledger.num_releases}. Going on would break the stated guarantee. "
                "Stop here; the model as it is has the guarantee."
            )
        self.ledger.append(plan.step_event if begins else plan.later_event, step=step)
        self._num_passes += begins
        self._last = place or last

    def copy_to(self, folder: Path) -> None:
        """Copy the ledger into `folder`, during the run or after it.

        Raises:
            LedgerMismatchError: `folder` holds the ledger of another run.
        """
        refuse_other_run(folder / LEDGER_NAME, self.ledger.run_id)
        if self._open:
            self.ledger.copy_to(folder)
        else:
            with Ledger.open(self.ledger.path) as ledger:
                ledger.copy_to(folder)

    def close(self) -> None:
        """Close the ledger and give its lock back."""
        self._open = False
        self.ledger.close()


def _passes_in(ledger: Ledger, plan: PrivacyPlan) -> int:
    """Passes that a ledger of this plan counts: those that were begun, or more if they lack the room."""
    if plan.pass_length == 1:
        return ledger.num_releases
    runs = read_ledger(ledger.path).releases
    begun = sum(run.count for run in runs if run.event == plan.step_event)
    return max(begun, -(-ledger.num_releases // plan.pass_length))


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found

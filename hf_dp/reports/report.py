"""What a run guarantees: facts read from its ledger, and the epsilon that follows from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_dp.accounting import accountant_named
from hf_dp.accounting.base import Guarantee
from hf_dp.accounting.group import for_owner_of
from hf_dp.accounting.shown import rounded_up
from hf_dp.errors import LedgerError, explain
from hf_dp.events import NeighboringRelation, PrivacyEvent, from_json
from hf_dp.ledger import LEDGER_NAME, LedgerRecord, read_ledger
from hf_dp.reports.of_earlier_runs import TRAINED_BEFORE
from hf_dp.reports.of_earlier_runs import in_words as earlier_in_words
from hf_dp.reports.of_noise import dear_in_high_dimension
from hf_dp.reports.of_users import TRUSTED, fewer_than, in_words

_RELATIONS = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: "add or remove one {unit}",
    NeighboringRelation.REPLACE_ONE: "replace one {unit}",
    NeighboringRelation.REPLACE_SPECIAL: "replace one {unit} by one that contributes nothing "
    "(the number of {unit}s is public)",
}


@dataclass(frozen=True)
class PrivacyReport:
    """The guarantee of everything released so far, and what it rests on.

    Attributes:
        guarantee: Epsilon, delta and who says so.
        num_releases: Releases in the ledger, those after the last checkpoint included.
        run_id: Names the run.
        header: The ledger's first line: plan, population, versions.
        torn: Whether the ledger's last line was cut short; it is counted as a release.
        event: All releases in the ledger.
    """

    guarantee: Guarantee
    num_releases: int
    run_id: str
    header: Mapping[str, Any]
    torn: bool
    event: PrivacyEvent | None = field(default=None, repr=False)

    @classmethod
    def from_ledger(cls, path: str | os.PathLike[str], *, accountant: str | None = None) -> Self:
        """Read a ledger, or the one in a run's folder, and cost it.

        Args:
            path: The ledger, or the output directory or checkpoint that holds it.
            accountant: Another accountant than the run's own.

        Raises:
            LedgerError: The ledger is missing, damaged, or not of a training run.
        """
        file = Path(path)
        if file.is_dir():
            file = file / LEDGER_NAME
        if not file.exists():
            raise LedgerError(
                explain(
                    "report.run_dir",
                    str(path),
                    f"a folder with a {LEDGER_NAME}, or such a file",
                    "The ledger says what a run released.",
                    "Pass the output_dir of a DPTrainer run, or one of its checkpoints.",
                )
            )
        return cls._of(read_ledger(file), accountant)

    @classmethod
    def _of(cls, record: LedgerRecord, accountant: str | None) -> Self:
        header = record.header
        missing = {"delta", "unit", "relation", "accountant", "plan"} - set(header)
        if missing:
            raise LedgerError(
                f"ledger.header={sorted(header)}: expected also {sorted(missing)}. Without them the "
                "guarantee cannot be stated. Use a ledger that DPTrainer wrote."
            )
        event = record.event()
        guarantee = accountant_named(accountant or header["accountant"]).guarantee(
            event,
            delta=header["delta"],
            unit=header["unit"],
            relation=NeighboringRelation(header["relation"]),
        )
        return cls(guarantee, record.num_releases, record.run_id, header, record.torn, event)

    @property
    def is_private(self) -> bool:
        """Whether the randomness was secret and every release has a guarantee."""
        return self.why_not_private is None

    @property
    def why_not_private(self) -> str | None:
        """What voids the claim: a test's generator, or a release without any guarantee."""
        coins = self.header.get("coins")
        if coins != "operating system":
            return str(coins or "where the randomness came from is not recorded")
        if not math.isfinite(self.guarantee.epsilon):
            return "a release without any guarantee"
        return None

    @property
    def neighbors(self) -> str:
        """The neighbouring relation in words."""
        words = _RELATIONS[self.guarantee.relation].format(unit=self.guarantee.unit)
        if self._kept_examples is None:
            return words
        return words.replace(
            "the number of users is public", "the numbers of users and of kept examples are public"
        )

    def parts(self) -> dict[str, str]:
        """Sampler, clipping and noise, each as ``Class(field=value, ...)``, and what users bring."""
        plan = self.header["plan"]
        found = {name: _short(plan[name]) for name in ("sampler", "clipping", "noise")}
        size = self.header.get("noise_multiplier")
        if isinstance(size, int | float) and "sensitivity" in plan:
            deviation = _value(float(size * plan["sensitivity"]))
            found["noise"] += f", standard deviation {deviation} on each coordinate of a sum"
        return found if self._users is None else {"users": in_words(self._users), **found}

    @property
    def _users(self) -> Mapping[str, Any] | None:
        """What was claimed of users; None where single examples are protected."""
        found: Mapping[str, Any] | None = self.header.get("users")
        return found

    @property
    def _earlier(self) -> list[Mapping[str, Any]]:
        """Runs that trained the same model before, as far as was known."""
        return list(self.header.get(TRAINED_BEFORE, ()))

    @property
    def _kept_examples(self) -> int | None:
        return None if self._users is None else self._users.get("kept_examples")

    def by_examples_of_a_user(self) -> dict[int, Guarantee]:
        """The guarantee of a user who has only so many examples, where it is better than everybody's.

        Only where examples are drawn and clipped one by one does it depend on their number, which is itself
        private.
        """
        if self._users is None or self._kept_examples is None or self.event is None:
            return {}
        accountant = accountant_named(self.guarantee.accountant)
        return {
            most: accountant.guarantee(
                for_owner_of(most, self.event),
                delta=self.guarantee.delta,
                unit=self.guarantee.unit,
                relation=self.guarantee.relation,
            )
            for most in fewer_than(self._users["max_examples_per_user"])
        }

    def caveats(self) -> list[str]:
        """What the guarantee does not cover, or must be known to read it."""
        found = [
            "Choosing hyper-parameters on the same data is not counted.",
            "Evaluation metrics and model selection are exact; the evaluation data is not protected.",
            "How long steps take, and that a run stops on malformed data, is visible and not counted: times "
            "in logs (train_runtime, TensorBoard's events) tell of the length of what was drawn.",
        ]
        if self.header.get("nonprivate_metrics"):
            found.append(
                "Exact quantities were logged under nonprivate/, and whatever else was added to log lines; "
                "they are outside the guarantee."
            )
        if self.header.get("preflight") is False:
            found.append(
                "The preflight was switched off: that the examples of a batch do not influence one another, "
                "and that the engine clips this model's gradients as plain autograd would, was not checked."
            )
        if self._earlier:
            found.append(earlier_in_words(self._earlier))
        if self.torn:
            found.append("The last line of the ledger was cut short; it is counted as a release.")
        if self._sampling == "Shuffled":
            found.append(
                "Batches are shuffled, from which privacy gains nothing: the guarantee is that of batches "
                "in any fixed order, and a figure for Poisson sampling would not hold."
            )
        dear = self.event and dear_in_high_dimension(self.event)
        if dear:
            found.append(dear)
        if self._users is not None:
            found.append(TRUSTED)
        if self._holds_for_adding:
            counted = "users or of examples" if self._kept_examples else f"{self.guarantee.unit}s"
            found.append(
                "The same epsilon holds for adding or removing one if batch size, steps and sampling "
                f"probability were fixed without looking at the number of {counted}."
            )
        return found

    @property
    def _sampling(self) -> str:
        """What the sampler makes of a release: the name of its event."""
        return str(self.header.get("step_event", {}).get("type"))

    @property
    def _holds_for_adding(self) -> bool:
        """Whether the claim for a public number of units carries over to adding or removing one."""
        if self.guarantee.relation is not NeighboringRelation.REPLACE_SPECIAL:
            return False
        if "step_event" not in self.header:
            return False
        claimed = accountant_named(self.guarantee.accountant)
        return claimed.can_cost(
            from_json(self.header["step_event"]), NeighboringRelation.ADD_OR_REMOVE_ONE
        )

    def to_json(self) -> dict[str, Any]:
        """The report as one strict JSON object; an infinite epsilon is null."""
        return {
            "epsilon": self.guarantee.epsilon if math.isfinite(self.guarantee.epsilon) else None,
            "delta": self.guarantee.delta,
            "is_upper_bound": self.guarantee.is_upper_bound,
            "is_private": self.is_private,
            "accountant": self.guarantee.accountant,
            "unit": self.guarantee.unit,
            "relation": str(self.guarantee.relation),
            "noise": _name(self.header["plan"]["noise"]),
            "noise_multiplier": self.header.get(
                "noise_multiplier", self.header["plan"]["noise"].get("noise_multiplier")
            ),
            "clipping_norm_type": self.header["plan"]["clipping"].get("norm", "l2"),
            "sampling_probability": _drawing(self.header).get("sampling_probability"),
            "num_releases": self.num_releases,
            "num_steps": self.header["plan"]["num_steps"],
            "population_size": self.header.get("population_size"),
            **({} if self._users is None else {"users": dict(self._users)}),
            "target_epsilon": self.header.get("target_epsilon"),
            **({TRAINED_BEFORE: self._earlier} if self._earlier else {}),
            "run_id": self.run_id,
            "torn": self.torn,
        }

    def __str__(self) -> str:
        guarantee = self.guarantee
        kind = "upper bound" if guarantee.is_upper_bound else "an estimate, not a bound"
        claim = (
            f"epsilon <= {rounded_up(guarantee.epsilon)} at delta = {rounded_up(guarantee.delta)}"
            if guarantee.is_upper_bound
            else f"no guarantee: {kind}"
        )
        lines = [
            f"{claim} ({guarantee.accountant}, {kind}), per {guarantee.unit}",
            f"neighbours: {self.neighbors}",
            *(f"{name}: {text}" for name, text in self.parts().items()),
            f"releases: {self.num_releases} of {self.header['plan']['num_steps']} planned, "
            f"over {self.header.get('population_size')} {guarantee.unit}s; "
            f"run {self.run_id[:8]}, ledger intact",
            *(
                f"a user with at most {most} of the examples: epsilon <= {rounded_up(own.epsilon)}"
                for most, own in self.by_examples_of_a_user().items()
            ),
            *(f"note: {caveat}" for caveat in self.caveats()),
        ]
        if not self.is_private:
            lines.insert(0, f"NOT PRIVATE ({self.why_not_private})")
        return "\n".join(lines)


def _drawing(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the plan that flips the coins."""
    sampler: Mapping[str, Any] = header["plan"]["sampler"]
    users = sampler.get("users")
    return users if isinstance(users, Mapping) else sampler


def _short(part: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{key}={_value(part[key])}" for key in part if key != "type")
    return f"{_name(part)}({fields})"


def _name(part: Mapping[str, Any]) -> str:
    name = str(part["type"])
    return name.rsplit(".", 1)[-1] if name.startswith("hf_dp.") else name


def _value(value: object) -> str:
    if isinstance(value, Mapping) and "type" in value:
        return _short(value)
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"

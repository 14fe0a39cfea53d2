"""The report says what the ledger holds, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dp import PrivacyPlan, PrivacyReport
from hf_dp.accounting import accountant_named
from hf_dp.accounting.shown import rounded_up
from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.errors import ConfigurationError, LedgerCorruptError, LedgerError
from hf_dp.events import Gaussian, NeighboringRelation, NonPrivate, PoissonSampledContributions
from hf_dp.ledger import LEDGER_NAME, Ledger
from hf_dp.noise import GaussianNoise
from hf_dp.reports.markdown import privacy_section, with_privacy
from hf_dp.sampling import PoissonSampling

PLAN = PrivacyPlan(
    sampler=PoissonSampling(0.02),
    clipping=FlatClipping(0.5),
    noise=GaussianNoise(1.1),
    num_steps=100,
    expected_batch_size=200.0,
    loss_release=LossRelease(0.1, 3.0),
)
DELTA = 1e-5


def header(**changes: Any) -> dict[str, Any]:
    described = PLAN.describe()
    whole = {
        "unit": described["unit"],
        "relation": described["relation"],
        "population_size": 10_000,
        "step_event": described["step_event"],
        "plan": described,
        "accountant": "pld",
        "delta": DELTA,
        "target_epsilon": 3.0,
        "coins": "operating system",
        "nonprivate_metrics": False,
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


def write(
    folder: Path, *, releases: int = 40, event: Any = PLAN.step_event, **changes: Any
) -> Path:
    path = folder / LEDGER_NAME
    with Ledger.create(path, header(**changes)) as ledger:
        for step in range(releases):
            ledger.append(event, step=step)
    return path


def epsilon(releases: int, accountant: str = "pld") -> float:
    return (
        accountant_named(accountant)
        .guarantee(
            [PLAN.step_event] * releases, delta=DELTA, relation=NeighboringRelation.REPLACE_SPECIAL
        )
        .epsilon
    )


@pytest.mark.parametrize("as_folder", [True, False])
def test_epsilon_is_the_accountants_for_what_was_released(tmp_path: Path, as_folder: bool) -> None:
    path = write(tmp_path)
    report = PrivacyReport.from_ledger(tmp_path if as_folder else str(path))
    assert report.guarantee.epsilon == pytest.approx(epsilon(40), rel=1e-9)
    assert report.guarantee.is_upper_bound
    assert (report.num_releases, report.guarantee.delta) == (40, DELTA)


def test_another_accountant_may_be_asked(tmp_path: Path) -> None:
    path = write(tmp_path)
    report = PrivacyReport.from_ledger(path, accountant="rdp")
    assert report.guarantee.accountant == "rdp"
    assert report.guarantee.epsilon == pytest.approx(epsilon(40, "rdp"), rel=1e-9)
    assert report.guarantee.epsilon > epsilon(40)
    with pytest.raises(ConfigurationError, match="'rdp'"):
        PrivacyReport.from_ledger(path, accountant="rpd")


def test_the_text_states_claim_parts_and_assumptions(tmp_path: Path) -> None:
    write(tmp_path)
    text = str(PrivacyReport.from_ledger(tmp_path))
    first, *rest = text.splitlines()
    assert (
        first
        == f"epsilon <= {rounded_up(epsilon(40))} at delta = 1e-05 (pld, upper bound), per example"
    )
    assert rest[0].startswith("neighbours: replace one example by one that contributes nothing")
    assert "sampler: PoissonSampling(sampling_probability=0.02)" in rest
    assert "clipping: FlatClipping(clipping_norm=0.5, norm=l2)" in rest
    assert "noise: GaussianNoise(noise_multiplier=1.1, norm=l2)" in rest
    assert "releases: 40 of 100 planned, over 10000 examples" in text
    assert "hyper-parameters" in text
    assert "NOT PRIVATE" not in text
    assert "estimate" not in text


def test_the_object_is_plain_json(tmp_path: Path) -> None:
    write(tmp_path)
    found = PrivacyReport.from_ledger(tmp_path).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    run_id = found.pop("run_id")
    assert isinstance(run_id, str)
    assert found.pop("epsilon") == pytest.approx(epsilon(40), rel=1e-9)
    assert found == {
        "delta": DELTA,
        "is_upper_bound": True,
        "is_private": True,
        "accountant": "pld",
        "unit": "example",
        "relation": "replace_special",
        "noise": "GaussianNoise",
        "noise_multiplier": 1.1,
        "clipping_norm_type": "l2",
        "sampling_probability": 0.02,
        "num_releases": 40,
        "num_steps": 100,
        "population_size": 10_000,
        "target_epsilon": 3.0,
        "torn": False,
    }


def test_the_section_of_a_model_card_is_a_table_that_renders(tmp_path: Path) -> None:
    write(tmp_path)
    report = PrivacyReport.from_ledger(tmp_path)
    section = privacy_section(report)
    assert section.startswith("## Differential privacy\n")
    assert f"**ε ≤ {rounded_up(epsilon(40))} at δ = 1e-05**, for each example" in section
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert all(row.count("|") == 3 for row in rows)
    assert "| Releases | 40 of 100 planned |" in rows
    assert "| Randomness | operating system; no seed brings draws or noise back |" in rows
    assert report.run_id in section
    assert section.endswith("\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("---\n# of the host\ntags:\n- a\n---\n\n# tiny\n", "\nText.\n# Another\n"),
        ("# tiny", ""),
    ],
)
def test_a_card_says_below_its_title_what_its_section_begins_with(
    tmp_path: Path, before: str, after: str
) -> None:
    write(tmp_path)
    report = PrivacyReport.from_ledger(tmp_path)
    card = with_privacy(before + after, report)
    section = privacy_section(report)
    claim = section[section.index("**ε ≤") : section.index("upper bound).")]
    assert card.startswith(f"{before.rstrip()}\n\nDifferential privacy: {claim}")
    assert card.endswith(after + "\n" + section)


def test_a_card_without_title_gets_the_section(tmp_path: Path) -> None:
    write(tmp_path)
    report = PrivacyReport.from_ledger(tmp_path)
    assert with_privacy("---\n# tags\n---\nText.", report) == "---\n# tags\n---\nText.\n" + (
        privacy_section(report)
    )


@pytest.mark.parametrize("coins", ["fixed generator: not private", None])
def test_without_secret_coins_every_form_says_not_private(
    tmp_path: Path, coins: str | None
) -> None:
    write(tmp_path, coins=coins)
    report = PrivacyReport.from_ledger(tmp_path)
    assert str(report).startswith("NOT PRIVATE")
    assert "**NOT PRIVATE**" in privacy_section(report)
    assert "ε ≤" not in with_privacy("# tiny", report)
    assert "no seed" not in privacy_section(report)
    assert report.to_json()["is_private"] is False


def test_exact_metrics_are_named_in_every_form(tmp_path: Path) -> None:
    write(tmp_path, nonprivate_metrics=True)
    report = PrivacyReport.from_ledger(tmp_path)
    for text in (str(report), privacy_section(report)):
        assert "Exact quantities were logged under nonprivate/" in text


def test_a_torn_line_counts_as_a_release_and_is_said(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    report = PrivacyReport.from_ledger(tmp_path)
    assert report.torn
    assert report.num_releases == 40
    assert report.guarantee.epsilon == pytest.approx(epsilon(40), rel=1e-9)
    assert "cut short" in str(report)
    assert report.to_json()["torn"] is True


def test_a_ledger_without_releases_costs_nothing(tmp_path: Path) -> None:
    write(tmp_path, releases=0)
    report = PrivacyReport.from_ledger(tmp_path)
    assert report.guarantee.epsilon == 0
    assert str(report).startswith("epsilon <= 0 at")


def test_a_release_without_guarantee_voids_the_claim(tmp_path: Path) -> None:
    path = write(tmp_path)
    with Ledger.open(path) as ledger:
        ledger.append(NonPrivate("a look at the data"), step=40)
    report = PrivacyReport.from_ledger(path)
    assert report.guarantee.epsilon == float("inf")
    assert str(report).startswith("NOT PRIVATE (a release without any guarantee)\nepsilon <= inf")
    assert "**NOT PRIVATE** (a release without any guarantee)" in privacy_section(report)
    assert not report.is_private
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["epsilon"] is None


def test_releases_of_several_kinds_are_composed(tmp_path: Path) -> None:
    path = write(tmp_path)
    with Ledger.open(path) as ledger:
        ledger.append(Gaussian(3.0), step=40)
    report = PrivacyReport.from_ledger(path)
    composed = accountant_named("pld").guarantee(
        [*[PLAN.step_event] * 40, Gaussian(3.0)],
        delta=DELTA,
        relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    assert report.guarantee.epsilon == pytest.approx(composed.epsilon, rel=1e-9)
    assert report.num_releases == 41


@pytest.mark.parametrize("missing", ["delta", "unit", "relation", "accountant", "plan"])
def test_a_header_that_lacks_a_part_of_the_claim_is_refused(tmp_path: Path, missing: str) -> None:
    write(tmp_path, **{missing: None})
    with pytest.raises(LedgerError, match=rf"expected also \['{missing}'\]"):
        PrivacyReport.from_ledger(tmp_path)


def test_relations_read_differently(tmp_path: Path) -> None:
    write(tmp_path, relation="add_or_remove_one")
    report = PrivacyReport.from_ledger(tmp_path)
    assert report.neighbors == "add or remove one example"
    assert "contributes nothing" not in str(report)


def test_a_missing_or_edited_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="privacy_ledger"):
        PrivacyReport.from_ledger(tmp_path)
    path = write(tmp_path)
    path.write_bytes(
        path.read_bytes().replace(b'"population_size":10000', b'"population_size":99999')
    )
    with pytest.raises(LedgerCorruptError, match="Line 1"):
        PrivacyReport.from_ledger(tmp_path)


def test_a_part_of_another_library_keeps_its_full_name(tmp_path: Path) -> None:
    plan = {**PLAN.describe()}
    plan["noise"] = {"type": "mine.MyNoise", "scale": 0.25}
    write(tmp_path, plan=plan)
    report = PrivacyReport.from_ledger(tmp_path)
    assert report.parts()["noise"] == "mine.MyNoise(scale=0.25)"
    assert report.to_json()["noise_multiplier"] is None


def users_header(**claimed: Any) -> dict[str, Any]:
    return {"unit": "user", "users": {"max_examples_per_user": 4, **claimed}}


def test_what_users_bring_is_said_in_report_card_and_json(tmp_path: Path) -> None:
    claimed = {"sampling": "users", "reduction": "sum"}
    report = PrivacyReport.from_ledger(write(tmp_path, **users_header(**claimed)))
    text, card = str(report), privacy_section(report)
    for shown in (text, card):
        assert "drawn whole, each with at most 4 fresh examples" in shown
        assert "the sum of their gradients is clipped as one" in shown
        assert "ids are trusted" in shown
        assert "10000 users" in shown
    assert "per user" in text
    assert "looking at the number of users" in text
    assert report.to_json()["users"] == {"max_examples_per_user": 4, **claimed}
    assert report.by_examples_of_a_user() == {}


def test_a_user_with_fewer_examples_is_told_a_smaller_epsilon(tmp_path: Path) -> None:
    claimed = {"sampling": "examples", "selection": "first", "kept_examples": 31_000}
    event = PoissonSampledContributions(0.02, 4, Gaussian(1.1))
    path = write(tmp_path, event=event, **users_header(**claimed))
    report = PrivacyReport.from_ledger(path)
    own = {most: found.epsilon for most, found in report.by_examples_of_a_user().items()}
    assert own.keys() == {1, 2}
    assert own[1] == pytest.approx(epsilon(40))
    assert own[1] < own[2] < report.guarantee.epsilon
    text = str(report)
    assert "at most 4 examples of each are kept (first), 31000 in all" in text
    assert "the numbers of users and of kept examples are public" in text
    assert f"a user with at most 2 of the examples: epsilon <= {rounded_up(own[2])}" in text


def test_a_report_on_examples_says_nothing_of_users(tmp_path: Path) -> None:
    report = PrivacyReport.from_ledger(write(tmp_path))
    assert "user" not in str(report) + privacy_section(report)
    assert "users" not in report.to_json()

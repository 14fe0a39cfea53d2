"""What a run claims: the number of its own sampler, whatever is asked, and whenever it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from sampler_runs import EVENTS, NOISE, PASS, SAVING, Crash, Watched, dp, written
from tiny_runs import trainer_for

from hf_dp import DPArguments, PrivacyPlan, PrivacyReport
from hf_dp.accounting import accountant_named, flatten
from hf_dp.errors import (
    ConfigurationError,
    LedgerMismatchError,
    UnsupportedEventError,
)
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    SelfComposed,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.ledger.chain import verify
from hf_dp.reports.markdown import privacy_section
from hf_dp.training.arguments import SAMPLINGS

SPECIAL = NeighboringRelation.REPLACE_SPECIAL


def test_a_poisson_number_on_a_shuffled_run_is_impossible(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, dp=dp("shuffled"), host={**SAVING, "max_steps": 10})
    trainer.train()
    report = PrivacyReport.from_ledger(tmp_path)
    event = read_ledger(tmp_path / LEDGER_NAME).event()
    delta = report.guarantee.delta
    twice = SelfComposed(Gaussian(NOISE), 2)
    for name in ("pld", "rdp"):
        there = PrivacyReport.from_ledger(tmp_path, accountant=name).guarantee.epsilon
        plain = accountant_named(name).guarantee(twice, delta=delta, relation=SPECIAL)
        assert there == plain.epsilon
        with pytest.raises(UnsupportedEventError, match="relation"):
            accountant_named(name).guarantee(event, delta=delta)
    poisson = SelfComposed(EVENTS["poisson"], 10)
    assert accountant_named("pld").guarantee(poisson, delta=delta).epsilon < 0.8 * plain.epsilon
    with pytest.raises(LedgerMismatchError, match=r"plan\.sampler|plan\.step_event"):
        trainer_for(tmp_path, dp=dp("poisson"), host=SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_report_says_how_batches_were_drawn(tmp_path: Path, sampling: str) -> None:
    trainer = trainer_for(tmp_path, dp=dp(sampling), host={"max_steps": 2})
    trainer.train()
    report = trainer.privacy_report()
    for text in (str(report), privacy_section(report)):
        assert type(trainer.plan.sampler).__name__ in text
        assert report.neighbors in text
        assert ("privacy gains nothing" in text) == (sampling == "shuffled")
        carries_over = sampling in ("poisson", "balls_in_bins")
        assert ("holds for adding or removing one" in text) == carries_over
    if sampling == "fixed_size":
        assert report.neighbors == "replace one example"


def test_an_accountant_without_a_bound_refuses_before_training(tmp_path: Path) -> None:
    for sampling in ("balls_in_bins", "fixed_size", "truncated_poisson"):
        with pytest.raises(UnsupportedEventError, match=r"can cost it: pld\b"):
            trainer_for(tmp_path, dp=dp(sampling, accountant="rdp"))
    trainer_for(tmp_path, dp=dp("shuffled", accountant="rdp")).train()
    assert written(tmp_path) == {EVENTS["shuffled"]: 2}


def test_a_cap_is_for_the_sampler_that_has_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_batch_size=9: expected None with sampling="):
        DPArguments(noise_multiplier=1.0, max_batch_size=9)
    with pytest.raises(ConfigurationError, match=r"max_batch_size=0: expected a whole number"):
        DPArguments(noise_multiplier=1.0, max_batch_size=0, sampling="truncated_poisson")
    trainer = trainer_for(tmp_path, dp=dp("truncated_poisson", max_batch_size=9), cls=Watched)
    trainer.train()
    assert trainer.plan.sampler.max_batch_size == 9
    assert max(map(len, trainer.seen)) <= 9


def test_a_fixed_size_is_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected_batch_size=8\.5: expected a whole"):
        trainer_for(tmp_path, dp=dp("fixed_size", expected_batch_size=8.5))


def test_a_ledger_cut_anywhere_counts_every_pass_that_was_begun(tmp_path: Path) -> None:
    """A release is made after its line is on the disk: what stands before the cut is all there was."""
    event = EVENTS["balls_in_bins"]
    trainer = trainer_for(tmp_path, dp=dp("balls_in_bins"), host={"max_steps": 7})
    trainer.train()
    path = tmp_path / LEDGER_NAME
    data = path.read_bytes()
    for end in range(data.index(b"\n") + 1, len(data) + 1, 5):
        begun = -(-(data[:end].count(b"\n") - 1) // PASS)
        chain = verify(data[:end], path)
        found = flatten(chain.runs).get(event, 0)
        assert begun <= found <= begun + 1
        assert verify(chain.repaired(), path).runs == chain.runs


def test_a_torn_line_counts_as_the_beginning_of_a_pass(tmp_path: Path) -> None:
    trainer_for(tmp_path, dp=dp("shuffled"), host={**SAVING, "max_steps": 4}).train()
    with (tmp_path / LEDGER_NAME).open("ab") as file:
        file.write(b'{"event":')
    assert written(tmp_path) == {EVENTS["shuffled"]: 2}
    resumed = trainer_for(tmp_path, dp=dp("shuffled"), host={**SAVING, "max_steps": 5})
    resumed.train(resume_from_checkpoint=True)
    assert written(tmp_path) == {EVENTS["shuffled"]: 3}
    assert resumed.epsilon == pytest.approx(resumed.privacy_report().guarantee.epsilon, rel=1e-3)


def test_a_pass_that_is_not_written_first_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: the pass is recorded at its last step, and the run is killed before."""
    monkeypatch.setattr(PrivacyPlan, "step_event", property(lambda self: self.later_event))
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, dp=dp("shuffled"), callbacks=[Crash(3)]).train()
    monkeypatch.undo()
    events = {run.event for run in read_ledger(tmp_path / LEDGER_NAME).releases}
    assert EVENTS["shuffled"] not in events  # nobody wrote the pass down,
    assert written(tmp_path) == {EVENTS["shuffled"]: 1}  # and it is counted all the same

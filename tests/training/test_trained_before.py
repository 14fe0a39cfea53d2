"""A model that was trained privately before: the next run says so, wherever it is read."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_bert, trainer_for
from transformers import BertForSequenceClassification

from hf_dp import DPTrainer, PrivacyReport
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import mixin

SHORT = {"max_steps": 2}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def trained(folder: Path, model: Any = None, **options: Any) -> DPTrainer:
    options = {"host": SHORT, **options}
    made = trainer_for(folder, model=tiny_bert() if model is None else model, **options)
    made.train()
    return made


def run_of(folder: Path) -> str:
    return read_ledger(folder / LEDGER_NAME).run_id


def runs_before(folder: Path) -> list[str]:
    header = PrivacyReport.from_ledger(folder).header
    return [run["run_id"] for run in header.get("trained_before", [])]


def test_one_model_in_two_trainers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_bert()
    with caplog.at_level(logging.WARNING, "hf_dp.training.trained_before"):
        first = trained(tmp_path / "a", model)
        assert "trained before" not in caplog.text
        second = trained(tmp_path / "b", model)
    assert runs_before(tmp_path / "a") == []
    assert runs_before(tmp_path / "b") == [run_of(tmp_path / "a")]
    name = run_of(tmp_path / "a")[:8]
    second.create_model_card(model_name="tiny")
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    for text in (caplog.text, str(second.privacy_report()), card):
        assert f"trained before, under run {name} (epsilon <= " in text
        assert "add up" in text
    (told,) = second.privacy_report().to_json()["trained_before"]
    assert told["epsilon"] == pytest.approx(first.epsilon)
    assert "trained_before" not in first.privacy_report().to_json()
    assert json.loads((tmp_path / "b" / LEDGER_NAME).read_text().splitlines()[0])["trained_before"]


def test_planted_a_forgetful_trainer_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mixin, "remember", lambda *_: None)
    with pytest.raises(AssertionError):
        test_one_model_in_two_trainers(tmp_path, caplog)


def test_a_model_that_was_loaded_from_a_runs_folder(tmp_path: Path) -> None:
    trained(tmp_path / "a", host={**SAVING, "max_steps": 2}).save_model()
    for number, folder in enumerate(("a", "a/checkpoint-2")):
        model = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        trained(tmp_path / f"b{number}", model).save_model()
        assert runs_before(tmp_path / f"b{number}") == [run_of(tmp_path / "a")]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "b0")
    trained(tmp_path / "c", model)
    assert set(runs_before(tmp_path / "c")) == {run_of(tmp_path / "a"), run_of(tmp_path / "b0")}


def test_copies_and_parts_are_known(tmp_path: Path) -> None:
    model: Any = tiny_bert()
    trained(tmp_path / "a", model)
    trained(tmp_path / "copy", copy.deepcopy(model))
    other: Any = tiny_bert()
    other.bert = model.bert
    trained(tmp_path / "part", other)
    for name in ("copy", "part"):
        assert runs_before(tmp_path / name) == [run_of(tmp_path / "a")]
    assert set(model.state_dict()) == set(tiny_bert().state_dict())


def test_what_was_frozen_was_not_trained(tmp_path: Path) -> None:
    model: Any = tiny_bert()
    model.bert.requires_grad_(False)
    trained(tmp_path / "a", model)
    other: Any = tiny_bert()
    other.bert = model.bert.requires_grad_(True)
    trained(tmp_path / "b", other)
    assert runs_before(tmp_path / "b") == []


def test_one_run_that_goes_on_was_not_before_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(tmp_path, host=SAVING)
    first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    checkpoint = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    trainer_for(tmp_path, model=checkpoint, host={**SAVING, "max_steps": 6}).train(
        resume_from_checkpoint=True
    )
    trained(tmp_path, first.model, host={"max_steps": 4}, dp={"ledger": "continue"})
    assert runs_before(tmp_path) == []
    assert "trained before" not in caplog.text


def test_a_run_without_releases_trained_nothing(tmp_path: Path) -> None:
    model = tiny_bert()

    class Stops(DPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a", model, cls=Stops)
    model.save_pretrained(tmp_path / "a")  # type: ignore[operator]
    trained(tmp_path / "b", model)
    assert runs_before(tmp_path / "b") == []
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "a")
    trained(tmp_path / "c", loaded)
    assert runs_before(tmp_path / "c") == []


def test_a_ledger_that_cannot_be_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "a").save_model()
    ledger = tmp_path / "a" / LEDGER_NAME
    ledger.write_bytes(ledger.read_bytes().replace(b'"step":1', b'"step":7'))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "a")
    second = trained(tmp_path / "b", loaded)
    for text in (caplog.text, str(second.privacy_report())):
        assert "run of an unreadable ledger (unknown epsilon" in text

"""What people see: log lines, TensorBoard, Weights & Biases, the model card; nothing exact by default."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import Sentences, collate, host_arguments, tiny_bert, train_lines, trainer_for
from transformers import HfArgumentParser, TrainingArguments

from hf_dp import DPArguments, DPTrainer
from hf_dp.accounting.shown import rounded_up
from hf_dp.coins import FixedCoins

HELD_OUT = Sentences(size=12, seed=1)
EXACT = {"nonprivate/loss", "nonprivate/gradient_norm", "nonprivate/clipped_fraction"} | {
    "nonprivate/dropped_fraction",
    "nonprivate/batch_size",
}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard itself reads them."""
    read: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            read.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    return read


def test_tensorboard_shows_epsilon_growing_and_nothing_exact(tmp_path: Path, board: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        host={"report_to": "tensorboard", "eval_strategy": "epoch"},
        eval_dataset=HELD_OUT,
    )
    trainer.train()
    seen = scalars(board)
    steps = list(range(1, 7))
    for tag in ("train/epsilon", "train/delta", "train/loss"):
        assert sorted(seen[tag]) == steps, tag
    epsilons = [seen["train/epsilon"][step] for step in steps]
    assert epsilons == sorted(set(epsilons))
    assert epsilons[-1] == pytest.approx(trainer.epsilon)
    for line in train_lines(trainer):
        assert seen["train/loss"][line["step"]] == pytest.approx(line["loss"])
    final = {f"train/train_{name}" for name in ("loss", "runtime")}
    final |= {f"train/train_{name}_per_second" for name in ("samples", "steps")}
    public = {"train/epsilon", "train/delta", "train/loss", "train/learning_rate", "train/epoch"}
    assert {tag for tag in seen if tag.startswith("train/")} == public | final
    assert not [tag for tag in seen if "grad_norm" in tag or "nonprivate" in tag or "flos" in tag]


def test_exact_quantities_appear_under_their_own_name_where_asked_for(
    tmp_path: Path, board: Path
) -> None:
    trainer = trainer_for(
        tmp_path, host={"report_to": "tensorboard"}, dp={"nonprivate_metrics": True}
    )
    trainer.train()
    found = {tag for tag in scalars(board) if "nonprivate" in tag}
    assert found == {f"train/{name}" for name in EXACT}
    assert not any("grad_norm" in line for line in trainer.state.log_history)
    assert "nonprivate/" in str(trainer.privacy_report())


def test_exact_quantities_are_means_since_the_last_line(tmp_path: Path) -> None:
    """Full draws, so that they are known: 40 examples in each step, norms as a plain loop finds them."""
    options: dict[str, Any] = {"expected_batch_size": 40, "nonprivate_metrics": True}
    model, norms = tiny_bert().train(), []
    for row in Sentences():
        model.zero_grad()
        model(**collate([row])).loss.backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    bound = sorted(norms)[20] * 1.003
    left = bound * (1 - 0.1**2) ** 0.5  # what the loss leaves to the gradient
    assert sum(norm > left for norm in norms) > sum(norm > bound for norm in norms)
    trainer = trainer_for(tmp_path, host={"max_steps": 1}, dp={**options, "clipping_norm": bound})
    trainer.train()
    shown = train_lines(trainer)[0]
    assert shown["nonprivate/batch_size"] == 40
    assert shown["nonprivate/gradient_norm"] == pytest.approx(sum(norms) / 40)
    clipped = sum(norm > left for norm in norms) / 40
    assert shown["nonprivate/clipped_fraction"] == pytest.approx(clipped)

    rarely = trainer_for(tmp_path / "rarely", host={"logging_steps": 4, "max_steps": 8}, dp=options)
    rarely.train()
    assert [line["nonprivate/batch_size"] for line in train_lines(rarely)] == [40, 40]


def test_epsilon_in_every_line_whatever_the_rhythm(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, host={"max_steps": 7, "logging_steps": 3, "logging_first_step": True}
    )
    trainer.train()
    assert [line["step"] for line in train_lines(trainer)] == [1, 3, 6]
    written = [
        {**line, **trainer.state.log_history[-1]} for line in trainer.state.log_history if "epsilon" in line
    ]  # fmt: skip
    assert written[-1]["epsilon"] == trainer.epsilon


def test_weights_and_biases_offline_has_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_LOG_MODEL": "false",
        "WANDB_PROJECT": "test",
    }.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_for(tmp_path / "run", host={"report_to": "wandb"})
    trainer.train()
    assert wandb.run is not None
    shown = dict(wandb.run.summary)
    wandb.finish()
    assert shown["train/epsilon"] == pytest.approx(trainer.epsilon)
    assert shown["train/delta"] == pytest.approx(40**-1.1)
    assert not [key for key in shown if "grad_norm" in key or "nonprivate" in key]
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes the file
    while b"train/epsilon" not in log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_model_card_says_what_is_guaranteed_below_its_title_and_at_its_end(
    tmp_path: Path,
) -> None:
    trainer = trainer_for(
        tmp_path, host={"eval_strategy": "steps", "eval_steps": 3}, eval_dataset=HELD_OUT
    )
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---"), "the host's part is there"
        assert card.count("## Differential privacy") == 1
    claim = f"**ε ≤ {rounded_up(trainer.epsilon)} at δ = {rounded_up(40**-1.1)}**"
    assert f"\n# tiny\n\nDifferential privacy: {claim}" in card
    assert card.count(claim) == 2
    assert "no seed brings draws or noise back" in card, "the host prints one of its own"
    assert "PoissonSampling(sampling_probability=0.2)" in card
    assert "6 of 6 planned" in card
    results = next(line for line in card.splitlines() if line.startswith("| Training Loss"))
    assert "Epsilon" not in results


def test_the_card_of_an_adapter_has_the_section_too(tmp_path: Path) -> None:
    from test_families import lora

    trainer = trainer_for(tmp_path, model=lora())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    assert (tmp_path / "README.md").read_text().count("## Differential privacy") == 1


def test_before_a_run_the_card_claims_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.create_model_card(model_name="tiny")
    assert "Differential privacy" not in (tmp_path / "README.md").read_text()


def frozen(value: Any) -> Any:
    """All that an argument object holds, private fields too."""
    return {name: repr(field) for name, field in vars(copy.deepcopy(value)).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}},
        {"include_num_input_tokens_seen": "all", "max_grad_norm": 0.5},
    ],
)
def test_the_users_arguments_are_not_edited(tmp_path: Path, options: dict[str, Any]) -> None:
    args = host_arguments(tmp_path, **options)
    assert args.device is not None  # set up now, as the host would
    dp_args = DPArguments(target_epsilon=3.0)
    before = frozen(args), frozen(dp_args)
    trainer = DPTrainer(
        tiny_bert(), args, train_dataset=Sentences(), data_collator=collate, dp_args=dp_args
    )
    trainer.train()
    assert (frozen(args), frozen(dp_args)) == before


def test_both_sets_of_arguments_come_from_one_command_line(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, DPArguments))
    args, dp_args = parser.parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --max_steps 2 --use_cpu True --report_to none --target_epsilon 3 "
        "--clipping_norm 0.5 --per_device_train_batch_size 8 --private_loss False "
        "--ledger continue".split()
    )
    assert dp_args == DPArguments(
        target_epsilon=3.0, clipping_norm=0.5, private_loss=False, ledger="continue"
    )
    trainer = DPTrainer(
        tiny_bert(), args, train_dataset=Sentences(), data_collator=collate, dp_args=dp_args
    )
    trainer.train()
    assert trainer.plan.num_steps == 2

    file = tmp_path / "both.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "noise_multiplier": 1.5}))
    assert parser.parse_json_file(str(file))[1] == DPArguments(noise_multiplier=1.5)


def test_the_default_delta_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hf_dp"):
        trainer_for(tmp_path, coins=FixedCoins(torch.Generator())).train()
    assert "delta = 0.0173" in caplog.text


def test_a_large_default_delta_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "hf_dp.training.spending"):
        trainer_for(tmp_path / "own", host={"max_steps": 1}, dp={"target_delta": 0.02}).train()
        assert "delta" not in caplog.text
        many = trainer_for(tmp_path / "b", host={"max_steps": 1}, train_dataset=Sentences(70))
        many.train()
        assert many.privacy_report().guarantee.delta < 0.01
        assert "delta" not in caplog.text
        trainer_for(tmp_path / "few", host={"max_steps": 1}).train()
    assert "with 40 examples the default delta is as large as 0.017" in caplog.text

"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, collate, tiny_bert
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_screen_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    vocabulary = {f"w{index}": index for index in range(48)} | {"[PAD]": 48, "[UNK]": 49}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    names: dict[str, Any] = {
        "model": tiny_bert(),
        "train_dataset": Sentences(300),
        "eval_dataset": Sentences(20, seed=1),
        "tokenizer": tokenizer,
        "compute_metrics": lambda prediction: {},
    }
    exec(blocks("python")[0], names)
    printed = capsys.readouterr().out
    assert "epsilon <= " in printed
    assert names["trainer"].privacy_report().guarantee.epsilon <= 8.0


def test_the_example_of_a_loss_is_vectorised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {
        "model": tiny_bert(),
        "train_dataset": Sentences(300),
        "tokenizer": None,
    }
    exec(blocks("python")[0].split("trainer = ")[0], names)  # the imports
    exec(blocks("python")[1].replace("max_steps=20", "max_steps=2"), names)
    trainer = names["trainer"]
    trainer.data_collator = collate
    trainer.train()
    assert not trainer._choice.alone
    assert not trainer._choice.is_definition
    alone = [
        names["weighted_loss"](names["model"].eval(), collate([Sentences()[place]])).item()
        for place in (0, 1)
    ]
    both = names["weighted_loss"](names["model"], collate([Sentences()[0], Sentences()[1]]))
    assert torch.allclose(both, torch.tensor(alone), atol=1e-5)


def test_the_example_of_users_protects_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    texts = Sentences(4000)
    rows = [{**texts[index], "author": f"a{index % 900}"} for index in range(len(texts))]
    names: dict[str, Any] = {"model": tiny_bert(), "train_dataset": rows}
    exec(blocks("python")[0].split("trainer = ")[0], names)  # the imports
    exec(blocks("python")[2].replace("max_steps=100", "max_steps=2"), names)
    names["trainer"].data_collator = collate
    names["trainer"].train()
    report = names["trainer"].privacy_report()
    assert report.guarantee.unit == "user"
    assert report.header["population_size"] == 900


def test_the_loop_example_runs() -> None:
    names: dict[str, Any] = {
        "model": tiny_bert(),
        "batch": collate([Sentences()[0], Sentences()[1]]),
    }
    exec(blocks("python")[3], names)
    assert names["summed"].norms.shape == (2,)


def test_the_commands_run(tmp_path: Path) -> None:
    from hf_dp.cli.main import app

    commands = [line for line in blocks("console")[0].splitlines() if line.startswith("$ hf-dp")]
    assert len(commands) == 12
    for line in commands:
        words = shlex.split(line, comments=True)[2:]
        if words[0] in ("epsilon", "noise"):
            result = CliRunner().invoke(app, words)
        else:
            result = CliRunner().invoke(app, [words[0], "--help"])
        assert result.exit_code == 0, result.output


def test_the_demo_output_is_there() -> None:
    shown = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    assert "epsilon <= " in shown

"""Every ordinary model gets its fast loss from made-up examples alone."""

from __future__ import annotations

import pytest
import torch
from loss_zoo import MODELS, batch, build, build_lora, trainer_for

from hf_dp.training.choice import Choice, choose
from hf_dp.training.made_up import LENGTHS, made_up_rows


def _choice(name: str, model: torch.nn.Module, smoothing: float = 0.0) -> Choice:
    trainer = trainer_for(model, smoothing=smoothing)
    columns = {
        key: value[:1] if isinstance(value, torch.Tensor) else value
        for key, value in batch(name).items()
    }
    return choose(
        model,
        columns,
        lambda model, alone: trainer.compute_loss(model, alone),
        given=None,
        trusted=True,
        label_smoothing=smoothing,
        padding_id=getattr(model.config, "pad_token_id", None),
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_of_transformers_gets_its_vectorised_loss(name: str) -> None:
    choice = _choice(name, build(name))
    assert not choice.is_definition
    assert not choice.alone


def test_an_adapter_changes_nothing() -> None:
    choice = _choice("bert-cls", build_lora("bert-cls"))
    assert not choice.is_definition
    assert not choice.alone


def test_made_up_rows_hold_nothing_of_the_real_example() -> None:
    name = "gpt2-lm"
    model, real = build(name), batch(name)
    columns = {key: value[:1] for key, value in real.items()}
    other = {key: value.flip(-1) if value.dim() > 1 else value for key, value in columns.items()}
    made, again = made_up_rows(model, columns), made_up_rows(model, other)
    assert made.keys() == columns.keys()
    assert all(torch.equal(made[key], again[key]) for key in made)
    assert made["attention_mask"].sum(1).tolist() == list(LENGTHS)

"""What would let one example move the others' gradients before the engine sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import Sentences, collate, tiny_bert, trainer_for
from torch.utils.data import Subset
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_dp.errors import ConfigurationError


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_longest_example_are_refused(
    tmp_path: Path, kind: str
) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForSequenceClassification(config)
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigurationError, match="longest example of a batch"):
        trainer_for(tmp_path, model=model)


@pytest.mark.parametrize("how", ["batch_average", "batch_average_once"])
def test_adapters_that_average_a_batch_are_refused(tmp_path: Path, how: str) -> None:
    velora = getattr(peft.tuners.lora, "VeloraConfig", None)
    if velora is None:
        pytest.skip("an older peft")

    def adapted(how: str) -> Any:
        config = LoraConfig(target_modules=["query"], velora_config=velora(2, init_type=how))
        return get_peft_model(tiny_bert(), config)

    with pytest.raises(ConfigurationError, match=r"velora_config\.init_type=\['batch_average"):
        trainer_for(tmp_path, model=adapted(how))
    trainer_for(tmp_path, model=adapted("random")).train()


def test_attention_in_blocks_that_follow_the_batch_is_refused(tmp_path: Path) -> None:
    def bigbird(kind: str) -> BigBirdForSequenceClassification:
        config = BigBirdConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_type=kind,
        )
        return BigBirdForSequenceClassification(config)

    with pytest.raises(ConfigurationError, match=r"bert\.attention_type='block_sparse'"):
        trainer_for(tmp_path, model=bigbird("block_sparse"))
    trainer_for(tmp_path, model=bigbird("original_full"))


def test_a_collator_with_a_seed_of_its_own_is_refused(tmp_path: Path) -> None:
    class Seeded:
        seed = 42

        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return collate(rows)

    with pytest.raises(ConfigurationError, match=r"data_collator\.seed"):
        trainer_for(tmp_path, data_collator=Seeded())


def test_a_collator_put_in_after_construction_is_checked_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)

    def seeded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate(rows)

    seeded.seed = 1  # type: ignore[attr-defined]
    trainer.data_collator = seeded
    with pytest.raises(ConfigurationError, match=r"data_collator\.seed"):
        trainer.train()


def test_predicting_on_the_training_data_is_refused(tmp_path: Path) -> None:
    data = Sentences()
    trainer = trainer_for(tmp_path, train_dataset=data)
    for shown in (data, Subset(data, range(4))):
        with pytest.raises(ConfigurationError, match="held out"):
            trainer.predict(shown)
        with pytest.raises(ConfigurationError, match="held out"):
            trainer.evaluate(shown)

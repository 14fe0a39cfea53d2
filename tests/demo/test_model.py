from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertConfig

from hf_dp.demo.assets import encoder_folder
from hf_dp.demo.model import MeanPooledForSequenceClassification, load_classifier, with_lora


def tiny(seed: int = 0) -> MeanPooledForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = MeanPooledForSequenceClassification(config).double().eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


def test_padding_changes_nothing() -> None:
    model = tiny()
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    alone = model(input_ids=ids).logits
    together = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-12)
    blind = model(input_ids=padded, attention_mask=torch.ones_like(mask)).logits
    assert not torch.allclose(alone, blind, rtol=1e-3)


def test_an_example_without_tokens_has_a_finite_loss() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    labels = torch.tensor([0, 1])
    answer = tiny()(input_ids=torch.ones_like(mask), attention_mask=mask, labels=labels)
    assert torch.isfinite(answer.loss)


def test_loss_is_the_mean_of_each_example_alone() -> None:
    model, ids, labels = tiny(), torch.randint(1, 50, (4, 6)), torch.tensor([0, 1, 1, 0])
    together = model(input_ids=ids, labels=labels).loss
    alone = [model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-9, atol=1e-12)


def test_embeddings_may_stand_for_tokens() -> None:
    model, ids = tiny(), torch.randint(1, 50, (2, 6))
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, model(input_ids=ids).logits, rtol=1e-9, atol=1e-12)


def test_a_new_head_answers_evenly() -> None:
    model = MeanPooledForSequenceClassification(tiny().config)
    assert not model.classifier.weight.any()
    assert not model.classifier.bias.any()
    assert model.bert.encoder.layer[0].attention.self.query.weight.any()


@pytest.fixture(scope="module")
def encoder(cache: Path) -> Path:
    return encoder_folder(cache)


@pytest.mark.reference
def test_the_pretrained_weights_are_really_there(encoder: Path) -> None:
    model = load_classifier(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # The pair and its similarity are those of the documentation of sentence-transformers.
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The court adjourned."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    close, far = (pooled[0] @ pooled[1]).item(), (pooled[0] @ pooled[2]).item()
    assert close == pytest.approx(0.7553, abs=1e-3)
    assert far < 0.2
    assert not model.classifier.weight.any()
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.0


def test_lora_trains_the_last_two_layers_and_the_head(encoder: Path) -> None:
    model = with_lora(load_classifier(encoder))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 111_362
    assert all(".layer.4." in n or ".layer.5." in n or "classifier" in n for n in trained)


def test_a_saved_adapter_gives_the_same_answers(encoder: Path, tmp_path: Path) -> None:
    model = with_lora(load_classifier(encoder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_classifier(encoder), tmp_path).eval()
    ids = torch.randint(1000, 2000, (2, 9))
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)

"""A model is tried out and left as it was, and what is tried is the code that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp import clipped_sum
from hf_dp.engines import undisturbed as tried
from hf_dp.engines.undisturbed import as_it_was, undisturbed

WIDTH, VOCAB = 8, 13


class Remembers(nn.Module):
    """Changes itself by what it is given, in every way that attributes allow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Linear(2, 2)
        self.longest = 0
        self.kind = "short"
        self.seen: Tensor | None = None
        self.lazy: nn.Module | None = None
        self.weight: nn.Parameter | None = None
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, len(x))
        self.kind, self.seen, self.fresh = "long", x, 3
        self.inner, self.lazy = nn.Identity(), nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))
        self.total += 1
        return x


def test_a_model_that_changes_itself_is_put_back() -> None:
    model = Remembers()
    inner = model.inner
    with as_it_was(model):
        model(torch.ones(5, 2))
        assert (model.longest, model.kind) == (5, "long")
    assert (model.longest, model.kind, model.seen, model.lazy) == (0, "short", None, None)
    assert model.inner is inner
    assert model.total == 0
    assert dict(model.named_children()) == {"inner": inner}
    assert model.fresh == 3, "what was not there stays: another attribute may tell that it is"
    assert isinstance(model.weight, nn.Parameter)


def bigbird() -> nn.Module:
    torch.manual_seed(0)
    config = tf.BigBirdConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
        block_size=4,
        num_random_blocks=1,
        attention_type="block_sparse",
    )
    return tf.BigBirdForSequenceClassification(config)


@pytest.mark.parametrize("kept", [True, False])
def test_attention_that_few_tokens_switch_over_is_switched_back(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:  # the fault: flags alone are put back
        monkeypatch.setattr(tried, "_restore_plain", lambda _: None)
    model = bigbird()
    layer = model.bert.encoder.layer[0].attention.self
    with undisturbed(model), torch.no_grad():
        model(input_ids=torch.ones(1, 7, dtype=torch.long))
        assert model.bert.attention_type == "original_full"
    assert (model.bert.attention_type == "block_sparse") is kept
    assert (model.bert.encoder.layer[0].attention.self is layer) is kept


class Encoder(nn.Module):
    """Torch's own encoder, which joins examples in one nested tensor where no gradient is taken."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        weights = attention_mask[..., None]
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    logits = model(inputs["input_ids"], inputs["attention_mask"])
    return F.cross_entropy(logits, inputs["labels"], reduction="none")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_is_clipped_together(engine: str, training: bool) -> None:
    model = Encoder().train(training)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, VOCAB, (4, 6), generator=generator),
        "attention_mask": (torch.arange(6) < torch.tensor([6, 4, 3, 2])[:, None]).long(),
        "labels": torch.tensor([0, 1, 2, 1]),
    }
    found, expected = (
        clipped_sum(model, batch, clipping_norm=0.5, engine=name, example_loss=losses)
        for name in (engine, "sequential")
    )
    torch.testing.assert_close(found.norms, expected.norms)
    torch.testing.assert_close(found.grads, expected.grads)
    assert torch.backends.mha.get_fastpath_enabled()

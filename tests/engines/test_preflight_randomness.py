"""The preflight without dropout: switched off in every way it is asked for, and put back."""

from __future__ import annotations

import pytest
import torch
from preflight_zoo import Centred, Reader, fly
from torch import Tensor, nn

from hf_dp.engines import BookKeepingEngine
from hf_dp.errors import ConfigurationError


class SkipsLayers(nn.Module):
    """Stochastic depth: not dropout by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1) < 0.5) if self.training else x


def test_other_draws_than_dropout_are_tried_in_evaluation_mode() -> None:
    fly(Reader(SkipsLayers()))
    with pytest.raises(ConfigurationError):
        fly(Reader(nn.Sequential(SkipsLayers(), Centred())))


class Attending(nn.Module):
    """Every way in which dropout is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.attention.requires_grad_(False)
        self.alpha = nn.AlphaDropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :2]  # positions that no example lacks, so that padding plays no part
        x = nn.functional.scaled_dot_product_attention(x, x, x, None, 0.5)
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        x = nn.functional.dropout(self.alpha(x), inplace=False) + torch.dropout(x, 0.5, train=True)
        return x + self.attention(x, x, x, need_weights=False)[0]


class FirstTwo(Reader):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.body(self.table(ids))).mean(1))
        return logits


def test_every_kind_of_dropout_is_off_and_training_mode_stays() -> None:
    seen: list[bool] = []

    class Watching(Attending):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.training)
            return super().forward(x)

    model = FirstTwo(Watching())
    fly(model)
    assert seen[:3] == [True] * 3  # engines may look at it in evaluation mode as well


def test_a_scalar_of_zero_is_filled_and_dropout_is_off_in_the_backward_pass_too() -> None:
    """The gate is the model's own, so the generic rule runs all of it again, dropout included."""

    class Scaled(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, mask) * (1 + self.gate)

    model = Scaled()
    fly(model)
    assert float(model.gate.detach()) == 0


def test_torch_is_put_back() -> None:
    functions = nn.functional
    before = [functions.dropout, functions.scaled_dot_product_attention, torch.dropout]
    fly(Reader())
    with pytest.raises(ConfigurationError):
        fly(Reader(Centred()))
    after = [functions.dropout, functions.scaled_dot_product_attention, torch.dropout]
    assert all(a is b for a, b in zip(before, after, strict=True))


class DropConnect(nn.Linear):
    """A plain linear layer as long as nothing drops out."""

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.dropout(self.weight, 0.5, self.training)
        return nn.functional.linear(x, weight, self.bias)


def test_what_a_layer_is_taken_for_is_what_it_is_with_its_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, engine = Reader(DropConnect(8, 8)).train(), BookKeepingEngine()
    fly(model, engine=engine)
    [point] = [p for p in engine.recorder.coverage(model).points if p.module is model.between]
    assert point.rule is None
    monkeypatch.setattr(BookKeepingEngine, "prepare", lambda *_: None)
    hasty = BookKeepingEngine()
    fly(model, engine=hasty)
    [point] = [p for p in hasty.recorder.coverage(model).points if p.module is model.between]
    assert point.rule is not None, "without it the trial's own view would stay"

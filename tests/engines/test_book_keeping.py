"""The one-backward engine: unusual models, and what it leaves as it found it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import (
    assert_same_sum,
    batch,
    build,
    build_lora,
    difference,
    length,
    naive,
    own_losses,
)
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, check, data, squares

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named
from hf_dp.errors import ConfigurationError, UncoveredParameterError


class CalledOften(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.first(x))
        return self.second(x) + self.first(x[:, :1])  # once more, with fewer positions


class TiedLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += x
        hidden = self.second(hidden.relu_())
        hidden.mul_(2.0)
        return hidden


class PartlyWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.first(x)
        return self.second(torch.tanh(self.first(x))) - teacher


class OneTableForAll(Net):
    """Positions, looked up once and broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 6).double()
        self.norm = nn.LayerNorm(6).double()

    def where(self, x: Tensor) -> Tensor:
        where: Tensor = self.positions(torch.arange(x.shape[1])[None])
        return where

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)) + self.where(x)))


class OneLinearForAll(OneTableForAll):
    def __init__(self) -> None:
        super().__init__()
        self.positions.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(x + self.first(self.where(x))))


class OneNormForAll(OneLinearForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.norm(self.where(x))))


class OneChainForAll(OneTableForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.norm(self.where(x))))


class NowForOneNowForAll(OneTableForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.first(self.where(x))))


class ResidualsShareGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return hidden + self.second(hidden) + hidden.tanh()


class KeywordInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.tanh(self.first(input=x)))


class MeanOverPositions(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mean(1))  # two axes only


class NotAllUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


COVERED = [
    Net,
    CalledOften,
    TiedLayers,
    InPlace,
    PartlyWithoutGradient,
    ResidualsShareGradients,
    KeywordInput,
    MeanOverPositions,
    NotAllUsed,
    OneTableForAll,
    OneLinearForAll,
    OneNormForAll,
    OneChainForAll,
    NowForOneNowForAll,
]


@pytest.mark.parametrize("kind", COVERED, ids=lambda kind: kind.__name__)
def test_unusual_use_of_covered_layers_equals_the_loop(kind: type[Net]) -> None:
    check(kind(), data())
    check(kind(), data(rows=1))
    check(kind(), data(positions=8))


def test_foreign_hooks_stay_outside_the_tapped_module() -> None:
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: 3 * output)
    model.first.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(model, data())


def test_a_hook_that_uses_the_weight_moves_it_to_the_module_above() -> None:
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: output * module.weight.sum())
    check(model, data())


def test_a_hook_on_the_model_that_uses_a_weight_is_an_uncovered_use() -> None:
    model = Net()
    model.register_forward_hook(lambda module, args, output: output * module.first.weight.sum())
    with pytest.raises(UncoveredParameterError, match=r"first\.weight"):
        book_kept(model, data())


def checkpointed(model: nn.Module, *, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    model.train()  # checkpoints are made in training only


@pytest.mark.parametrize("make", [build, build_lora])
@pytest.mark.parametrize("name", ["bert-cls", "llama-lm", "t5-seq2seq"])
def test_gradient_checkpointing_changes_nothing(name: str, make: Any) -> None:
    inputs = batch(name)
    expected = naive(make(name, torch.float64), inputs, C)
    model = make(name, torch.float64)
    checkpointed(model, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert_same_sum(book_kept(model, inputs, own_losses), expected, 1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_not_silently_wrong() -> None:
    model, inputs = build("bert-cls"), batch("bert-cls")
    checkpointed(model, use_reentrant=True)
    with pytest.raises(ConfigurationError, match="expected use_reentrant=False"):
        book_kept(model, inputs, own_losses)


def test_a_loss_that_ignores_the_model_sums_to_zero() -> None:
    found = book_kept(Net(), data(), lambda model, inputs: inputs["x"].sum((1, 2)))
    assert length(found.grads) == 0
    assert found.norms.tolist() == [0] * 5
    unfinished = book_kept(Net(), data(), lambda model, inputs: inputs["x"].sum((1, 2)) * torch.nan)
    assert not torch.isfinite(unfinished.norms).any()


def test_a_parameter_that_takes_no_part_has_a_sum_of_zero() -> None:
    found = book_kept(NotAllUsed(), data())
    assert float(found.grads["second.weight"].norm()) == 0
    assert float(found.grads["first.weight"].norm()) > 0


def test_what_is_frozen_or_thawed_later_is_noticed() -> None:
    engine, model = BookKeepingEngine(), Net()
    assert len(book_kept(model, data(), engine=engine).grads) == 4
    model.first.requires_grad_(False)
    found = book_kept(model, data(), engine=engine)
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    model.first.requires_grad_(True)
    model.second = nn.Linear(6, 6).double()
    assert_same_sum(
        book_kept(model, data(), engine=engine), naive(model, data(), C, squares), 1e-12
    )


def test_bfloat16_autocast_agrees_with_the_sequential_engine() -> None:
    model, inputs = build("bert-cls"), batch("bert-cls")

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own_losses(model, inputs)

    found = book_kept(model, inputs, loss)
    expected = SequentialEngine().clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(C)
    )
    torch.testing.assert_close(found.norms, expected.norms, rtol=2e-2, atol=0)
    gap = length(difference(found.grads, expected.grads))
    assert gap <= 5e-2 * length(expected.grads)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())


def test_a_bfloat16_model_is_summed_in_float32() -> None:
    found = book_kept(build("gpt2-lm", torch.bfloat16), batch("gpt2-lm"), own_losses)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())
    assert length(found.grads) <= 4 * C


# ---- left as it was found ---------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


class FailsInTheMiddle(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if torch.is_grad_enabled():
            raise KeyError("in the middle")
        return self.second(hidden)


class FailsInALayer(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[..., :3] if torch.is_grad_enabled() else x)


@pytest.mark.parametrize(
    ("kind", "error"), [(Net, None), (FailsInTheMiddle, KeyError), (FailsInALayer, RuntimeError)]
)
def test_hooks_and_flags_are_put_back(kind: type[Net], error: type[Exception] | None) -> None:
    model = kind()
    model.first.bias.requires_grad_(False)
    model.first.register_forward_hook(lambda *_: None)
    flags, hooks = [p.requires_grad for p in model.parameters()], hooks_of(model)
    if error is None:
        book_kept(model, data())
    else:
        with pytest.raises(error):
            book_kept(model, data())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert hooks_of(model) == hooks


def test_the_method_of_a_relative_bias_is_put_back() -> None:
    model = build("t5-seq2seq")
    book_kept(model, batch("t5-seq2seq"), own_losses)
    assert all("compute_bias" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
def test_no_engine_writes_to_grad(engine: str) -> None:
    model = Net()
    sentinel = torch.full_like(model.first.weight, 7.0)
    model.first.weight.grad = sentinel.clone()
    model.second.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine_named(engine).clipped_sum(model, data(), example_loss=squares, clipping=FlatClipping(C))
    assert torch.equal(model.first.weight.grad, sentinel)
    assert model.first.bias.grad is None
    assert model.second.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_no_ordinary_weight_gradient_is_computed() -> None:
    model, engine = Net(), BookKeepingEngine()
    with engine.recorder.forward(model, data(), squares) as passed:
        reached, nodes = [], [passed._with_graph.grad_fn]
        while nodes:
            node = nodes.pop()
            reached.append(getattr(node, "variable", None))
            nodes += [after for after, _ in node.next_functions if after is not None]
    assert len(reached) > 5
    assert not any(variable is p for variable in reached for p in model.parameters())


def test_an_empty_batch_is_a_sum_of_zeros() -> None:
    nobody = {"x": torch.zeros(0, 3, 6, dtype=torch.float64)}
    found = book_kept(Net(), nobody, loss_release=LossRelease())
    assert {name: grad.shape for name, grad in found.grads.items()} == {
        name: p.shape for name, p in Net().named_parameters()
    }
    assert length(found.grads) == 0
    assert found.norms.shape == found.losses.shape == (0,)
    assert float(found.loss_sum) == 0  # type: ignore[arg-type]

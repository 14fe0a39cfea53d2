"""The engine that is the oracle: it must itself agree with a loop, on models nothing else covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, half_clipped, length, naive
from torch import Tensor, nn
from toy_nets import C, Net, data, squares

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import SequentialEngine, engine_named
from hf_dp.errors import ConfigurationError, UncoveredParameterError
from hf_dp.sums import ClippedSum


def one_by_one(
    model: nn.Module, inputs: Batch, clipping_norm: float = C, loss: Any = squares, **options: Any
) -> ClippedSum:
    return SequentialEngine().clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(clipping_norm), **options
    )


class Anything(nn.Module):
    """Functional weights, a recurrence, attention, a parameter of its own, positions first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.rand(6))
        self.recurrent = nn.GRU(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.recurrent(x.transpose(0, 1))[0].transpose(0, 1)
        out: Tensor = self.attention(hidden, hidden, hidden)[0] * self.gain + self.gain.exp()
        return out


def test_any_model_equals_the_loop() -> None:
    model, inputs = Anything(), data()
    clipping_norm = half_clipped(naive(model, inputs, 1.0, squares).norms)
    expected = naive(model, inputs, clipping_norm, squares)
    assert_same_sum(one_by_one(model, inputs, clipping_norm), expected, 1e-12)


def test_an_empty_batch_is_a_sum_of_zeros() -> None:
    nobody = {"x": torch.zeros(0, 3, 6, dtype=torch.float64)}
    found = one_by_one(Net(), nobody, loss_release=LossRelease())
    assert length(found.grads) == 0
    assert found.norms.shape == (0,)
    assert float(found.loss_sum) == 0  # type: ignore[arg-type]


def test_losses_and_their_coordinate_are_those_of_the_examples() -> None:
    inputs, release = data(), LossRelease(share=0.1, ceiling=20.0)
    found = one_by_one(Net(), inputs, loss_release=release)
    losses = squares(Net(), inputs)
    torch.testing.assert_close(found.losses, losses.detach())
    expected = losses.clamp(max=20.0).sum() * 0.1 * C / 20.0
    torch.testing.assert_close(found.loss_sum, expected.detach())
    assert one_by_one(Net(), inputs).loss_sum is None


def test_a_gradient_that_is_not_finite_drops_its_example_loss_and_all() -> None:
    inputs = data()
    rest = {"x": inputs["x"][1:]}
    inputs["x"][0, 1, 2] = torch.nan
    found = one_by_one(Net(), inputs, loss_release=LossRelease())
    expected = one_by_one(Net(), rest, loss_release=LossRelease())
    assert all(torch.equal(found.grads[name], expected.grads[name]) for name in found.grads)
    assert torch.equal(found.loss_sum, expected.loss_sum)  # type: ignore[arg-type]
    assert torch.isfinite(found.norms).tolist() == [False, True, True, True, True]


def test_a_loss_without_gradient_adds_nothing() -> None:
    found = one_by_one(Net(), data(), loss=lambda model, inputs: inputs["x"].sum((1, 2)))
    assert length(found.grads) == 0


def test_narrow_parameters_are_summed_in_float32() -> None:
    model = Net().bfloat16()
    found = one_by_one(model, {"x": data()["x"].bfloat16()})
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())
    assert found.norms.dtype == torch.float32


@pytest.mark.parametrize("loss", [lambda m, i: squares(m, i).sum(), lambda m, i: m(**i).sum(-1)])
def test_a_loss_that_is_not_one_number_per_example_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"example_loss=.*one loss per example.*\(1,\)"):
        one_by_one(Net(), data(), loss=loss)


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="requires_grad=True"):
        one_by_one(Net().requires_grad_(False), data())


class _Inner(torch.autograd.Function):
    """Runs a backward pass of its own, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer, ctx.x = layer, x
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.layer(x).backward(grad)
        return None, x.grad


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Inner.apply(self.first, self.before(x)))


def test_gradients_that_come_by_another_backward_are_refused_and_not_left_behind() -> None:
    torch.manual_seed(0)
    model = Reversible()
    model.first.bias.grad = kept = torch.ones(3)
    with pytest.raises(UncoveredParameterError, match=r"'first\.weight'.*one backward pass"):
        engine_named("sequential").clipped_sum(
            model,
            {"x": torch.randn(2, 3)},
            example_loss=lambda model, inputs: model(inputs["x"]).sum(1),
            clipping=FlatClipping(1.0),
        )
    assert model.first.weight.grad is None
    assert model.first.bias.grad is kept

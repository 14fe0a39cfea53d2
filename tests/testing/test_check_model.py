"""The check of models passes what is clipped example by example and names what is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_zoo import own_losses
from family_zoo import batch, build
from torch import Tensor, nn
from toy_nets import Net, data, squares

from hf_dp.errors import ConfigurationError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Factor, Mat, Vec
from hf_dp.testing import DisagreementError, check_model
from hf_dp.testing.check_model import projected


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential", "auto"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "swin"])
def test_models_that_are_right_pass(family: str, engine: str) -> None:
    inputs = batch(family)
    check_model(build(family), inputs, engine=engine, example_loss=own_losses)
    inputs.pop("labels")
    check_model(build(family, training=True), inputs, engine=engine)


def test_float64_is_checked_more_closely() -> None:
    check_model(Net(), data(rows=3), tolerance=1e-10)


def wrong(module: Any, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factor]]:
    yield module.weight, Mat(g[:, 1:], x[:, 1:])
    yield module.bias, Vec(g.sum(1))


def test_a_wrong_rule_is_named() -> None:
    rules = {**DEFAULT_LAYER_RULES, nn.Linear: wrong}
    with pytest.raises(DisagreementError, match=r"parameter '(first|second)\.weight'"):
        check_model(Net(), data(rows=3), layer_rules=rules)


class Mixing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(0, keepdim=True) @ self.first.weight


def test_a_model_that_mixes_examples_is_named() -> None:
    with pytest.raises(DisagreementError, match=r"example|batch"):
        check_model(Mixing(), data(rows=3), example_loss=squares)


def test_an_uncovered_use_is_named() -> None:
    def outside(model: nn.Module, inputs: Any) -> Tensor:
        losses: Tensor = squares(model, inputs) + model.get_parameter("first.weight").sum()
        return losses

    with pytest.raises(DisagreementError, match=r"first\.weight"):
        check_model(Net(), data(rows=3), example_loss=outside)


def test_what_cannot_be_checked_is_said() -> None:
    with pytest.raises(ConfigurationError, match="two or more examples"):
        check_model(Net(), data(rows=1))

    class Silent(Net):
        def forward(self, x: Tensor) -> Any:
            return "nothing"

    with pytest.raises(DisagreementError, match="an output with the examples on its first axis"):
        check_model(Silent(), data(rows=3))


def test_the_projection_has_one_number_per_example() -> None:
    losses = projected(build("bert"), {k: v for k, v in batch("bert").items() if k != "labels"})
    assert losses.shape == (4,)
    assert len(set(losses.tolist())) == 4

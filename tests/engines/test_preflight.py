"""Each check of the preflight sees its fault, and nothing else does; a sound model passes unharmed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from preflight_zoo import C, Reader, fly, loss_of
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named
from hf_dp.engines import preflight as module
from hf_dp.errors import ConfigurationError, PrivacyError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Factor, Mat, Vec

ENGINES = ["auto", "book_keeping", "two_pass", "sequential"]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sound_model_passes(engine: str, one_by_one: bool) -> None:
    fly(Reader(), engine=engine_named(engine), one_by_one=one_by_one)


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "places": {name: p.data_ptr() for name, p in model.named_parameters()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "flags": [m.training for m in model.modules()],
        "trains": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.random.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = [(before["values"][k], after["values"][k]) for k in before["values"]]
    values.append((before["torch"], after["torch"]))
    plain = ("places", "buffers", "flags", "trains", "grads", "hooks")
    return all(torch.equal(a, b) for a, b in values) and all(before[k] == after[k] for k in plain)


class Counting(nn.Module):
    """Counts its calls in a buffer, draws, and centres nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.table = torch.ones(x.shape[1])
        torch.rand(())
        return x


@pytest.mark.parametrize("fault", [None, "mates"])
def test_the_model_is_left_as_it_was(fault: str | None) -> None:
    model = Reader(Counting())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    model.table.requires_grad_(False)
    model.body.eval()
    before = everything(model)
    if fault is None:
        fly(model)
    else:
        with pytest.raises(ConfigurationError):
            fly(model, lambda m, i: loss_of(m, i).mean().expand(len(i["ids"])))
    assert same(before, everything(model))
    assert not same(before, everything(Reader(Counting())))


def test_behind_a_head_of_zeros_faults_are_seen_all_the_same() -> None:
    """A new head, and LoRA's second matrix, are zero: nothing before them would have a gradient."""
    model = Reader(nn.LayerNorm(8))
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UncoveredParameterError, match=r"body\.weight"):
        fly(model, engine=BookKeepingEngine({**DEFAULT_LAYER_RULES, nn.Linear: transposed}))


# ---- coverage and agreement ------------------------------------------------------------------------


def transposed(m: nn.Linear, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factor]]:
    """Wrong for any square weight."""
    left, right = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])
    square = m.in_features == m.out_features
    yield m.weight, Mat(right, left) if square else Mat(left, right)
    yield m.bias, Vec(left.sum(1))


def dropping(m: nn.Linear, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factor]]:
    """Leaves the first position out."""
    if g.dim() == 3:
        x, g = x[:, 1:], g[:, 1:]
    left, right = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])
    yield m.weight, Mat(left, right)
    yield m.bias, Vec(left.sum(1))


@pytest.mark.parametrize("rule", [transposed, dropping])
@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass"])
def test_a_wrong_rule_is_named_by_its_parameter(
    rule: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**DEFAULT_LAYER_RULES, nn.Linear: rule}
    if engine == "auto":  # one by one then
        fly(Reader(), engine=engine_named(engine, wrong))
    else:
        with pytest.raises(UncoveredParameterError, match=r"'body\.weight': expected its whole"):
            fly(Reader(), engine=engine_named(engine, wrong))
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    with pytest.raises(UncoveredParameterError, match=r"body\.weight='Linear'"):
        fly(Reader(), engine=engine_named(engine, wrong))
    monkeypatch.setattr(module, "_check_agreement", lambda *_: None)
    fly(Reader(), engine=engine_named(engine, wrong))  # nothing else sees it


class NormsOnly(SequentialEngine):
    """The right sum, and norms that are not those of the gradients."""

    def clipped_sum(self, *args: Any, **options: Any) -> Any:
        summed = super().clipped_sum(*args, **options)
        summed.norms.mul_(1.01)
        return summed


def test_norms_must_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UncoveredParameterError):
        fly(Reader(), engine=NormsOnly())


def test_a_parameter_that_is_not_covered_is_named() -> None:
    class Gated(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(8))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.body(self.table(ids)) * self.gate
            logits: Tensor = self.head(
                (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            )
            return logits

    fly(Gated(), engine=engine_named("auto"))
    engine = BookKeepingEngine()
    engine.recorder.coverage(model := Gated()).uncovered["gate"] = "gate is left out"
    with pytest.raises(UncoveredParameterError, match="gate"):
        fly(model, engine=engine)


# ---- influence -------------------------------------------------------------------------------------


class TwiceTheBound(FlatClipping):
    def weights(self, power_sums: Any) -> Any:
        return {name: 2 * w for name, w in super().weights(power_sums).items()}

    def scaled(self, factor: float) -> FlatClipping:
        return TwiceTheBound(self.clipping_norm * factor)


class NoClipping(FlatClipping):
    def weights(self, power_sums: Any) -> Any:
        return {name: torch.ones_like(square) for name, square in power_sums.items()}

    def scaled(self, factor: float) -> FlatClipping:
        return NoClipping(self.clipping_norm * factor)


class ByTheBatch(FlatClipping):
    """Each example's weight depends on the largest norm among its batch mates."""

    def weights(self, power_sums: Any) -> Any:
        largest = torch.stack(list(power_sums.values())).sum(0).max().sqrt()
        return {n: (self.clipping_norm / largest).expand(len(s)) for n, s in power_sums.items()}

    def scaled(self, factor: float) -> FlatClipping:
        return ByTheBatch(self.clipping_norm * factor)


@pytest.mark.parametrize("policy", [TwiceTheBound(C), NoClipping(C)])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_policy_that_does_not_bound_is_refused(
    policy: FlatClipping, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match=f"^clipping='{type(policy).__name__}'.*It moved by"):
        fly(Reader(), clipping=policy, one_by_one=one_by_one)
    monkeypatch.setattr(module, "_check_influence", lambda *_: None)
    fly(Reader(), clipping=policy, one_by_one=one_by_one)  # nothing else sees it


def test_weights_that_depend_on_batch_mates_are_refused() -> None:
    with pytest.raises(PrivacyError):
        fly(Reader(), clipping=ByTheBatch(C))

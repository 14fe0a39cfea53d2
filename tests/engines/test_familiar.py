"""Code from elsewhere is proved on every batch; what libraries ship is judged by its graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from adapter_zoo import adapted
from engine_zoo import Batch, assert_same_sum, build, naive
from family_zoo import FAMILIES
from family_zoo import build as build_family
from torch import Tensor, nn
from toy_nets import C
from transformers import BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, familiar, recorder
from hf_dp.engines.familiar import foreign_code, is_from_library
from hf_dp.errors import ConfigurationError, UncoveredParameterError
from hf_dp.training.tasks import Task
from hf_dp.training.vectorised import vectorised_loss


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_of_transformers_are_familiar(family: str) -> None:
    assert not foreign_code(build_family(family))


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "t5"])
def test_adapters_are_familiar(family: str) -> None:
    assert not foreign_code(adapted(family, torch.float32))


def test_the_library_s_losses_are_familiar() -> None:
    assert is_from_library(vectorised_loss(Task.CAUSAL_LM))
    assert not is_from_library(functools.partial(mine, 1))
    assert not is_from_library(Callable_().method)


class Callable_:
    def __call__(self, *args: Any) -> Any: ...
    def method(self, *args: Any) -> Any: ...


def mine(*args: Any) -> Any: ...


class Variant:
    """As peft's LoraVariant: not called itself, but its methods are."""


class OwnModelHook(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return output


class MyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def own_class(model: Any) -> None:
    model.classifier = MyLinear(16, 2)


def own_forward(model: Any) -> None:
    model.classifier.forward = mine


def own_hook(model: Any) -> None:
    model.classifier.register_forward_hook(mine)


def own_pre_hook(model: Any) -> None:
    model.classifier.register_forward_pre_hook(mine)


def own_function(model: Any) -> None:
    model.bert.encoder.layer[0].feed_forward_chunk = mine


def own_callable(model: Any) -> None:
    model.bert.encoder.layer[0].feed_forward_chunk = Callable_()


def own_partial(model: Any) -> None:
    model.bert.encoder.layer[0].feed_forward_chunk = functools.partial(mine, 1)


def own_decorator(model: Any) -> None:
    dense = model.bert.pooler.dense
    dense.forward = functools.wraps(dense.forward)(lambda *args: mine(*args))


def own_list(model: Any) -> None:
    model.bert.steps = [(mine,)]


def own_variant(model: Any) -> None:
    model.bert.pooler.lora_variant = {"default": Variant()}


def own_appended_hook(model: Any) -> None:
    add_hook_to_module(model.classifier, ModelHook())
    assert foreign_code(model) == ""
    add_hook_to_module(model.classifier, OwnModelHook(), append=True)


def own_model_hook(model: Any) -> None:
    add_hook_to_module(model.classifier, OwnModelHook())


def traced(model: Any) -> None:
    model.classifier = torch.fx.symbolic_trace(model.classifier)


@pytest.mark.parametrize(
    "change",
    [own_class, own_forward, own_hook, own_pre_hook, own_function, own_callable, own_partial,
     own_decorator, own_list, own_variant, own_model_hook, own_appended_hook, traced],
)  # fmt: skip
def test_code_of_one_s_own_is_seen_wherever_it_is_put(change: Callable[[Any], None]) -> None:
    model = build("bert-cls")
    assert foreign_code(model) == ""
    change(model)
    assert foreign_code(model).startswith(("class ", "a value, hook or method of module "))


def test_a_method_that_is_put_in_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert-cls")
    monkeypatch.setattr(BertModel, "get_extended_attention_mask", mine, raising=False)
    assert foreign_code(model)


def test_a_property_that_is_put_in_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert-cls")
    monkeypatch.setattr(BertModel, "scale", property(mine), raising=False)
    assert foreign_code(model)


def test_a_function_that_is_put_in_a_library_s_file_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.models.bert.modeling_bert.eager_attention_forward", mine)
    said = "a function put into transformers.models.bert.modeling_bert"
    assert foreign_code(build("bert-cls")) == said


def test_an_attention_of_one_s_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert-cls")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mine)
    assert foreign_code(model) == "an entry of ALL_ATTENTION_FUNCTIONS"


def test_a_file_that_is_called_as_one_of_python_s_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = ModuleType("code")
    shadow.__file__ = "/home/somebody/code.py"
    monkeypatch.setitem(sys.modules, "code", shadow)
    familiar._known_name.cache_clear()
    try:
        assert not familiar._known_name("code")
    finally:
        familiar._known_name.cache_clear()
    assert familiar._known_name("functools")


def test_a_hook_on_all_modules_is_seen() -> None:
    handle = nn.modules.module.register_module_forward_hook(mine)
    try:
        assert foreign_code(build("bert-cls"))
    finally:
        handle.remove()


# ---- what follows from it ------------------------------------------------------------------------


class Regroups(nn.Module):
    """A number that its owner sets, no tensor, decides whether tokens of two examples meet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.later = nn.Linear(4, 4).double(), False

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x)
        return hidden.roll(int(self.later), 0)


def squares(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = model(inputs["x"]).square().flatten(1).mean(1)
    return losses


@pytest.fixture
def blind_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nothing in a graph is said to move rows."""
    monkeypatch.setattr("hf_dp.engines.by_content._role_of", lambda _: None)


def at_the_second_batch() -> None:
    torch.manual_seed(0)
    model, engine, x = Regroups(), BookKeepingEngine(), torch.randn(4, 3, 4).double()
    options = {"example_loss": squares, "clipping": FlatClipping(C)}
    engine.clipped_sum(model, {"x": x}, **options)
    model.later = True
    found = engine.clipped_sum(model, {"x": x}, **options)
    assert_same_sum(found, naive(model, {"x": x}, C, squares), 1e-6)


@pytest.mark.usefixtures("blind_walk")
def test_a_model_of_one_s_own_is_proved_on_every_batch() -> None:
    with pytest.raises(UncoveredParameterError):
        at_the_second_batch()


@pytest.mark.usefixtures("blind_walk", "taken_as_familiar")
def test_without_that_a_later_batch_is_wrong() -> None:
    """Planted: its code is taken for a library's, and the graph shows nothing."""
    with pytest.raises(AssertionError):
        at_the_second_batch()


class Later:
    """A loss that from some batch on takes rows that are not its own."""

    def __init__(self, past_the_outputs: bool) -> None:
        self.later, self.past = [False], past_the_outputs  # a list does not tell losses apart

    def __call__(self, model: Any, inputs: Batch) -> Tensor:
        out = model(inputs["x"])
        if self.past:
            out = model.layer(inputs["x"]) if hasattr(model, "layer") else model[0](inputs["x"])
        losses: Tensor = out.roll(int(self.later[0]), 0).square().flatten(1).mean(1)
        return losses


def with_a_loss_that_changes(*, past_the_outputs: bool) -> None:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh()), Later(past_the_outputs)
    engine, inputs = BookKeepingEngine(), {"x": torch.randn(4, 3, 4).double()}
    options = {"example_loss": loss, "clipping": FlatClipping(C)}
    assert not foreign_code(model)
    engine.clipped_sum(model, inputs, **options)
    loss.later[0] = True
    found = engine.clipped_sum(model, inputs, **options)
    assert_same_sum(found, naive(model, inputs, C, loss), 1e-6)


@pytest.mark.usefixtures("blind_walk")
@pytest.mark.parametrize("past", [False, True])
def test_a_loss_of_one_s_own_is_proved_on_every_batch(
    past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UncoveredParameterError):
        with_a_loss_that_changes(past_the_outputs=past)
    monkeypatch.setattr("hf_dp.engines.own_losses.Calls.prove", lambda *_: True)  # planted
    with pytest.raises(ConfigurationError, match="batch mates"):  # the losses show it, too
        with_a_loss_that_changes(past_the_outputs=past)
    monkeypatch.setattr("hf_dp.engines.recorder.Ends.show", lambda *_: False)  # planted
    with pytest.raises(AssertionError):
        with_a_loss_that_changes(past_the_outputs=past)


def test_a_loss_of_one_s_own_leaves_a_familiar_model_unproved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of its outputs show enough: no further pass goes through the model."""
    proofs: list[int] = []

    class Noted(recorder.Proof):
        def __init__(self, *args: Any) -> None:
            proofs.append(1)
            super().__init__(*args)

    monkeypatch.setattr(recorder, "Proof", Noted)
    model, engine = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), BookKeepingEngine()
    for _ in range(3):
        engine.clipped_sum(
            model, {"x": torch.randn(4, 3, 4)}, example_loss=squares, clipping=FlatClipping(C)
        )
    assert len(proofs) == 1


def swapped(model: Any) -> None:
    model[1] = Roll()


def patched_class(model: Any) -> None:
    type(model[2]).activation = lambda _, x: x.roll(1, 0)


def patched_forward(model: Any) -> None:
    type(model[2]).forward = lambda _, x: x.roll(1, 0)


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 0)


@pytest.mark.parametrize("change", [swapped, patched_class, patched_forward])
@pytest.mark.parametrize("noticed", [True, False])
def test_what_becomes_somebody_else_s_after_the_first_batch_is_looked_at_anew(
    change: Callable[[Any], None], noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(nn.Module):
        def activation(self, x: Tensor) -> Tensor:
            return x.tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(x)

    if not noticed:  # planted
        monkeypatch.setattr("hf_dp.engines.coverage.made_of", lambda _: ([],))
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh(), Plain())
    engine = BookKeepingEngine()
    before = engine.recorder.coverage(model)
    assert engine.recorder.coverage(model) is before
    change(model)
    assert (engine.recorder.coverage(model) is not before) is noticed

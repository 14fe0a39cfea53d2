"""What a clipped sum leaves behind: every parameter is still the one that the optimizer has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from family_zoo import batch, build, stir
from left_alone import left_alone, state_of
from peft import PromptEncoderConfig, TaskType, VBLoRAConfig, get_peft_model
from torch import Tensor, nn
from toy_nets import C, Net, data, squares

import hf_dp
from hf_dp.engines import engine_named
from hf_dp.layers import whole

ENGINES = ("auto", "book_keeping", "two_pass", "sequential")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class OneBlock(nn.Module):
    """One block, four times, and a learned first token, for which the whole model answers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList([Block()] * 4), nn.Linear(6, 3)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0] + x.mean(1))


class Siamese(nn.Module):
    """Two towers that are one module, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = Block()
        self.right, self.head = self.left, nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        both = self.left(x).mean(1) * self.right(x.flip(1)).amax(1)
        return self.head(both) * self.temperature.exp()


class Again(Net):
    """A layer under two names, tied to a third module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.gains = self.first, nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.again(self.first(x))) * self.gains)


TWICE: tuple[Callable[[], nn.Module], ...] = (OneBlock, Siamese, Again)


def sums_stay_right(make: Callable[[], nn.Module], engine: str) -> None:
    model, chosen = make(), engine_named(engine)
    expected = naive(make(), data(), C, squares)
    for _ in range(2):
        with left_alone(model):
            found = hf_dp.clipped_sum(
                model, data(), clipping_norm=C, example_loss=squares, engine=chosen
            )
        assert_same_sum(found, expected, 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", TWICE)
def test_a_module_registered_twice_stays_trained(
    make: Callable[[], nn.Module], engine: str
) -> None:
    sums_stay_right(make, engine)


@pytest.mark.parametrize("make", TWICE)
def test_a_module_replaced_under_both_its_names_would_be_seen(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def under_all_names(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(f"inner.{n}", p) for n, p in module.named_parameters(remove_duplicate=False)]

    monkeypatch.setattr(whole, "_named_once", under_all_names)
    with pytest.raises(AssertionError):
        sums_stay_right(make, "auto")


def vb_lora() -> nn.Module:
    """LoRA whose one bank of vectors is a module of each layer."""
    settings = VBLoRAConfig(
        r=2, num_vectors=6, vector_length=2, topk=2, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(build("llama"), settings)


def p_tuning(family: str, task: TaskType) -> nn.Module:
    """Learned prompts, made by a small network; the frozen embedding has two names."""
    settings = PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type=task, num_transformer_submodules=1
    )
    return get_peft_model(build(family), settings)


def loss_at_the_end(model: nn.Module, inputs: Batch) -> Tensor:
    """Without the positions of a learned prompt."""
    logits, labels = model(**inputs).logits, inputs["labels"]
    logits = logits[:, -labels.shape[1] :]
    return nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("llama", vb_lora),
        ("llama", lambda: p_tuning("llama", TaskType.CAUSAL_LM)),
        ("t5", lambda: p_tuning("t5", TaskType.SEQ_2_SEQ_LM)),
    ],
)
def test_adapters_that_share_modules_stay_trained(
    family: str, make: Callable[[], nn.Module]
) -> None:
    model, chosen = make(), engine_named("two_pass")
    stir(model)
    inputs = batch(family)
    expected = naive(model, inputs, C, loss_at_the_end)
    for _ in range(2):
        with left_alone(model):
            found = hf_dp.clipped_sum(
                model, inputs, clipping_norm=C, example_loss=loss_at_the_end, engine=chosen
            )
        assert_same_sum(found, expected, 1e-4)


def test_a_refused_model_is_left_alone() -> None:
    """Taps switch off what parameters record; an error within the forward pass must not leave it so."""

    class Raises(Again):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("an example's name")

    model = Raises()
    with left_alone(model), pytest.raises(KeyError):
        hf_dp.clipped_sum(
            model, data(), clipping_norm=C, example_loss=squares, engine="book_keeping"
        )


def test_a_parameter_put_in_place_of_another_is_seen() -> None:
    model = Net()
    before = state_of(model)
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    assert state_of(model) != before

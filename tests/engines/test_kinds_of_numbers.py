"""Complex numbers, sparse gradients and gradients that are off: right, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, data, squares

import hf_dp
from hf_dp.clipping import FlatClipping
from hf_dp.engines import engine_named, own_losses
from hf_dp.engines.whole_tap import Leaves
from hf_dp.errors import ConfigurationError, UncoveredParameterError

ENGINES = ("auto", "book_keeping", "two_pass", "sequential")


def same_sum(model: nn.Module, engine: str, inputs: Batch | None = None, norm: int = 2) -> None:
    inputs = data() if inputs is None else inputs
    expected = naive(model, inputs, C, squares, norm)
    found = hf_dp.clipped_sum(
        model,
        inputs,
        clipping_norm=C,
        clipping_norm_type="l1" if norm == 1 else "l2",
        example_loss=squares,
        engine=engine,
    )
    assert_same_sum(found, expected, 1e-10)


# ---- complex numbers -----------------------------------------------------------------------------


class Waves(Net):
    """A diagonal state space layer, whose parameter is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.randn(6, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * self.modes).real)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_complex_parameters_are_refused_by_name(engine: str, norm: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"model\.modes\.dtype=torch\.complex128: expected"
    ):
        hf_dp.clipped_sum(
            Waves(),
            data(),
            clipping_norm=C,
            clipping_norm_type=norm,  # type: ignore[arg-type]
            example_loss=squares,
            engine=engine,
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_complex_parameters_are_none_of_our_business(engine: str) -> None:
    model = Waves()
    model.modes.requires_grad_(False)
    same_sum(model, engine)


class Polar(nn.Module):
    """Real parameters, complex output."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.linspace(0.5, 2, 6))
        self.phases = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.polar(x.abs() * self.gains, x * self.phases)


class Norm(nn.Module):
    """What counts as an RMS norm, and is one for real numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 2, 6)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.abs().pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Complex(Net):
    """Complex numbers in between."""

    def __init__(self) -> None:
        super().__init__()
        self.polar, self.norm = Polar(), Norm()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.polar(self.first(x))).abs())


class ComplexToTheEnd(Complex):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.polar(self.second(self.first(x))))


def lengths(model: nn.Module, inputs: Batch) -> Tensor:
    """Losses of complex outputs."""
    return model(**inputs).abs().square().flatten(1).sum(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_return_complex_numbers_equal_the_loop(engine: str) -> None:
    same_sum(Complex(), engine)


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_complex_output_that_no_tap_sees_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Leaves, "any_complex", False)
    with pytest.raises(UncoveredParameterError, match="expected its whole gradient"):
        same_sum(Complex(), "book_keeping")
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    with pytest.raises(AssertionError):
        same_sum(Complex(), "book_keeping")


def test_a_model_that_returns_complex_numbers_goes_one_by_one() -> None:
    model = ComplexToTheEnd()
    with pytest.raises(UncoveredParameterError, match="returns complex numbers: expected real"):
        hf_dp.clipped_sum(
            model, data(), clipping_norm=C, example_loss=lengths, engine="book_keeping"
        )
    found = hf_dp.clipped_sum(model, data(), clipping_norm=C, example_loss=lengths)
    assert_same_sum(found, naive(model, data(), C, lengths), 1e-10)


def test_a_loss_that_mixes_imaginary_parts_is_not_proved() -> None:
    """All of the gradient counts, not its real part."""
    z = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    calls = own_losses.Calls(nn.Identity())
    made = z * 1
    calls.note(calls.model, (), {}, made)
    own = made.abs().square().sum(1)
    assert calls.prove(own)
    mixed = made.real.square().sum(1) + made.imag.roll(1, 0).square().sum(1)
    assert not calls.prove(mixed)


# ---- sparse gradients ----------------------------------------------------------------------------


class Table(Net):
    """A table whose gradient torch gives by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=True, padding_idx=0).double()

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.table(ids))


class Scaled(nn.Embedding):
    """A table with a forward of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class OwnTable(Table):
    def __init__(self) -> None:
        super().__init__()
        self.table = Scaled(20, 6, sparse=True).double()


class Bag(Table):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(20, 6, sparse=True, mode="sum").double()


class Tied(Table):
    """The table gives the logits, too: one sparse gradient, one that is not."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ self.table.weight.T


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [Table, OwnTable, Bag, Tied])
def test_sparse_gradients_are_written_out(make: Callable[[], nn.Module], engine: str) -> None:
    ids = torch.randint(0, 20, (5, 4), generator=torch.Generator().manual_seed(1))
    model, inputs = make(), {"ids": ids}
    twin = make()
    twin.load_state_dict(model.state_dict())
    twin.table.sparse = False  # type: ignore[union-attr, assignment]
    for norm in (1, 2):
        expected = naive(twin, inputs, C, squares, norm)
        found = hf_dp.clipped_sum(
            model,
            inputs,
            clipping_norm=C,
            clipping_norm_type="l1" if norm == 1 else "l2",
            example_loss=squares,
            engine=engine,
        )
        assert_same_sum(found, expected, 1e-10)
        assert not any(grad.is_sparse for grad in found.grads.values())


# ---- gradients that are off, or watched ----------------------------------------------------------


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_gradients_there_is_no_sum(off: Callable[[], torch.no_grad], engine: str) -> None:
    """It would be zero, and look like that of examples that have nothing to say."""
    model = Net()
    with off(), pytest.raises(ConfigurationError, match="expected gradients to be on"):
        hf_dp.clipped_sum(model, data(), clipping_norm=C, example_loss=squares, engine=engine)
    with off(), pytest.raises(ConfigurationError, match="expected gradients to be on"):
        engine_named(engine).clipped_sum(
            model, data(), example_loss=squares, clipping=FlatClipping(C)
        )
    with torch.no_grad(), torch.enable_grad():
        same_sum(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_on_parameters_are_named(engine: str) -> None:
    def hook(grad: Tensor, factor: int) -> Tensor:
        return grad * factor

    model = Net()
    model.first.weight.register_hook(functools.partial(hook, factor=2))
    expected = rf"model\.first\.weight='hooks of {__name__}': expected no gradient hooks"
    with pytest.raises(ConfigurationError, match=expected) as refused:
        hf_dp.clipped_sum(model, data(), clipping_norm=C, example_loss=squares, engine=engine)
    assert "WANDB" not in str(refused.value)


def test_a_cache_among_the_outputs_is_named_with_its_remedy() -> None:
    class Cache:
        """Holds what was computed."""

    class Caches(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:  # type: ignore[override]
            return super().forward(x * self.gain), Cache()

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return model(**inputs)[0].square().flatten(1).sum(1)

    with pytest.raises(UncoveredParameterError, match=r"Cache \(use_cache=False leaves it out\)"):
        hf_dp.clipped_sum(
            Caches(), data(), clipping_norm=C, example_loss=loss, engine="book_keeping"
        )


def test_wandb_is_named_where_it_watches() -> None:
    def hook(grad: Tensor) -> None:
        return None

    hook.__module__ = "wandb.integration.torch"
    model = Net()
    model.first.weight.register_hook(hook)
    with pytest.raises(ConfigurationError, match="Leave WANDB_WATCH unset"):
        hf_dp.clipped_sum(model, data(), clipping_norm=C, example_loss=squares)

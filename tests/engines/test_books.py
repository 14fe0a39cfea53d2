"""Books against the same factors, reduced one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_dp.engines import books as module
from hf_dp.engines.books import Books
from hf_dp.engines.shares import Shares
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import Factor, Mat, OneHot, Total, Vec

UNITS = 4


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors() -> dict[str, Factor]:
    ids = torch.randint(0, 50, (UNITS, 6), generator=torch.Generator().manual_seed(0))
    head = Mat(numbers(UNITS, 3, 50, seed=1), numbers(UNITS, 3, 8, seed=2))
    return {
        "gram": Mat(numbers(UNITS, 3, 20, seed=3), numbers(UNITS, 3, 30, seed=4)),
        "adapter": Mat(numbers(UNITS, 9, 2, seed=5), numbers(UNITS, 9, 5, seed=6)),
        "bias": Vec(numbers(UNITS, 10, seed=7)),
        "gain": Vec(numbers(UNITS, 10, seed=8)),
        "matrix": Vec(numbers(UNITS, 5, 2, seed=9)),
        "table": OneHot(ids, numbers(UNITS, 6, 8, seed=10), 50),
        "tied": Total([OneHot(ids, numbers(UNITS, 6, 8, seed=11), 50), head]),
        "number": Vec(numbers(UNITS, seed=12)),
    }


def written_out() -> dict[str, Tensor]:
    return {name: factor.dense().values for name, factor in factors().items()}


def kept() -> Books:
    books = Books()
    for name, factor in factors().items():
        books.add(name, factor)
    return books


@pytest.mark.parametrize("small", [0, 9, 2**16])
def test_norms_and_sums_are_those_of_the_factors(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL", small)
    books, dense = kept(), written_out()
    norms = books.norms(torch.zeros(UNITS))
    assert norms.squared.keys() == dense.keys()
    for name, values in dense.items():
        torch.testing.assert_close(norms.squared[name], values.reshape(UNITS, -1).square().sum(1))
    weights = {name: numbers(UNITS, seed=seed) for seed, name in enumerate(dense)}
    found = books.sums(weights, {name: values.shape[1:] for name, values in dense.items()}, None)
    for name, values in dense.items():
        expected = torch.einsum("b,b...->...", weights[name], values)
        torch.testing.assert_close(found[name], expected)


def test_one_weight_for_all_parameters_gives_the_same() -> None:
    books, dense, weight = kept(), written_out(), numbers(UNITS, seed=0)
    books.norms(torch.zeros(UNITS))
    shapes = {name: values.shape[1:] for name, values in dense.items()}
    found = books.sums(dict.fromkeys(dense, weight), shapes, None)
    for name, values in dense.items():
        torch.testing.assert_close(found[name], torch.einsum("b,b...->...", weight, values))


def test_dropped_units_and_units_apart_are_told_from_the_rest() -> None:
    books, dense, weight = kept(), written_out(), numbers(UNITS, seed=0)
    norms = books.norms(torch.tensor([0.0, torch.nan, 0.0, 0.0]))
    assert torch.isinf(norms.total()).tolist() == [False, True, False, False]
    apart = torch.tensor([[2]])
    before = norms.total()
    books.take_apart(norms, apart)
    torch.testing.assert_close(norms.total(), before)
    shapes = {name: values.shape[1:] for name, values in dense.items()}
    dropped = ~torch.isfinite(norms.total())
    found = books.sums(dict.fromkeys(dense, weight), shapes, Shares(dropped, apart))
    weight[1] = 0
    for name, values in dense.items():
        torch.testing.assert_close(found[name], torch.einsum("b,b...->...", weight, values))


def test_nothing_kept_has_norm_zero() -> None:
    norms = Books().norms(torch.tensor([0.0, torch.inf]))
    assert norms.total().tolist() == [0, torch.inf]


@pytest.mark.parametrize("name", ["bias", "gram"])
def test_a_gradient_of_another_shape_is_refused(name: str) -> None:
    books, dense = kept(), written_out()
    books.norms(torch.zeros(UNITS))
    shapes = {key: values.shape[1:] for key, values in dense.items()} | {name: torch.Size([3, 3])}
    with pytest.raises(UncoveredParameterError, match=name):
        books.sums(dict.fromkeys(dense, numbers(UNITS, seed=0)), shapes, None)

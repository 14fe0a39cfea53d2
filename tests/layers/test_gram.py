"""Gram matrices in triangles, batches and shared sides, against products written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_dp.layers import gram
from hf_dp.layers.factors import Mat, OneHot
from hf_dp.layers.gram import GramBatch, row_blocks, squares_of_product
from hf_dp.layers.scaled import ScaledProducts

UNITS = 3


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of the products, and what they would be if positions were orthogonal."""
    dense = torch.einsum("btd,btp->bdp", left, right)
    apart = (left.square().sum(2) * right.square().sum(2)).sum(1)
    return dense.square().sum((1, 2)), apart


@pytest.mark.parametrize("positions", [1, 95, 96, 97, 191, 192, 195, 1030])
def test_blocks_cover_every_row_once(positions: int) -> None:
    rows = [row for start, stop in row_blocks(positions) for row in range(start, stop)]
    assert rows == list(range(positions))
    computed = sum((stop - start) * (positions - start) for start, stop in row_blocks(positions))
    assert computed <= (1.0 if positions < 96 else 0.77) * positions**2


@pytest.mark.parametrize("positions", [0, 1, 5, 96, 101, 199])
def test_a_pair_s_squares_are_those_of_the_product(positions: int) -> None:
    left, right = numbers(UNITS, positions, 7, seed=0), numbers(UNITS, positions, 9, seed=1)
    squared, apart = truth(left, right)
    found = squares_of_product(left, right)
    torch.testing.assert_close(found.squared, squared, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.uncancelled, apart, rtol=1e-11, atol=0)


@pytest.mark.parametrize("room", [1, 2, 2**20])
@pytest.mark.parametrize("largest", [1, 2**23])
def test_a_batch_gives_each_pair_its_own_squares(
    room: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "BUFFER", room)
    monkeypatch.setattr(gram, "LARGEST", largest)
    shared = numbers(UNITS, 100, 9, seed=1)
    pairs = {
        "q": (numbers(UNITS, 100, 7, seed=2), shared),
        "k": (numbers(UNITS, 100, 5, seed=3), shared),
        "other": (numbers(UNITS, 100, 7, seed=4), numbers(UNITS, 100, 8, seed=5)),
        "pooler": (numbers(UNITS, 1, 7, seed=6), numbers(UNITS, 1, 8, seed=7)),
        "empty": (numbers(UNITS, 0, 7, seed=8), numbers(UNITS, 0, 8, seed=9)),
        "longer": (numbers(UNITS, 200, 7, seed=8), numbers(UNITS, 200, 8, seed=9)),
        "v": (numbers(UNITS, 100, 7, seed=10), shared),
    }
    batch = GramBatch()
    for name, (left, right) in pairs.items():
        batch.add(name, left, right)
    found = batch.results()
    assert found.keys() == pairs.keys()
    for name, (left, right) in pairs.items():
        squared, apart = truth(left, right)
        torch.testing.assert_close(found[name].squared, squared, rtol=1e-11, atol=0)
        torch.testing.assert_close(found[name].uncancelled, apart, rtol=1e-11, atol=0)


def test_another_view_of_the_same_memory_is_not_taken_for_the_same_numbers() -> None:
    whole = numbers(UNITS, 8, 6, seed=0)
    views = [whole, whole[:, :4], whole[:, 4:], whole[:, :4, :3], whole.transpose(1, 2)]
    pairs = {str(i): (numbers(*view.shape, seed=i), view) for i, view in enumerate(views)}
    batch, products = GramBatch(), ScaledProducts()
    for name, pair in pairs.items():
        batch.add(name, *pair)
    weights = numbers(UNITS, seed=9)
    for name, (left, right) in pairs.items():
        expected = truth(left, right)[0]
        torch.testing.assert_close(batch.results()[name].squared, expected, rtol=1e-11, atol=0)
        summed = torch.einsum("b,btd,btp->dp", weights, left, right)
        torch.testing.assert_close(products.weighted_sum(left, right, weights), summed)


def test_a_scaled_side_is_not_kept_for_other_weights() -> None:
    left, right = numbers(UNITS, 4, 6, seed=0), numbers(UNITS, 4, 6, seed=1)
    products = ScaledProducts()
    for seed in (2, 3):
        weights = numbers(UNITS, seed=seed)
        summed = torch.einsum("b,btd,btp->dp", weights, left, right)
        torch.testing.assert_close(products.weighted_sum(left, right, weights), summed)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("used", [0, 1, 3, 14, 15])
def test_empty_last_positions_are_left_out(side: int, used: int) -> None:
    pair = [numbers(UNITS, 16, 5, seed=0), numbers(UNITS, 16, 6, seed=1)]
    pair[side][:, used:] = 0
    pair[side][0, used // 2 :] = 0
    squared, _ = truth(*pair)
    factor = Mat(*pair)
    assert factor.trimmed() is (used < 15)  # one position alone pays nothing
    assert factor.left.shape[1] == factor.right.shape[1] == (max(1, used) if used < 15 else 16)
    torch.testing.assert_close(factor.squared_norm(), squared, rtol=1e-11, atol=1e-12)


def test_a_settled_factor_lets_go_of_what_it_was_made_of() -> None:
    left, right = numbers(UNITS, 30, 5, seed=0), numbers(UNITS, 30, 6, seed=1)
    factor, table = Mat(left, right), OneHot(torch.zeros(UNITS, 30, dtype=torch.long), left, 4)
    for made, fields in ((factor, ("left", "right")), (table, ("rows", "ids"))):
        made.settle()
        assert made.written() is not None
        assert all(getattr(made, field).untyped_storage().nbytes() == 0 for field in fields)


def test_a_settled_table_has_each_id_s_rows_added_up() -> None:
    ids = torch.tensor([[3, 1, 3, 3], [2, 2, 9, 0]])
    rows = numbers(2, 4, 5, seed=0)
    table = OneHot(ids, rows, 10)
    before, weights = table.dense().values, numbers(2, seed=1)
    table.settle()
    torch.testing.assert_close(table.dense().values, before)
    torch.testing.assert_close(table.squared_norm(), before.square().sum((1, 2)))
    torch.testing.assert_close(table.uncancelled(), table.squared_norm())
    summed = torch.einsum("b,bvd->vd", weights, before)
    torch.testing.assert_close(table.weighted_sum(weights), summed)

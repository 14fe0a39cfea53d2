"""Factors against the gradients they stand for, written out in float64 by einsum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from hf_dp.layers.factors import Factor, Mat, OneHot, Total, Vec, combine, sum_of, wide
from hf_dp.layers.routed import Routed

UNITS = 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}
Case = tuple[Factor, Tensor]  # a factor and its gradients written out, (B, *shape)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mat(positions: int, d: int, p: int, seed: int = 0) -> Case:
    left, right = (
        numbers(UNITS, positions, d, seed=seed),
        numbers(UNITS, positions, p, seed=seed + 1),
    )
    return Mat(left, right), torch.einsum("btd,btp->bdp", left, right)


def one_hot(positions: int, rows: int, width: int, seed: int = 0) -> Case:
    ids = torch.randint(0, rows, (UNITS, positions), generator=torch.Generator().manual_seed(seed))
    values = numbers(UNITS, positions, width, seed=seed + 1)
    selected = torch.nn.functional.one_hot(ids, rows).double()
    return OneHot(ids, values, rows), torch.einsum("btv,btd->bvd", selected, values)


def routed(rows: int, experts: int, d: int, p: int, seed: int = 0) -> Case:
    """Rows in any order; unit 2 has none at expert 1, and the last expert none at all."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, (experts - 1) * UNITS, (rows,), generator=generator)
    places[places == UNITS + 2] = 0
    left, right = numbers(rows, d, seed=seed + 1), numbers(rows, p, seed=seed + 2)
    dense = left.new_zeros(UNITS, experts, d, p)
    for place, one, other in zip(places.tolist(), left, right, strict=True):
        dense[place % UNITS, place // UNITS] += torch.outer(one, other)
    return Routed(left, right, places, num_experts=experts, num_units=UNITS), dense


def stored(case: Case, axes: tuple[int, int, int], shape: tuple[int, ...]) -> Case:
    """Experts' matrices with their axes in another order and put in another shape."""
    factor, dense = case
    assert isinstance(factor, Routed)
    factor.layout = (axes, shape)
    return factor, dense.permute(0, *(axis + 1 for axis in axes)).reshape(UNITS, *shape)


def vec(*shape: int, seed: int = 0) -> Case:
    values = numbers(UNITS, *shape, seed=seed)
    return Vec(values), values


def total(*cases: Case) -> Case:
    return Total([factor for factor, _ in cases]), sum_of([dense for _, dense in cases])


CASES: dict[str, Callable[[], Case]] = {
    "vec": lambda: vec(7),
    "vec of a number": lambda: vec(),
    "vec of a matrix": lambda: vec(5, 3),
    "mat by Gram": lambda: mat(3, 8, 9),
    "mat written out": lambda: mat(30, 8, 9),
    "mat of one position": lambda: mat(1, 8, 9),
    "mat of many rows": lambda: mat(5, 40, 6),
    "one hot": lambda: one_hot(6, 50, 4),
    "one hot, all repeated": lambda: one_hot(9, 2, 4),
    "one hot of one position": lambda: one_hot(1, 5, 4),
    "routed by Gram": lambda: routed(30, 4, 12, 14),
    "routed written out": lambda: routed(90, 3, 2, 5),
    "routed of both forms": lambda: routed(70, 4, 6, 5),
    "routed of one row": lambda: routed(1, 2, 6, 5),
    "routed, stored by rank": lambda: stored(routed(30, 4, 2, 5), (0, 2, 1), (20, 2)),
    "routed, experts last": lambda: stored(routed(90, 3, 7, 2), (1, 2, 0), (7, 6)),
    "routed, turned": lambda: stored(routed(40, 3, 2, 5), (2, 1, 0), (5, 6)),
    "routed twice, turned": lambda: total(
        stored(routed(9, 3, 6, 5), (2, 1, 0), (5, 18)),
        stored(routed(20, 3, 6, 5, seed=7), (2, 1, 0), (5, 18)),
    ),
    "routed twice": lambda: total(routed(9, 3, 6, 5), routed(20, 3, 6, 5, seed=7)),
    "tied by Gram": lambda: total(one_hot(6, 50, 40), mat(6, 50, 40, seed=5)),
    "tied written out": lambda: total(one_hot(6, 9, 4), mat(20, 9, 4, seed=5)),
    "three of a kind": lambda: total(vec(9, 4), one_hot(6, 9, 4), mat(5, 9, 4, seed=5)),
}


def check(factor: Factor, dense: Tensor) -> None:
    """Everything a factor can do, against its gradients written out."""
    flat = dense.reshape(UNITS, -1)
    weights, zeros = numbers(UNITS, seed=9), torch.tensor([False, True, False, True])
    some = torch.tensor([2, 0])
    close = torch.testing.assert_close
    close(factor.squared_norm(), flat.square().sum(1), **EXACT)
    close(factor.weighted_sum(weights), torch.einsum("b,b...->...", weights, dense), **EXACT)
    close(factor.dense().values, dense, **EXACT)
    close(factor.select(some).squared_norm(), flat[some].square().sum(1), **EXACT)
    close(
        factor.select(some).weighted_sum(weights[some]),
        torch.einsum("b,b...->...", weights[some], dense[some]),
        **EXACT,
    )
    kept = dense.clone()
    kept[zeros] = 0
    close(factor.without(zeros).squared_norm(), kept.reshape(UNITS, -1).square().sum(1), **EXACT)
    close(factor.without(zeros).weighted_sum(weights), torch.einsum("b,b...->...", weights, kept))
    close(factor.without(zeros).dense().values, kept, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_a_factor_equals_its_gradients_written_out(name: str) -> None:
    check(*CASES[name]())


@pytest.mark.parametrize("name", ["tied by Gram", "mat by Gram", "one hot", "three of a kind"])
def test_a_factor_gives_the_same_after_it_was_written_out(name: str) -> None:
    factor, dense = CASES[name]()
    factor.dense()
    check(factor, dense)


SAME_SHAPE: dict[str, Callable[[int], Case]] = {
    "vec": lambda seed: vec(9, 4, seed=seed),
    "mat": lambda seed: mat(2, 9, 4, seed=seed),
    "one hot": lambda seed: one_hot(6, 9, 4, seed=seed),
    "total": lambda seed: total(one_hot(6, 9, 4, seed=seed), mat(3, 9, 4, seed=seed + 3)),
}
PAIRS = list(product(SAME_SHAPE, SAME_SHAPE))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_cross_is_the_inner_product(first: str, second: str) -> None:
    (one, dense), (other, dense_other) = SAME_SHAPE[first](10), SAME_SHAPE[second](20)
    expected = (dense * dense_other).sum((1, 2))
    torch.testing.assert_close(one.cross(other), expected, **EXACT)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_combined_factors_are_the_sum(first: str, second: str) -> None:
    (one, dense), (other, dense_other) = SAME_SHAPE[first](10), SAME_SHAPE[second](20)
    check(combine([one, other]), dense + dense_other)


@pytest.mark.parametrize("kind", ["vec", "mat", "one hot"])
def test_factors_of_one_kind_merge_and_those_of_two_do_not(kind: str) -> None:
    one, other = SAME_SHAPE[kind](10)[0], SAME_SHAPE[kind](20)[0]
    assert type(combine([one, other])) is type(one)
    strange = next(SAME_SHAPE[name](30)[0] for name in SAME_SHAPE if name != kind)
    assert one.merged(strange) is None
    assert isinstance(combine([one, strange]), Total)
    assert len(combine([one, strange, other]).parts) == 2  # type: ignore[attr-defined]


def test_one_alone_stays_as_it_is() -> None:
    factor = vec(3)[0]
    assert combine([factor]) is factor


# ---- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "d", "p", "by_gram"), [(1, 8, 8, True), (3, 8, 8, True), (4, 8, 8, False)]
)
def test_the_cheaper_form_is_taken(positions: int, d: int, p: int, by_gram: bool) -> None:
    factor, _ = mat(positions, d, p)
    assert factor.prefers_gram is by_gram  # type: ignore[attr-defined]
    factor.squared_norm()
    assert (factor._dense is None) is by_gram  # type: ignore[attr-defined]


def test_without_keeps_the_form_that_the_norm_was_taken_of() -> None:
    factor, _ = mat(30, 8, 9)
    factor.squared_norm()
    kept = factor.without(torch.tensor([True, False, False, False]))
    assert kept._dense is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_reduced_in_float32(dtype: torch.dtype) -> None:
    left, right = numbers(2, 3, 8, seed=0).to(dtype), numbers(2, 3, 9, seed=1).to(dtype)
    dense = torch.einsum("btd,btp->bdp", left.double(), right.double())
    factor = Mat(left, right)
    assert factor.squared_norm().dtype == torch.float32
    torch.testing.assert_close(
        factor.squared_norm().double(), dense.square().sum((1, 2)), rtol=1e-6, atol=0
    )
    summed = factor.weighted_sum(torch.ones(2))
    torch.testing.assert_close(summed.double(), dense.sum(0), rtol=1e-5, atol=1e-6)
    assert wide(left).dtype == torch.float32
    assert Vec(left).values.dtype == torch.float32


def test_float64_stays_float64() -> None:
    assert wide(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_32_bit_ids_work_everywhere() -> None:
    factor, dense = total(one_hot(6, 50, 40), mat(6, 50, 40, seed=5))
    table = factor.parts[0]  # type: ignore[attr-defined]
    narrow = OneHot(table.ids.int(), table.rows, table.num_rows)
    check(Total([narrow, factor.parts[1]]), dense)  # type: ignore[attr-defined]


def test_a_long_vector_loses_no_digits_in_float32() -> None:
    values = torch.full((1, 3_000, 4_000), 1.1)  # a flat float32 norm of these is off by 1e-4
    exact = 12e6 * values[0, 0, 0].double() ** 2
    torch.testing.assert_close(Vec(values).squared_norm()[0].double(), exact, rtol=1e-6, atol=0)


def test_dropped_units_leave_no_trace_even_where_they_are_not_finite() -> None:
    for name in CASES:
        factor, dense = CASES[name]()
        poisoned = factor.select(torch.arange(UNITS))
        for part in getattr(poisoned, "parts", [poisoned]):
            for field in ("values", "left", "right", "rows"):
                if hasattr(part, field):
                    mine = part.units == 1 if isinstance(part, Routed) else 1
                    getattr(part, field)[mine] = torch.nan
        clean = poisoned.without(torch.tensor([False, True, False, False]))
        dense[1] = 0
        summed = clean.weighted_sum(torch.ones(UNITS, dtype=torch.float64))
        torch.testing.assert_close(summed, dense.sum(0), **EXACT)
        assert torch.isfinite(clean.squared_norm()).all()


# ---- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vec", "vec of a matrix"])
def test_written_out_gradients_cannot_cancel(name: str) -> None:
    factor, _ = CASES[name]()
    torch.testing.assert_close(factor.uncancelled(), factor.squared_norm(), **EXACT)


def test_orthogonal_positions_do_not_cancel_and_opposite_ones_do() -> None:
    row = numbers(1, 1, 64, seed=1)
    apart = Mat(torch.eye(8, dtype=torch.float64)[None, :5], row.expand(1, 5, 64))
    torch.testing.assert_close(apart.uncancelled(), apart.squared_norm(), **EXACT)
    opposite = Mat(torch.cat([row, -row], 1), row.expand(1, 2, 64))
    assert opposite.squared_norm() < 1e-9 * opposite.uncancelled()
    ids = torch.zeros(1, 2, dtype=torch.long)
    same_token = OneHot(ids, torch.cat([row, -row], 1), 5)
    assert same_token.squared_norm() < 1e-9 * same_token.uncancelled()
    tied = Total([OneHot(ids[:, :1], row, 1), Mat(-torch.ones(1, 1, 1, dtype=torch.float64), row)])
    assert tied.squared_norm() < 1e-9 * tied.uncancelled()


def test_squares_too_small_for_the_dtype_still_count_as_possible_cancellation() -> None:
    tiny, huge = torch.full((1, 1, 1000), 2e-23), torch.full((1, 1, 1000), 5e17)
    factor = Mat(tiny, huge)
    by_gram, true = float(factor.squared_norm()), float(factor.dense().squared_norm())
    assert by_gram < 0.01 * true  # the Gram form has lost it
    assert float(factor.uncancelled()) >= true


# ---- planted faults: `check` sees each of them ------------------------------------------------------


def _without_cross(self: Total) -> Tensor:
    return sum_of([part.squared_norm() for part in self.parts])


def _repeats_ignored(self: OneHot) -> Tensor:
    return self.rows.square().sum((1, 2))


def _last_position_dropped(self: Mat, weights: Tensor) -> Tensor:
    return torch.einsum("b,btd,btp->dp", weights, self.left[:, :-1], self.right[:, :-1])


def _transposed(self: Mat, weights: Tensor) -> Tensor:
    return torch.einsum("b,btd,btp->pd", weights, self.left, self.right)


def _signs_lost(self: Mat) -> Tensor:
    return (self.left.square().sum(2) * self.right.square().sum(2)).sum(1)


def _weight_twice(self: Vec, weights: Tensor) -> Tensor:
    return torch.einsum("b,b...->...", weights**2, self.values)


def _weight_zero_only(self: Mat, dropped: Tensor) -> Mat:
    return self


@pytest.mark.parametrize(
    ("owner", "method", "fault", "case"),
    [
        (Total, "squared_norm", _without_cross, lambda: CASES["tied by Gram"]()),
        (OneHot, "squared_norm", _repeats_ignored, lambda: CASES["one hot, all repeated"]()),
        (Mat, "weighted_sum", _last_position_dropped, lambda: CASES["mat by Gram"]()),
        (Mat, "weighted_sum", _transposed, lambda: mat(2, 8, 8)),
        (Mat, "squared_norm", _signs_lost, lambda: CASES["mat by Gram"]()),
        (Vec, "weighted_sum", _weight_twice, lambda: CASES["vec"]()),
        (Mat, "without", _weight_zero_only, lambda: CASES["mat by Gram"]()),
    ],
)
def test_a_planted_fault_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    owner: type[Factor],
    method: str,
    fault: Callable[..., object],
    case: Callable[[], Case],
) -> None:
    check(*case())
    monkeypatch.setattr(owner, method, fault)
    with pytest.raises(AssertionError):
        check(*case())

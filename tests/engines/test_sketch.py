"""A few sums of each row tell rows, and their order, apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_dp.engines.sketch import Sketch, in_order


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.long])
def test_rows_one_after_the_other_are_told_from_interleaved_ones(dtype: torch.dtype) -> None:
    one = (10 * numbers(5, 3, 4)).to(dtype)
    after, interleaved = torch.cat([one, one]), one.repeat_interleave(2, 0)
    assert Sketch.of(one).twice_over(Sketch.of(after))
    assert not Sketch.of(one).twice_over(Sketch.of(interleaved))


def test_rows_that_are_all_alike_prove_nothing() -> None:
    one = torch.ones(5, 3)
    assert not Sketch.of(one).twice_over(Sketch.of(torch.cat([one, one])))


def test_masks_of_infinities_are_compared() -> None:
    mask = torch.full((6, 6), -torch.inf).triu(1)
    assert Sketch.of(mask).twice_over(Sketch.of(torch.cat([mask, mask])))
    assert not Sketch.of(mask).twice_over(Sketch.of(mask.repeat_interleave(2, 0)))


@pytest.mark.parametrize("axis", [0, 1])
def test_examples_that_changed_places_are_seen(axis: int) -> None:
    alone = [numbers(1, 3, 4, seed=seed) for seed in range(3)]
    sketches = [Sketch.of(one.transpose(0, axis)).rows[axis] for one in alone]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        noise = 1 + 1e-3 * numbers(3, 3, 4, seed=9)
        mixed = Sketch.of((torch.cat([alone[i] for i in order]) * noise).transpose(0, axis))
        assert in_order(mixed.rows[axis], sketches, order)
        assert not in_order(mixed.rows[axis], sketches, [order[1], order[0], order[2]])


def test_examples_that_are_equal_may_change_places() -> None:
    same = Sketch.of(torch.ones(1, 4)).rows[0]
    assert in_order(torch.cat([same, same]), [same, same], [1, 0])


def test_a_sketch_is_small() -> None:
    sketch = Sketch.of(numbers(2, 300, 400))
    assert sketch.shape == (2, 300, 400)
    assert sum(rows.numel() for rows in sketch.rows) == 4 * 302
    assert Sketch.of(torch.tensor(1.0)).rows == ()


def test_a_call_without_rows_has_a_sketch() -> None:
    assert Sketch.of(numbers(0, 8)) is not None
    assert Sketch.of(numbers(2, 0, 8)) is not None

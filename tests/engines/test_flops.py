"""Operations are counted as by hand, those that torch's own table leaves out included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from hf_dp.engines.flops import counted

A, B, C, Q = torch.ones(3, 4), torch.ones(4, 5), torch.zeros(3, 5), torch.ones(2, 2, 6, 8)


def backward_of_attention() -> None:
    q = Q.clone().requires_grad_()
    torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q)


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda: A @ B, 2 * 3 * 4 * 5),
        (lambda: A @ B[:, 0], 2 * 3 * 4),
        (lambda: C.clone().addmm_(A, B), 2 * 3 * 4 * 5),
        (lambda: C[None].clone().baddbmm_(A[None], B[None]), 2 * 3 * 4 * 5),
        (lambda: F.scaled_dot_product_attention(Q, Q, Q), 2 * 2 * 2 * 6 * 6 * 16),
        (lambda: torch.func.vmap(lambda b: A @ b)(B[None]), 2 * 3 * 4 * 5),
        (lambda: A + 1, 0),
    ],
)
def test_counts_are_those_by_hand(run: Callable[[], object], flops: int) -> None:
    assert counted(run) == flops


def test_attention_takes_two_and_a_half_times_as_much_backwards() -> None:
    forward = counted(lambda: F.scaled_dot_product_attention(Q, Q, Q))
    assert forward is not None
    assert counted(backward_of_attention) == 3.5 * forward


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])  # both are the counter's own
def test_what_cannot_be_counted_is_none(error: type[Exception]) -> None:
    def failing() -> None:
        raise error

    assert counted(failing) is None

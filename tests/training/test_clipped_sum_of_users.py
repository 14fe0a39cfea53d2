"""The public clipped sum by user: any order, any hashable names, one user at most the clipping norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from engine_zoo import difference, length
from family_zoo import batch, build

from hf_dp import clipped_sum
from hf_dp.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:.loss_type=None. was set:UserWarning")


def test_examples_of_one_user_are_clipped_as_one_in_any_order() -> None:
    model, inputs = build("gpt2"), batch("gpt2", rows=6)
    together = clipped_sum(model, inputs, clipping_norm=0.1, users=["a", "a", "b", "b", "b", "c"])
    order = [2, 0, 5, 3, 1, 4]
    shuffled = {name: value[order] for name, value in inputs.items()}
    found = clipped_sum(model, shuffled, clipping_norm=0.1, users=["b", "a", "c", "b", "a", "b"])
    torch.testing.assert_close(found.norms, together.norms[[1, 0, 2]], rtol=1e-4, atol=0)
    assert length(difference(found.grads, together.grads)) <= 1e-4 * length(together.grads)


def test_a_single_user_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    model, inputs = build("gpt2"), batch("gpt2", rows=6)
    summed = clipped_sum(model, inputs, clipping_norm=0.1, users=[7] * 6, user_reduction="sum")
    assert summed.norms.shape == (1,)
    assert length(summed.grads) <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    "users",
    [
        ["a"] * 5,
        [None] * 6,
        [float("nan")] * 6,
        [["a", "b"]] * 6,
        [torch.tensor(1)] * 6,
        [("a", ["b"])] * 6,
        [("a", float("nan"))] * 6,
        [("a", (None,))] * 6,
        [("a", torch.tensor(1))] * 6,
        dict.fromkeys(range(6), "a"),
        set(range(6)),
        iter("aabbcc"),
        np.ones((6, 1)),
        pd.DataFrame({name: [1] * 6 for name in "abcdef"}),
    ],
    ids=[
        *("too few", "None", "nan", "several", "tensor", "unhashable inside", "nan inside"),
        *("None inside", "tensor inside", "mapping", "set", "iterator", "array of rows", "table"),
    ],
)
def test_owners_that_name_nobody_are_refused(users: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^clipped_sum\.users="):
        clipped_sum(build("gpt2"), batch("gpt2", rows=6), clipping_norm=0.1, users=users)

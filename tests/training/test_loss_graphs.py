"""The losses leave rows in their place, as the engine sees it: no micro-batch is proved again for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_dp.engines.by_content import Graph, Twins
from hf_dp.training.reductions import IGNORED, class_losses, token_losses


def graph_of(loss: Any, units: int, twins: Sequence[Twins] = ()) -> Graph:
    labels = torch.arange(units * 6).reshape(units, 6) % 7
    labels[0, 3:] = IGNORED
    if loss is token_losses:
        tokens = torch.randn(units, 6, 7, requires_grad=True).tanh()
        return Graph(token_losses(tokens, labels), units, twins)
    classes = torch.randn(units, 3, requires_grad=True).tanh()
    return Graph(class_losses(classes, labels[:, 0] % 3), units, twins)


@pytest.mark.parametrize("loss", [token_losses, class_losses])
@pytest.mark.parametrize("units", [4, 5, 6, 7])
def test_the_losses_do_not_count_as_arranging_rows(units: int, loss: Any) -> None:
    twins = [Twins(graph_of(loss, 2), graph_of(loss, 3))]
    assert not graph_of(loss, units, twins).by_content


def test_an_ignored_token_gets_no_gradient_and_the_others_theirs() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (3, 5))
    labels[1, 2:] = IGNORED
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    [found] = torch.autograd.grad((token_losses(logits, labels) * weights).sum(), logits)
    plain = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    means = plain.sum(1) / (labels != IGNORED).sum(1)
    [expected] = torch.autograd.grad((means * weights).sum(), logits)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    assert bool((found[1, 2:] == 0).all())

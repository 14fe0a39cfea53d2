"""Modules and parameters of a model are those that torch's own walk finds, in its order."""

from __future__ import annotations

import pytest
import torch
from family_zoo import FAMILIES, build
from torch import nn

from hf_dp.engines.walk import named_modules_of, named_parameters_of


class Shares(nn.Module):
    """Holds a module twice, a parameter twice, nothing under one name, and a ring's worth of levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        self.none = None
        self.register_module("empty", None)
        self.again = self.first[1]
        self.own = nn.Parameter(torch.ones(2))
        self.last = nn.Linear(2, 2, bias=False)
        self.last.weight = self.first[0].weight


class Renames(nn.Module):
    """Gives its parameters names of its own, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        return self.inner.named_parameters()


@pytest.mark.parametrize("model", [Shares(), nn.Linear(2, 2), Renames()])
def test_the_walk_is_torch_s_own(model: nn.Module) -> None:
    check(model)


@pytest.mark.parametrize("family", list(FAMILIES)[:3])
def test_the_walk_over_a_family_is_torch_s_own(family: str) -> None:
    check(build(family))


def check(model: nn.Module) -> None:
    modules = [(name, module) for module, name in named_modules_of(model).items()]
    assert modules == list(model.named_modules())
    found, expected = named_parameters_of(model), dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(found[name] is parameter for name, parameter in expected.items())

"""The code in layers/README.md runs as it stands, and its claims hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_dp.layers
from hf_dp.layers import generic
from hf_dp.testing import DisagreementError, check_layer_rule

TEXT = (Path(hf_dp.layers.__file__).parent / "README.md").read_text("utf-8")


def shown() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    return names


def test_the_code_runs_and_its_rule_is_right() -> None:
    names = shown()
    layer = names["ScaledLinear"](6, 5)
    check_layer_rule(layer, torch.randn(2, 6), names["RULES"])


def test_a_mistake_in_it_would_be_found() -> None:
    names = shown()

    def forgetful(module: nn.Module, x: Any, g: Any, n: int) -> Any:
        for parameter, factor in names["scaled_linear"](module, x, g, n):
            if parameter is module.weight:
                factor = names["Mat"](g, x)  # without the scale
            yield parameter, factor

    layer = names["ScaledLinear"](6, 5)
    nn.init.constant_(layer.scale, 2.0)
    with pytest.raises(DisagreementError, match=r"ScaledLinear\.weight: the norm"):
        check_layer_rule(layer, torch.randn(3, 4, 6), {names["ScaledLinear"]: forgetful})


def test_the_bound_it_states_is_the_bound() -> None:
    assert f"{generic.MOST_HELD / 1e6:.1f}" == "16.8"
    assert "16.8 million numbers" in TEXT

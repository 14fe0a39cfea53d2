"""What the rules for fused experts, and for LoRA on them, cost next to an ordinary step and the generic rule.

A small Mixtral, its experts in their eager form (the FLOPs of grouped products are not counted): times
are process time, interleaved, medians of the rounds.

    python -m benchmarks.experts    # about a minute; keeps the result
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any
from unittest import mock

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.cases import example_losses, library_losses
from benchmarks.counting import cost_of
from benchmarks.step_time import RESULTS, machine
from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.layers import generic

EXAMPLES, POSITIONS, ROUNDS = 8, 128, 5


def model(*, lora: bool) -> nn.Module:
    """Two layers of width 256, eight experts of width 512, two of them for each token."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    config._experts_implementation = "eager"
    made: nn.Module = tf.MixtralForCausalLM(config)
    if lora:
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        made = get_peft_model(made, LoraConfig(r=8, target_modules=[], target_parameters=targets))
    return made.train()


def private(net: nn.Module, inputs: Mapping[str, Any], *, rule: bool) -> Callable[[], object]:
    """A clipped sum, with or without the rule for experts."""
    engine = BookKeepingEngine()

    def step() -> object:
        return engine.clipped_sum(
            net, inputs, example_loss=library_losses(inputs), clipping=FlatClipping(0.1)
        )

    removed = {} if rule else dict.fromkeys(("experts", "adapted experts"), lambda _: None)
    with mock.patch.dict(generic._SHORTCUTS, removed):
        step()  # which rule it takes is found out here
    return step


def measure(*, lora: bool) -> dict[str, Any]:
    """Times, FLOPs, kernels and bytes of a micro-batch, over those of an ordinary step."""
    net = model(lora=lora)
    parameters = [p for p in net.parameters() if p.requires_grad]
    ids = torch.randint(3, 256, (EXAMPLES, POSITIONS))
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids}

    def plain() -> object:
        return torch.autograd.grad(example_losses(net, inputs).sum(), parameters, allow_unused=True)

    steps = {
        "plain": plain,
        "experts rule": private(net, inputs, rule=True),
        "generic rule": private(net, inputs, rule=False),
    }
    costs = {name: cost_of(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            times[name].append(time.process_time() - begun)
    rows = {
        name: {
            "time": median(a / b for a, b in zip(times[name], times["plain"], strict=True)),
            **costs[name].over(costs["plain"]),
        }
        for name in steps
    }
    trained = "LoRA r=8 on the experts" if lora else "full"
    return {
        "case": f"mixtral d=256 E=8 k=2 T={POSITIONS} B={EXAMPLES}, {trained}",
        "plain_seconds": median(times["plain"]),
        "over_plain": rows,
    }


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    cases = [measure(lora=lora) for lora in (False, True)]
    text = json.dumps({"machine": machine(), "rounds": ROUNDS, "cases": cases}, indent=1)
    print(text)
    (RESULTS / "experts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

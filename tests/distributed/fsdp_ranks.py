"""One rank of a model under FSDP2: clips its half of a batch and reports how far the sum is from a loop's.

Run as ``fsdp_ranks.py RANK WORLD PORT CASE``; the first rank prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_dp
from hf_dp.engines import engine_named
from hf_dp.errors import HfDpError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES

CLIPPING_NORM, BATCH, STEPS = 0.5, 6, 3
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def tokens_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
    return losses.mean(1)


def label_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits, batch["input_ids"][:, 0] % 2, reduction="none")


def gpt2() -> tuple[nn.Module, Any, list[nn.Module]]:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **IDS)
    )
    return model, tokens_loss, list(model.transformer.h)


def checkpointed() -> tuple[nn.Module, Any, list[nn.Module]]:
    model, loss, blocks = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, loss, blocks


def bert() -> tuple[nn.Module, Any, list[nn.Module]]:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=32, num_labels=2)  # fmt: skip
    model = BertForSequenceClassification(config)
    return model, label_loss, list(model.bert.encoder.layer)


def llama_lora() -> tuple[nn.Module, Any, list[nn.Module]]:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, **IDS)  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    return model, tokens_loss, list(model.base_model.model.model.layers)


def outside() -> tuple[nn.Module, Any, list[nn.Module]]:
    """A norm's weight is used once more, where no tap can see it."""
    model, _, blocks = gpt2()

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return tokens_loss(model, batch) + model.transformer.ln_f.weight.sum()

    return model, loss, blocks


def one_cannot() -> tuple[nn.Module, Any, list[nn.Module]]:
    """A layer rule that gives up on what the second rank gets, in the middle of the backward pass."""
    return gpt2()


CASES = {
    case.__name__: case for case in (gpt2, checkpointed, bert, llama_lora, outside, one_cannot)
}


def gives_up(module: Any, inputs: Tensor, output_grads: Tensor, num_units: int) -> Iterator[Any]:
    if dist.get_rank() == 1:
        raise UncoveredParameterError("cannot")
    yield from DEFAULT_LAYER_RULES[nn.LayerNorm](module, inputs, output_grads, num_units)


def gap(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> float:
    """The largest relative error of a parameter's sum."""
    pairs = [(grad, found[name].full_tensor()) for name, grad in expected.items()]
    return max(float((other - one).norm() / (1e-9 + one.norm())) for one, other in pairs)


def refusal(model: nn.Module, batch: Mapping[str, Any], engine: str, loss: Any, **more: Any) -> str:
    try:
        hf_dp.clipped_sum(model, batch, clipping_norm=1.0, engine=engine, example_loss=loss, **more)
    except HfDpError as reason:
        return str(reason)
    return ""


def main(rank: int, world: int, case: str) -> dict[str, object]:
    case, _, norm = case.partition(" in ")
    torch.manual_seed(0)  # the same model on every rank
    model, loss, blocks = CASES[case]()
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the ranks would draw other masks than one process
    batches = [torch.randint(1, 50, (BATCH, 12)) for _ in range(STEPS)]
    whole = [{"input_ids": ids} for ids in batches]
    mine = [
        {"input_ids": ids[rank * BATCH // world : (rank + 1) * BATCH // world]} for ids in batches
    ]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(engine: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        summed = hf_dp.clipped_sum(
            model,
            batch,
            clipping_norm=CLIPPING_NORM * (10 if norm else 1),
            clipping_norm_type=norm or "l2",
            engine=engine,
            example_loss=loss,
        )
        for name, parameter in model.named_parameters():
            if name in summed.grads:
                parameter.grad = summed.grads[name]
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
        model.zero_grad()
        return dict(summed.grads)

    if case == "one_cannot":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        rules = {**DEFAULT_LAYER_RULES, nn.LayerNorm: gives_up}
        return {"refused": refusal(model, mine[0], "two_pass", loss, layer_rules=rules)}
    expected = [] if case == "outside" else [step("sequential", batch) for batch in whole]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    engine = engine_named("auto")
    found = [step(engine, batch) for batch in mine]
    sharded = all(type(g).__name__ == "DTensor" for grads in found for g in grads.values())
    unequal = {"input_ids": batches[0][: 1 + rank]}
    trials = {"sequential": mine[0], "book_keeping": mine[0], "auto": unequal}
    refused = {name: refusal(model, batch, name, loss) for name, batch in trials.items()}
    users = [0] * len(mine[0]["input_ids"])
    refused["two_pass"] = refusal(model, mine[0], "two_pass", loss, users=users)
    error = max(gap(one, other) for one, other in zip(expected, found, strict=True))
    return {"error": error, "sharded": sharded, "engine": engine.chosen.name, "refused": refused}


if __name__ == "__main__":
    rank, world, port, case = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        answer = main(rank, world, case)
    except RuntimeError as reason:
        answer = {"failed": str(reason)}
    if rank == 0:
        print(json.dumps(answer), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive a destroyed process group, and abort

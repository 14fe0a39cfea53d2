"""The loop that engines are compared with, written without hf_dp, and models beyond `loss_zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import loss_zoo
import torch
import transformers as tf
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from hf_dp.sums import ClippedSum

Batch = dict[str, Any]
OneLoss = Callable[[nn.Module, Batch], Tensor]

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


def _tied_llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **_SMALL, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=True
        )
    )


def _gemma3() -> nn.Module:
    config = tf.Gemma3TextConfig(
        **_SMALL, num_hidden_layers=2, num_key_value_heads=1, head_dim=8, attention_dropout=0.0
    )
    return tf.Gemma3ForCausalLM(config)


def _albert() -> nn.Module:
    config = tf.AlbertConfig(**_SMALL, embedding_size=8, num_hidden_layers=3, num_labels=3)
    return tf.AlbertForSequenceClassification(config)


# name -> (builder, the name in `loss_zoo` whose batches fit)
_MORE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama-lm-tied": (_tied_llama, "llama-lm"),
    "gemma3-lm": (_gemma3, "llama-lm"),
    "albert-cls": (_albert, "bert-cls"),
}

_LORA_TARGETS = {
    "bert": ["query", "value", "dense"],
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "o_proj", "up_proj"],
    "t5": ["q", "v", "wo"],
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model in evaluation mode; its weights are large enough for gradients to differ."""
    torch.manual_seed(0)
    model = _MORE[name][0]() if name in _MORE else loss_zoo.MODELS[name][0]()
    model.config.use_cache = False  # as training does
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def build_lora(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with LoRA on a few kinds of layers, B not at its initial zero."""
    kinds = {"cls": TaskType.SEQ_CLS, "mlm": None, "lm": TaskType.CAUSAL_LM}
    config = LoraConfig(
        r=2,
        target_modules=_LORA_TARGETS[name.split("-")[0]],
        task_type=kinds.get(name.split("-")[1], TaskType.SEQ_2_SEQ_LM),
        fan_in_fan_out=name.startswith("gpt2"),
    )
    model = get_peft_model(build(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def batch(name: str, **options: Any) -> Batch:
    """Padded rows of different lengths; in row 3 every label is ignored."""
    return loss_zoo.batch(_MORE[name][1] if name in _MORE else name, **options)


def own_losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy over each row's own targets, ``(B,)``, in the dtype of the logits.

    Transformers' own loss of causal models casts to float32, which hides errors below 1e-7.
    """
    logits, labels = model(**inputs).logits, inputs["labels"]
    base = getattr(model, "get_base_model", lambda: model)()
    if "Causal" in type(base).__name__ or "LMHead" in type(base).__name__:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    each = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1).clamp(min=1)


def hosts_loss(model: nn.Module, one: Batch) -> Tensor:
    """The loss the model itself returns for one example; zero where it has nothing to predict."""
    loss = model(**{key: value.clone() for key, value in one.items()}).loss
    return torch.zeros_like(loss) if bool(loss.isnan()) else loss


def naive(
    model: nn.Module,
    inputs: Batch,
    clipping_norm: float,
    loss_of: OneLoss = own_losses,
    order: int = 2,
) -> ClippedSum:
    """One example, one backward pass, one clip (L1 with `order` 1), one addition, in a `ClippedSum`."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    norms, losses = [], []
    for i in range(len(next(iter(inputs.values())))):
        loss = loss_of(model, {key: value[i : i + 1] for key, value in inputs.items()})
        grads: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        written = [g.double() for g in grads if g is not None]
        norm = torch.cat([g.reshape(-1) for g in written] or [torch.zeros(1)]).double().norm(order)
        weight = min(1.0, clipping_norm / float(norm)) if norm > 0 else 1.0
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += weight * grad.double()
        norms.append(norm)
        losses.append(loss.detach().double().reshape(()))
    return ClippedSum(grads=sums, norms=torch.stack(norms), losses=torch.stack(losses))


def half_clipped(norms: Tensor) -> float:
    """A clipping norm that about half of the gradients exceed."""
    return float(norms[norms > 0].median())


def length(grads: Mapping[str, Tensor], order: int = 2) -> float:
    """Joint L2 norm, or L1 norm with `order` 1, in float64."""
    return sum(float(g.double().abs().pow(order).sum()) for g in grads.values()) ** (1 / order)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``one - other``, name by name, in float64."""
    assert one.keys() == other.keys()
    return {name: one[name].double() - other[name].double() for name in one}


def assert_same_sum(found: ClippedSum, expected: ClippedSum, tolerance: float) -> None:
    """Norms, losses and sums agree to `tolerance`, relative; each parameter on its own too."""
    assert torch.isfinite(found.norms).all()
    torch.testing.assert_close(found.norms.double(), expected.norms, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.losses.double(), expected.losses, rtol=tolerance, atol=tolerance
    )
    whole = length(expected.grads)
    gaps = difference(found.grads, expected.grads)
    assert length(gaps) <= tolerance * whole
    for name, gap in gaps.items():
        # a gradient that is zero but for rounding, such as a key's bias, has no relative error
        of_this = float(expected.grads[name].norm())
        assert float(gap.norm()) <= tolerance * (10 * of_this + 1e-2 * whole), name

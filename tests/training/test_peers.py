"""Faults that were found by running other libraries, end to end through DPTrainer: none of them is ours.

======  ============================================================  ===============================
fault   what went wrong elsewhere                                     test
======  ============================================================  ===============================
P1      one scalar loss for the batch, and the norm never passed on   here, and at the engines
P2      the batch's token count in every example's loss               here, and in test_losses
P3      draws merged at epoch ends                                    test_budget_and_resume
P4      steps divided by the accumulation when noise was sized        test_budget_and_resume
P5      a resumed run with an empty accountant                        test_budget_and_resume
P6      the exact gradient norm in the log                            test_private_step
P7      an empty draw became a random example; epsilon below zero     here, and test_private_step
P8      noise from the public training seed                           here, and test_private_step
P12     tied weights: one example's share above the clipping norm     here, and at the engines
P13     layers without a rule silently left untrained                 here, and at the engines
P16     clipped sums carried over to the next step                    here
P17     the raw gradient, without clipping or noise                   here, and test_private_step
P18     one example that is not finite spoils every parameter         test_private_step
======  ============================================================  ===============================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, collate, tiny_bert, train_lines, trainer_for
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.coins import FixedCoins
from hf_dp.errors import PrivacyError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import mixin, step

Rows = Sequence[dict[str, Any]]


class Arranged(FixedCoins):
    """Noise that is zero, and draws of everything or of nothing, as listed: the bare clipped sum shows."""

    def __init__(self, num_examples: int, draws: Iterable[bool] = ()) -> None:
        super().__init__(torch.Generator().manual_seed(0))
        self.num_examples, self.draws = num_examples, iter(draws)

    def bits(self, count: int) -> np.ndarray:
        if count != self.num_examples:
            return super().bits(count)
        everything = next(self.draws, True)
        return np.full(count, 0 if everything else 2**64 - 1, dtype=np.uint64)

    def normal_like(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


def updates(
    output_dir: Path, rows: Rows, *, steps: int = 1, draws: Iterable[bool] = (), **options: Any
) -> list[Tensor]:
    """What each optimizer step subtracted, times the expected batch: the sums that were released."""
    # Just below the number of examples: at a probability of 1 no coin is asked.
    dp = {"private_loss": False, "expected_batch_size": len(rows) * 0.99, **options.pop("dp", {})}
    host = {"max_steps": steps, "learning_rate": 1.0, **options.pop("host", {})}
    coins = Arranged(len(rows), draws)
    trainer = trainer_for(
        output_dir, train_dataset=list(rows), host=host, dp=dp, coins=coins, **options
    )
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    seen = [torch.cat([p.detach().flatten().clone() for p in parameters])]
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(
        lambda *_: seen.append(torch.cat([p.detach().flatten().clone() for p in parameters]))
    )
    trainer.train()
    return [(a - b) * dp["expected_batch_size"] for a, b in pairwise(seen)]


def gradients(model: nn.Module, rows: Rows, collator: Callable[[Any], Any]) -> Tensor:
    """Each row's gradient by plain autograd, ``(B, d)``."""
    found = []
    for row in rows:
        model.train().zero_grad()
        model(**collator([row])).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    return torch.stack(found)


def pad(rows: Rows) -> dict[str, Tensor]:
    """Pad token ids, labels and mask to the longest row."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    return {**batch, "attention_mask": (batch["labels"] != -100).long()}


def words(length: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": ids}


SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SMALL, **off)
    return tf.GPT2LMHeadModel(config)


def llama(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        **SMALL,
    )
    return tf.LlamaForCausalLM(config)


@pytest.mark.parametrize("clipping_norm", [0.01, 0.1])
@pytest.mark.parametrize("engine", ["auto", "sequential"])
def test_p1_each_example_is_clipped_to_the_norm_that_was_asked_for(
    tmp_path: Path, clipping_norm: float, engine: str
) -> None:
    rows = [Sentences()[i] for i in range(8)]
    (update,) = updates(tmp_path, rows, dp={"clipping_norm": clipping_norm, "engine": engine})
    each = gradients(tiny_bert(), rows, collate)
    factors = (clipping_norm / each.norm(dim=1)).clamp(max=1)
    torch.testing.assert_close(update, factors @ each, rtol=1e-3, atol=1e-6)
    (same,) = updates(tmp_path / "same", rows[:1] * 5, dp={"clipping_norm": clipping_norm})
    assert float(same.norm()) == pytest.approx(5 * clipping_norm, rel=1e-3)


@pytest.mark.parametrize("model", [gpt2, llama])
def test_p2_one_long_text_moves_the_sum_by_no_more_than_its_own_share(
    tmp_path: Path, model: Callable[[], nn.Module]
) -> None:
    """31 short texts and one of ten times their length, with nothing clipped, where the leak shows."""
    rows = [words(3, seed) for seed in range(31)] + [words(30, 99)]
    each = gradients(model(), rows, pad)
    bound = float(each.norm(dim=1).max()) * 1.01
    options: dict[str, Any] = {"data_collator": pad, "dp": {"clipping_norm": bound}}
    (with_it,) = updates(tmp_path / "a", rows, model=model(), **options)
    (without,) = updates(tmp_path / "b", rows[:-1], model=model(), **options)
    assert float((with_it - without).norm()) <= bound
    torch.testing.assert_close(with_it - without, each[-1], rtol=1e-3, atol=1e-4)


def test_p7_an_empty_draw_adds_nothing_and_epsilon_is_never_negative(tmp_path: Path) -> None:
    rows = [Sentences()[i] for i in range(8)]
    first, empty = updates(tmp_path, rows, steps=2, draws=[True, False])
    assert float(first.norm()) > 0.1
    assert not empty.any()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 2

    trainer = trainer_for(tmp_path / "short", host={"max_steps": 1}, dp={"noise_multiplier": 50.0})
    trainer.train()
    assert all(line["epsilon"] >= 0 for line in train_lines(trainer))


def test_p8_two_runs_of_one_seed_differ_in_every_coordinate(tmp_path: Path) -> None:
    """All examples drawn, so that nothing but the noise can differ."""
    results = []
    for name in "ab":
        trainer = trainer_for(
            tmp_path / name,
            host={"seed": 42, "data_seed": 42, "max_steps": 1},
            dp={"expected_batch_size": 40},
        )
        trainer.train()
        results.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert bool((results[0] != results[1]).float().mean() > 0.99)


def test_p8_a_checkpoint_holds_no_generator_of_the_noise(tmp_path: Path) -> None:
    """What the host restores on resume is its own; with it, the noise of the next step stays unknown."""
    trainer = trainer_for(tmp_path, host={"save_strategy": "steps", "save_steps": 3})
    trainer.train()
    state = torch.load(tmp_path / "checkpoint-3" / "rng_state.pth", weights_only=False)
    after = torch.load(tmp_path / "checkpoint-6" / "rng_state.pth", weights_only=False)
    assert torch.equal(state["cpu"], after["cpu"]), (
        "three steps drew nothing from the host's stream"
    )
    assert state["python"] == after["python"]
    assert all(np.array_equal(a, b) for a, b in zip(state["numpy"], after["numpy"], strict=True))


@pytest.mark.parametrize("model", [gpt2, llama])
def test_p12_tied_weights_count_once_in_the_norm(
    tmp_path: Path, model: Callable[[], nn.Module]
) -> None:
    row = words(9, 1)
    (update,) = updates(
        tmp_path, [row] * 4, model=model(), data_collator=pad, dp={"clipping_norm": 0.5}
    )
    assert float(update.norm()) == pytest.approx(4 * 0.5, rel=1e-4)
    alone = gradients(model(), [row], pad)[0]
    assert float(torch.cosine_similarity(update, alone, dim=0)) > 1 - 1e-5


def test_p13_every_layer_of_a_llama_is_trained(tmp_path: Path) -> None:
    rows = [words(5, seed) for seed in range(4)]
    trainer = trainer_for(
        tmp_path,
        model=llama(tied=False),
        train_dataset=rows,
        data_collator=pad,
        host={"max_steps": 1},
        dp={"expected_batch_size": 3.9, "private_loss": False},
        coins=Arranged(4),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert still == []


def test_p13_a_layer_without_a_rule_is_never_skipped(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.exp()

    model = tiny_bert()
    model.dropout = Scaled()
    trainer = trainer_for(
        tmp_path, model=model, host={"max_steps": 1}, dp={"expected_batch_size": 40}
    )
    trainer.train()
    assert not torch.equal(model.dropout.scale.detach(), torch.ones(16))


def test_p16_no_sum_is_carried_over_to_the_next_step(tmp_path: Path) -> None:
    rows = [Sentences()[i] for i in range(8)]
    draws = [True, False, True, False, False]
    sums = updates(tmp_path, rows, steps=5, draws=draws, dp={"clipping_norm": 0.05})
    for update, drawn in zip(sums, draws, strict=True):
        assert float(update.norm()) <= (8 * 0.05 * 1.001 if drawn else 0)


def test_p17_what_reaches_the_optimizer_is_clipped_and_noised(tmp_path: Path) -> None:
    """With noise 100 times a clipping norm of 0.001, the raw gradient (0.8 here) would stand out."""
    for engine in ("book_keeping", "sequential"):
        trainer = trainer_for(
            tmp_path / engine,
            dp={"noise_multiplier": 100.0, "clipping_norm": 0.001, "engine": engine},
        )
        trainer.create_optimizer()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        norms: list[float] = []
        trainer.optimizer.register_step_pre_hook(
            lambda *_, seen=norms, of=parameters: seen.append(
                float(torch.cat([p.grad.flatten() for p in of]).norm())
            )
        )
        trainer.train()
        noise = 100 * 0.001 / 8 * sum(p.numel() for p in parameters) ** 0.5
        assert norms == pytest.approx([noise] * 6, rel=0.1)  # chance below 1e-20: d is 4000


# ---- each of these tests sees its fault ----------------------------------------------------------


def test_the_fault_of_p1_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = FlatClipping.weights
    monkeypatch.setattr(
        FlatClipping, "weights", lambda _, power_sums: weights(FlatClipping(1.0), power_sums)
    )
    with pytest.raises(PrivacyError, match="It moved by"):  # the preflight sees it, too
        test_p1_each_example_is_clipped_to_the_norm_that_was_asked_for(tmp_path / "a", 0.1, "auto")
    monkeypatch.setattr(mixin, "rehearse", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        test_p1_each_example_is_clipped_to_the_norm_that_was_asked_for(tmp_path / "b", 0.1, "auto")


def test_the_fault_of_p2_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example's token losses over the tokens of the batch: 31 texts of 3 and one of 30."""
    own_loss = mixin.DPTrainerMixin._loss_of_each

    def by_the_batchs_tokens(self: Any) -> Any:
        rows = len(self.train_dataset)
        tokens = sum(len(row["labels"]) for row in self.train_dataset)

        def losses(model: nn.Module, inputs: Any) -> Tensor:
            own = (inputs["labels"] != -100).sum(1)
            return own_loss.__get__(self)(model, inputs) * own * rows / tokens

        return losses

    monkeypatch.setattr(mixin.DPTrainerMixin, "_loss_of_each", property(by_the_batchs_tokens))
    with pytest.raises(AssertionError):
        test_p2_one_long_text_moves_the_sum_by_no_more_than_its_own_share(tmp_path, llama)


def test_the_fault_of_p16_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[Any] = []

    def carrying(*args: Any, **parts: Any) -> Any:
        summed = step.clipped_sum_of(*args, **parts)
        carried.append({name: grad.clone() for name, grad in summed.grads.items()})
        for earlier in carried[:-1]:
            for name, grad in summed.grads.items():
                grad.add_(earlier[name])
        return summed

    monkeypatch.setattr(mixin, "clipped_sum_of", carrying)
    with pytest.raises(AssertionError):
        test_p16_no_sum_is_carried_over_to_the_next_step(tmp_path)


def test_the_fault_of_p17_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dp.noise import GaussianNoise
    from hf_dp.sums import NoisySum

    def raw(self: Any, summed: Any, **_: Any) -> NoisySum:
        return NoisySum(summed.grads, summed.loss_sum)

    monkeypatch.setattr(GaussianNoise, "release", raw)
    with pytest.raises(AssertionError):
        test_p17_what_reaches_the_optimizer_is_clipped_and_noised(tmp_path)

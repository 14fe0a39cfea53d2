"""The private step against an independent DP-SGD, and the laws that hold around it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import NUM_EXAMPLES, Sentences, collate, tiny_bert, train_lines, trainer_for
from torch import Tensor
from torch.nn import functional as F

from hf_dp.coins import FixedCoins
from hf_dp.ledger import LEDGER_NAME, Ledger, read_ledger
from hf_dp.noise import GaussianNoise
from hf_dp.training import mixin
from hf_dp.training.batches import LogicalBatch


class RecordedCoins(FixedCoins):
    """A fixed generator whose draws a test can read again."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator().manual_seed(seed))
        self.flips: list[np.ndarray] = []
        self.noise: list[Tensor] = []

    def bits(self, count: int) -> np.ndarray:
        drawn = super().bits(count)
        if count == NUM_EXAMPLES:  # a draw of the sampler, not a seed
            self.flips.append(drawn)
        return drawn

    def normal_like(self, tensor: Tensor) -> Tensor:
        drawn = super().normal_like(tensor)
        self.noise.append(drawn.clone())
        return drawn


def naive_dp_sgd(
    coins: RecordedCoins, *, steps: int, noise: float, clip: float, loss_share: float = 0.0
) -> list[Tensor]:
    """DP-SGD one example at a time, from the recorded coins; nothing of hf_dp in it."""
    model = tiny_bert().train()
    params = [p for p in model.parameters() if p.requires_grad]
    gradient_clip = clip * math.sqrt(1 - loss_share**2)
    data, per_step = Sentences(), len(params) + (1 if loss_share else 0)
    for step in range(steps):
        included = [
            i for i, flip in enumerate(coins.flips[step]) if int(flip) / 2.0**64 < 8 / NUM_EXAMPLES
        ]
        total = [torch.zeros_like(p) for p in params]
        for index in included:
            row = collate([data[index]])
            loss = F.cross_entropy(
                model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits,
                row["labels"],
            )
            grads = torch.autograd.grad(loss, params)
            norm = torch.sqrt(sum(g.double().square().sum() for g in grads))
            factor = min(1.0, gradient_clip / float(norm))
            total = [t + g * factor for t, g in zip(total, grads, strict=True)]
        draws = coins.noise[step * per_step : (step + 1) * per_step]
        with torch.no_grad():
            for p, t, z in zip(params, total, draws, strict=False):
                p -= 0.1 * (t + noise * clip * z) / 8
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
@pytest.mark.parametrize("private_loss", [False, True])
def test_the_weights_are_those_of_an_independent_dp_sgd(
    tmp_path: Path, engine: str, private_loss: bool
) -> None:
    coins = RecordedCoins(3)
    trainer = trainer_for(
        tmp_path,
        dp={
            "clipping_norm": 0.7,
            "noise_multiplier": 0.5,
            "engine": engine,
            "private_loss": private_loss,
        },
        coins=coins,
    )
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()

    share = 0.1 if private_loss else 0.0
    expected = naive_dp_sgd(coins, steps=6, noise=0.5, clip=0.7, loss_share=share)
    actual = list(trainer.model.parameters())
    moved = torch.cat([(a - s).flatten() for a, s in zip(actual, start, strict=True)]).norm()
    gap = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)]).norm()
    assert gap / moved < 1e-6

    wrong = naive_dp_sgd(coins, steps=6, noise=0.5, clip=0.7 * 1.01, loss_share=share)
    gap = torch.cat([(a - e).flatten() for a, e in zip(actual, wrong, strict=True)]).norm()
    assert gap / moved > 1e-4  # the comparison sees a clipping norm that is off by 1%


def test_the_ledger_is_written_before_the_noise_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    append, release = Ledger.append, GaussianNoise.release

    def spied_append(self: Ledger, *args: Any, **kwargs: Any) -> int:
        index = append(self, *args, **kwargs)
        order.append(f"recorded {read_ledger(self.path).num_releases}")
        return index

    def spied_release(self: GaussianNoise, *args: Any, **kwargs: Any) -> Any:
        order.append("released")
        return release(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append", spied_append)
    monkeypatch.setattr(GaussianNoise, "release", spied_release)
    trainer_for(tmp_path, host={"max_steps": 3}).train()
    assert order == ["recorded 1", "released", "recorded 2", "released", "recorded 3", "released"]


def test_a_ledger_that_cannot_be_written_stops_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError("no space left on device")

    trainer = trainer_for(tmp_path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_an_empty_draw_is_a_step_with_noise_and_a_release(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        host={"max_steps": 30},
        dp={"expected_batch_size": 0.5},
    )
    sizes: list[int] = []
    collated = LogicalBatch.__init__

    def spy(self: LogicalBatch, *given: Any, **named: Any) -> None:
        collated(self, *given, **named)
        sizes.append(sum(len(m["labels"]) for m in self.micro_batches))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogicalBatch, "__init__", spy)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
    assert 0 in sizes[:30]
    assert trainer.state.global_step == 30
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 30
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert bool((before != after).all()), "every coordinate gets noise, drawn or not"


def test_without_callbacks_the_run_is_the_same_run(tmp_path: Path) -> None:
    with_callbacks = trainer_for(tmp_path / "a", coins=RecordedCoins(5))
    with_callbacks.train()
    bare = trainer_for(tmp_path / "b", coins=RecordedCoins(5))
    flow = [c for c in bare.callback_handler.callbacks if type(c).__name__ == "DefaultFlowCallback"]
    bare.callback_handler.callbacks = flow  # the host's own stepping; nothing of ours is in it
    bare.train()
    for a, b in zip(with_callbacks.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert read_ledger(tmp_path / "b" / LEDGER_NAME).num_releases == 6


def test_the_divisor_is_the_expected_batch_whatever_was_drawn(tmp_path: Path) -> None:
    """Almost without noise, a full draw and an empty one differ; the divisor does not."""
    for expected in (0.5, 8, 40):
        trainer = trainer_for(
            tmp_path / str(expected),
            host={"max_steps": 4},
            dp={"expected_batch_size": expected, "noise_multiplier": 0.3},
        )
        divided: list[Tensor] = []
        released: list[Tensor] = []
        release = GaussianNoise.release
        with pytest.MonkeyPatch.context() as patch:

            def spied_release(
                *args: Any, _to: list[Tensor] = released, _release: Any = release, **kwargs: Any
            ) -> Any:
                noisy = _release(*args, **kwargs)
                _to.append(noisy.grads["classifier.weight"].clone())
                return noisy

            patch.setattr(GaussianNoise, "release", spied_release)
            trainer.create_optimizer()
            weight = trainer.model.classifier.weight
            trainer.optimizer.register_step_pre_hook(
                lambda *_, to=divided, w=weight: to.append(w.grad.clone())
            )
            trainer.train()
        assert len(divided) == 4
        for sum_, gradient in zip(released, divided, strict=True):
            assert torch.allclose(sum_ / expected, gradient, rtol=1e-6)


def test_training_seed_decides_neither_draws_nor_noise(tmp_path: Path) -> None:
    weights = []
    for name in "ab":
        trainer = trainer_for(tmp_path / name, host={"seed": 42, "data_seed": 42, "max_steps": 2})
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert not torch.allclose(weights[0], weights[1], atol=1e-4)


def test_dropout_masks_come_from_secret_coins_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    sums = mixin.clipped_sum_of

    def only_of_steps(*args: Any, **parts: Any) -> Any:
        seen[:] = kept  # trials on made-up examples hand their draws back
        summed = sums(*args, **parts)
        kept[:] = seen
        return summed

    kept: list[float] = []
    monkeypatch.setattr(mixin, "clipped_sum_of", only_of_steps)

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(torch.rand(())))
            return x

    for name in "ab":
        model = tiny_bert()
        model.bert.encoder.layer[0].output.dropout = Spy()
        host, dp = {"seed": 1, "max_steps": 2}, {"engine": "sequential"}
        trainer_for(tmp_path / name, model=model, host=host, dp=dp).train()
    assert len(kept) == len(set(kept)) > 2


def test_micro_batch_size_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for size in (1, 3, 40):
        trainer = trainer_for(
            tmp_path / str(size),
            host={"per_device_train_batch_size": size, "gradient_accumulation_steps": 1},
            dp={"expected_batch_size": 8},
            coins=RecordedCoins(9),
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-6)
    assert torch.allclose(weights[0], weights[2], rtol=0, atol=1e-6)


def test_a_poisoned_example_adds_nothing_and_training_goes_on(tmp_path: Path) -> None:
    """Peer fault P18: one example with a nan loss made every parameter nan."""

    def loss(model: Any, inputs: Any) -> Tensor:
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
        poisoned = inputs["input_ids"][:, 0] == Sentences()[0]["input_ids"][0]
        return losses * torch.where(poisoned, float("nan"), 1.0)

    for engine in ("book_keeping", "sequential"):
        trainer = trainer_for(
            tmp_path / engine,
            dp={"expected_batch_size": 40, "engine": engine, "nonprivate_metrics": True},
            example_loss=loss,
        )
        trainer.train()
        assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
        assert all(0 < line["nonprivate/dropped_fraction"] < 1 for line in train_lines(trainer))
        assert trainer.state.global_step == 6


def test_a_model_that_cannot_take_a_short_example_says_where_it_came_from(tmp_path: Path) -> None:
    """Among longer ones the stock Trainer would have padded it; nothing is spent on the step."""
    trainer = trainer_for(tmp_path, coins=FixedCoins(torch.Generator().manual_seed(0)))
    model: Any = trainer.model
    forward = model.bert.embeddings.word_embeddings.forward

    def particular(ids: Tensor) -> Tensor:
        if ids.shape[1] < 4 and (ids[:, 0] >= 8).all():  # not the made-up ones
            raise RuntimeError("kernel size cannot be greater than input size")
        return forward(ids)

    model.bert.embeddings.word_embeddings.forward = particular
    with pytest.raises(RuntimeError, match="kernel size") as raised:
        trainer.train()
    [note] = raised.value.__notes__
    assert "nothing of this step was released" in note
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases < 6


def test_nothing_exact_is_logged_by_default(tmp_path: Path) -> None:
    """Peer fault P6: the exact gradient norm and the exact loss were logged."""
    trainer = trainer_for(tmp_path, host={"include_num_input_tokens_seen": "all"})
    result = trainer.train()
    allowed = {"loss", "learning_rate", "epoch", "step", "epsilon", "delta"}
    for line in train_lines(trainer):
        assert set(line) == allowed
    public = {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
        "epoch",
    }
    assert set(result.metrics) == public | {"epsilon", "delta"}
    assert trainer.state.total_flos == 0
    assert trainer.state.num_input_tokens_seen == 0


def test_the_logged_loss_is_the_released_coordinate(tmp_path: Path) -> None:
    """With little noise it is near the exact loss; exact losses stay under nonprivate/."""
    trainer = trainer_for(
        tmp_path,
        dp={
            "noise_multiplier": 0.01,
            "expected_batch_size": 40,
            "loss_ceiling": 4.0,
            "nonprivate_metrics": True,
        },
        coins=RecordedCoins(2),
    )
    trainer.train()
    for line in train_lines(trainer):
        assert line["loss"] == pytest.approx(line["nonprivate/loss"], abs=0.06)
    noisy = trainer_for(tmp_path / "noisy", dp={"expected_batch_size": 40, "loss_ceiling": 4.0})
    noisy.train()
    assert len({line["loss"] for line in train_lines(noisy)}) == 6


def test_a_run_on_fixed_coins_says_that_it_is_not_private(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, coins=RecordedCoins(0))
    trainer.train()
    assert str(trainer.privacy_report()).startswith("NOT PRIVATE (fixed generator: not private)")
    header = json.loads((tmp_path / LEDGER_NAME).read_text().splitlines()[0])
    assert header["coins"] == "fixed generator: not private"

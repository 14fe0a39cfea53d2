"""Losses, models and trainers that remember examples are refused, where they are taken one by one, too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_zoo import build
from tiny_runs import Sentences, learns, tiny_bert, trainer_for
from torch import Tensor, nn

from hf_dp import DPTrainer
from hf_dp.engines import engine_named
from hf_dp.errors import ConfigurationError, PrivacyError
from hf_dp.layers.randomness import Randomness
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import rehearsal, remembered, settled
from hf_dp.training.losses import vectorised_loss
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.remembered import refuse_remembering
from hf_dp.training.tasks import Task

ENGINES = ["auto", "sequential"]


def losses_of(model: nn.Module, inputs: Any) -> Tensor:
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


class FromTheMean:
    """How far a loss is from the mean of those before."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        losses = losses_of(model, inputs)
        mean = losses.detach().mean() if self.mean is None else self.mean
        if torch.is_grad_enabled():
            self.mean = 0.9 * mean + 0.1 * losses.detach().mean()
        return (losses - mean).abs()


class Centred(nn.Module):
    """A running centre that no buffer holds."""

    centre: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        centred = hidden - self.centre
        if self.training:
            for row in hidden.detach():
                self.centre = 0.5 * self.centre + 0.5 * row
        return centred


class Weighted(DPTrainer):
    """Learns from the class that was seen less; no library's class has these attributes."""

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        counts = _COUNTS.setdefault(id(self), torch.zeros(2))
        counts += torch.bincount(labels, minlength=2)
        logits = model(**inputs).logits
        return nn.functional.cross_entropy(logits, labels, weight=1 / (1 + counts), reduction="sum")


_COUNTS: dict[int, Tensor] = {}  # where no attribute shows it


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_that_remembers_is_refused(tmp_path: Path, engine: str, size: int) -> None:
    host = {"per_device_train_batch_size": size}
    for cls, loss, name in (
        (Weighted, None, "compute_loss"),
        (DPTrainer, FromTheMean(), "example"),
    ):
        trainer = trainer_for(
            tmp_path / name, cls=cls, example_loss=loss, host=host, dp={"engine": engine}
        )
        with pytest.raises(ConfigurationError, match=rf"^{name}\w*='remembers examples': expected"):
            trainer.train()
        assert read_ledger(tmp_path / name / LEDGER_NAME).num_releases == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_remembers_is_refused_by_name(tmp_path: Path, engine: str) -> None:
    model = tiny_bert()
    model.dropout = Centred()
    trainer = trainer_for(tmp_path, model=model, dp={"engine": engine})
    with pytest.raises(
        ConfigurationError, match=r"^model\.dropout\.centre='changed by the forward"
    ):
        trainer.train()


def test_a_buffer_that_remembers_is_refused_by_its_own_words(tmp_path: Path) -> None:
    model = tiny_bert()
    model.dropout = Centred()
    del Centred.centre
    model.dropout.register_buffer("centre", torch.zeros(16))
    try:
        with pytest.raises(PrivacyError, match=r"model\.dropout\.centre: expected a tensor that"):
            trainer_for(tmp_path, model=model).train()
    finally:
        Centred.centre = 0.0


def test_the_check_is_what_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the outcomes are not compared; then all of these train."""
    monkeypatch.setattr(remembered, "_alike", lambda *_, **__: True)
    monkeypatch.setattr(rehearsal, "preflight", lambda *_, **__: None)
    model = tiny_bert()
    model.dropout = Centred()
    trainer_for(tmp_path / "a", model=model, dp={"engine": "sequential"}).train()
    trainer_for(tmp_path / "b", cls=Weighted).train()


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_is_no_memory(tmp_path: Path, engine: str) -> None:
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    learns(trainer_for(tmp_path, model=model, dp={"engine": engine}))


def test_unequal_coins_would_refuse_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: generators are not put back; so dropout is on while it is tried."""
    model = tiny_bert()
    model.dropout = nn.Dropout(0.3)
    restore = Randomness.restore
    trainer = trainer_for(tmp_path, model=model, dp={"engine": "sequential"})
    monkeypatch.setattr(rehearsal, "preflight", lambda *_, **__: None)
    monkeypatch.setattr(Randomness, "restore", lambda self: None)
    monkeypatch.setattr(settled, "refuse_own_draws", lambda *_: None)
    try:
        with pytest.raises(ConfigurationError, match="remembers examples"):
            trainer.train()
    finally:
        monkeypatch.setattr(Randomness, "restore", restore)


@pytest.mark.parametrize("name", ["bart-seq2seq", "gpt2-lm", "qwen3-lm", "t5-seq2seq"])
@pytest.mark.parametrize("together", [True, False])
def test_models_of_transformers_remember_nothing(name: str, together: bool) -> None:
    from loss_zoo import batch

    model, inputs = build(name), batch(name)
    columns = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    task = Task.CAUSAL_LM if name.endswith("-lm") else Task.SEQ2SEQ_LM
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = trainer_for(Path("unused"))
    refuse_remembering(
        model.train(),
        made_up_rows(model, columns),
        engine=engine_named("auto"),
        example_loss=vectorised_loss(task),
        plan=trainer.plan,
        together=together,
        owner="example_loss",
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def keeps(change: Callable[[Any, Tensor], object], **given: Any) -> type[DPTrainer]:
    def compute_loss(self: Any, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
        loss = DPTrainer.compute_loss(self, model, inputs)
        change(self, loss.detach())
        return loss

    return type("Keeping", (DPTrainer,), {"compute_loss": compute_loss, **given})


def later(trainer: Any, loss: Tensor) -> None:
    if trainer.state.global_step == 2:
        trainer.last = loss


CHANGES: dict[str, type[DPTrainer]] = {
    "number": keeps(lambda t, loss: setattr(t, "last", float(loss))),
    "tensor": keeps(lambda t, loss: setattr(t, "last", loss)),
    "in place": keeps(lambda t, loss: t.last.data.add_(loss), last=torch.zeros(())),
    "array": keeps(lambda t, loss: t.last.__iadd__(float(loss)), last=torch.zeros(1).numpy()),
    "list": keeps(lambda t, loss: t.last.append(float(loss)), last=[]),
    "dictionary": keeps(lambda t, loss: t.last["a"].append(loss), last={"a": deque(maxlen=2)}),
    "later": keeps(later),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("preflight", [True, False])
def test_what_a_trainer_keeps_in_compute_loss_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, preflight: bool
) -> None:
    remembered._warn_of.cache_clear()
    trainer_for(tmp_path, cls=CHANGES[kind], dp={"preflight": preflight}).train()
    assert caplog.text.count("Keeping.last changes while losses are computed") == 1


def test_what_does_not_change_may_be_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remembered._warn_of.cache_clear()
    given = {"table": torch.zeros(3), "names": ["a"], "rows": Sentences(), "nan": float("nan")}
    trainer_for(tmp_path, cls=keeps(lambda *_: None, **given)).train()
    assert "changes while losses are computed" not in caplog.text


def test_what_a_library_s_class_keeps_is_its_own_affair(tmp_path: Path) -> None:
    names = remembered._set_by_libraries(DPTrainer.__mro__)
    assert {"_total_loss_scalar", "state", "_rehearsed"} <= names
    assert not {"ema", "last", "seen", "counts", "losses"} & names

"""Reentrant checkpoints hide gradients: refused by every engine, whether torch says so or is silent."""

from __future__ import annotations

import pytest
import torch
from adapter_zoo import adapted
from engine_zoo import own_losses
from family_zoo import batch, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_nets import C, Net, check, data, squares

import hf_dp
from hf_dp.engines import recorder, sequential
from hf_dp.engines.reentrant import reentrant_refused
from hf_dp.errors import ConfigurationError, PrivacyError

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

ENGINES = ("auto", "book_keeping", "two_pass", "sequential")
REFUSED = (
    r"^model\.gradient_checkpointing_enable=\{'use_reentrant': True\}: expected use_reentrant=False"
)


def with_checkpoints(model: nn.Module) -> nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})  # type: ignore[operator]
    return model.train()


def adapted_on_a_frozen_table() -> nn.Module:
    """As LoRA is usually set up: what is embedded requires a gradient, and nothing before the checkpoints is
    trained."""
    model = with_checkpoints(adapted("llama"))
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_reentrant_checkpoints_are_refused(engine: str, trained: str) -> None:
    model = with_checkpoints(build("llama")) if trained == "all" else adapted_on_a_frozen_table()
    with pytest.raises(ConfigurationError, match=REFUSED):
        hf_dp.clipped_sum(
            model, batch("llama"), clipping_norm=C, example_loss=own_losses, engine=engine
        )


@pytest.mark.parametrize(("engine", "where"), [("two_pass", recorder), ("sequential", sequential)])
def test_adapters_within_them_would_get_nothing(
    engine: str, where: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at the graph the sum is zero."""
    monkeypatch.setattr(where, "refuse_reentrant", lambda losses: None)
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    found = hf_dp.clipped_sum(
        adapted_on_a_frozen_table(),
        batch("llama"),
        clipping_norm=C,
        example_loss=own_losses,
        engine=engine,
    )
    assert not any(bool(grad.any()) for grad in found.grads.values())


class FrozenPart(Net):
    """A branch that somebody runs without gradients, on purpose."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = super().forward(x)
        return super().forward(x) - target / 2


class OneLayerAgain(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False)
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("make", [FrozenPart, OneLayerAgain])
def test_what_is_no_reentrant_checkpoint_is_not_refused(make: type[Net]) -> None:
    check(make(), data())
    found = hf_dp.clipped_sum(
        make(), data(), clipping_norm=C, example_loss=squares, engine="sequential"
    )
    assert bool(found.norms.all())


@pytest.mark.parametrize("error", [RuntimeError("mine"), PrivacyError("use_reentrant, but ours")])
def test_other_errors_keep_their_words(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as caught, reentrant_refused():
        raise error
    assert caught.value is error

"""Each check of the preflight sees its fault, and nothing else does; a sound model passes unharmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_zoo import Batch
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named
from hf_dp.engines import preflight as module
from hf_dp.engines.preflight import preflight
from hf_dp.errors import ConfigurationError, PrivacyError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Factor, Mat, Vec

LENGTHS = (6, 4, 3, 2)
C = 0.3
ENGINES = ["auto", "book_keeping", "two_pass", "sequential"]


class Reader(nn.Module):
    """Embeds, mixes positions as an attention would, and classifies the mean of the real ones."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.between = between or nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.dropout(self.between(torch.tanh(self.body(self.table(ids)))))
        real = mask[..., None].to(states)
        pooled = (states * real).sum(1) / real.sum(1)
        logits: Tensor = self.head(pooled)
        return logits


def loss_of(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["ids"], inputs["mask"])
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


def examples() -> tuple[list[Batch], Batch]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 20, (4, 6), generator=generator) * mask
    together = {"ids": ids, "mask": mask, "labels": torch.tensor([0, 1, 2, 1])}
    alone = [
        {"ids": ids[i : i + 1, :n], "mask": mask[i : i + 1, :n], "labels": together["labels"][i : i + 1]}
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    return alone, together


def fly(
    model: nn.Module,
    loss: Any = loss_of,
    *,
    engine: Any = None,
    clipping: Any = None,
    one_by_one: bool = False,
) -> None:
    alone, together = examples()
    preflight(
        model,
        alone,
        None if one_by_one else together,
        engine=engine or engine_named("auto"),
        example_loss=loss,
        clipping=clipping or FlatClipping(C),
        loss_release=LossRelease(),
    )


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sound_model_passes(engine: str, one_by_one: bool) -> None:
    fly(Reader(), engine=engine_named(engine), one_by_one=one_by_one)


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "places": {name: p.data_ptr() for name, p in model.named_parameters()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "flags": [m.training for m in model.modules()],
        "trains": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.random.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = [(before["values"][k], after["values"][k]) for k in before["values"]]
    values.append((before["torch"], after["torch"]))
    plain = ("places", "buffers", "flags", "trains", "grads", "hooks")
    return all(torch.equal(a, b) for a, b in values) and all(before[k] == after[k] for k in plain)


class Counting(nn.Module):
    """Counts its calls in a buffer, draws, and centres nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.table = torch.ones(x.shape[1])
        torch.rand(())
        return x


@pytest.mark.parametrize("fault", [None, "mates"])
def test_the_model_is_left_as_it_was(fault: str | None) -> None:
    model = Reader(Counting())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    model.table.requires_grad_(False)
    model.body.eval()
    before = everything(model)
    if fault is None:
        fly(model)
    else:
        with pytest.raises(ConfigurationError):
            fly(model, lambda m, i: loss_of(m, i).mean().expand(len(i["ids"])))
    assert same(before, everything(model))
    assert not same(before, everything(Reader(Counting())))


def test_behind_a_head_of_zeros_faults_are_seen_all_the_same() -> None:
    """A new head, and LoRA's second matrix, are zero: nothing before them would have a gradient."""
    model = Reader(nn.LayerNorm(8))
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UncoveredParameterError, match=r"body\.weight"):
        fly(model, engine=BookKeepingEngine({**DEFAULT_LAYER_RULES, nn.Linear: transposed}))


# ---- batch mates and padding ---------------------------------------------------------------------


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class DetachedScale(nn.Module):
    """The value of each row is its own, its gradient is scaled by the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() + (x - x.detach()) / len(x)


class Widened(nn.Module):
    """Scales by how far the batch was padded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


def batch_mean(model: nn.Module, inputs: Batch) -> Tensor:
    return loss_of(model, inputs).mean().expand(len(inputs["ids"]))


def contrastive(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["ids"], inputs["mask"])
    scores = logits @ logits.T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def with_a_balance(model: nn.Module, inputs: Batch) -> Tensor:
    shares = model(inputs["ids"], inputs["mask"]).softmax(-1).mean(0)
    return loss_of(model, inputs) + 0.01 * shares.square().sum()


def by_the_longest(model: nn.Module, inputs: Batch) -> Tensor:
    return loss_of(model, inputs) * inputs["mask"].sum(1) / inputs["mask"].shape[1]


LOSSES = [
    (batch_mean, "batch mates"),
    (contrastive, "batch mates"),
    (with_a_balance, "batch mates"),
    (by_the_longest, "padding"),
]
LAYERS: list[tuple[Callable[[], nn.Module], str, str, str]] = [
    (Centred, "between", "Centred", "batch mates"),
    (lambda: Between(Centred()), r"between\.inner", "Centred", "batch mates"),
    (Widened, "between", "Widened", "padding"),
    (lambda: BatchNormed(8), r"between\.norm", "BatchNorm1d", "batch mates"),
]


class Between(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.inner(x)
        return moved


class BatchNormed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.norm(x.mT).mT
        return moved


@pytest.mark.parametrize(("loss", "what"), LOSSES, ids=lambda value: str(value))
def test_a_loss_that_mixes_examples_is_named(loss: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^example_loss='loss'.* its {what}\. "):
        fly(Reader(), loss)


@pytest.mark.parametrize(("make", "name", "kind", "what"), LAYERS)
def test_a_layer_that_mixes_examples_is_named(make: Any, name: str, kind: str, what: str) -> None:
    match = rf"^model\.{name}='{kind}': expected a layer whose output .* its {what}\. "
    with pytest.raises(ConfigurationError, match=match):
        fly(Reader(make()))


def test_code_between_layers_is_named_by_the_layer_that_it_feeds() -> None:
    class Pooling(Reader):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.table(ids)
            return self.head(self.body(states - states.mean(0)).mean(1))  # type: ignore[no-any-return]

    with pytest.raises(ConfigurationError, match=r"^model\.body='Linear': .* whose input"):
        fly(Pooling())


def test_a_gradient_that_mixes_examples_is_seen_where_the_loss_does_not() -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):
        fly(Reader(DetachedScale()))


def test_what_examples_one_by_one_cannot_do_to_one_another_is_let_pass() -> None:
    for model, loss in ((Reader(Centred()), loss_of), (Reader(Widened()), by_the_longest)):
        fly(model, loss, one_by_one=True)


@pytest.mark.parametrize(
    ("model", "loss"),
    [(Reader(make()), loss_of) for make, *_ in LAYERS]
    + [(Reader(), loss) for loss, _ in LOSSES[:3]],
)
def test_without_the_check_of_coupling_these_pass(
    model: nn.Module, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sequential engine, which computes each alone, nothing else could see them."""
    monkeypatch.setattr(module, "check_coupling", lambda *_, **__: None)
    monkeypatch.setattr(module, "_check_agreement", lambda *_, **__: None)
    fly(model, loss, engine=SequentialEngine())


# ---- coverage and agreement ------------------------------------------------------------------------


def transposed(m: nn.Linear, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factor]]:
    """Wrong for any square weight."""
    left, right = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])
    square = m.in_features == m.out_features
    yield m.weight, Mat(right, left) if square else Mat(left, right)
    yield m.bias, Vec(left.sum(1))


def dropping(m: nn.Linear, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factor]]:
    """Leaves the first position out."""
    if g.dim() == 3:
        x, g = x[:, 1:], g[:, 1:]
    left, right = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])
    yield m.weight, Mat(left, right)
    yield m.bias, Vec(left.sum(1))


@pytest.mark.parametrize("rule", [transposed, dropping])
@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass"])
def test_a_wrong_rule_is_named_by_its_parameter(
    rule: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**DEFAULT_LAYER_RULES, nn.Linear: rule}
    with pytest.raises(UncoveredParameterError, match=r"body\.weight='Linear'"):
        fly(Reader(), engine=engine_named(engine, wrong))
    monkeypatch.setattr(module, "_check_agreement", lambda *_: None)
    fly(Reader(), engine=engine_named(engine, wrong))  # nothing else sees it


class NormsOnly(SequentialEngine):
    """The right sum, and norms that are not those of the gradients."""

    def clipped_sum(self, *args: Any, **options: Any) -> Any:
        summed = super().clipped_sum(*args, **options)
        summed.norms.mul_(1.01)
        return summed


def test_norms_must_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UncoveredParameterError):
        fly(Reader(), engine=NormsOnly())


def test_a_parameter_that_is_not_covered_is_named() -> None:
    class Gated(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(8))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.body(self.table(ids)) * self.gate
            logits: Tensor = self.head(
                (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            )
            return logits

    fly(Gated(), engine=engine_named("auto"))
    engine = BookKeepingEngine()
    engine.recorder.coverage(model := Gated()).uncovered["gate"] = "gate is left out"
    with pytest.raises(UncoveredParameterError, match="gate"):
        fly(model, engine=engine)


# ---- influence -------------------------------------------------------------------------------------


class TwiceTheBound(FlatClipping):
    def weights(self, squared_norms: Any) -> Any:
        return {name: 2 * w for name, w in super().weights(squared_norms).items()}

    def scaled(self, factor: float) -> FlatClipping:
        return TwiceTheBound(self.clipping_norm * factor)


class NoClipping(FlatClipping):
    def weights(self, squared_norms: Any) -> Any:
        return {name: torch.ones_like(square) for name, square in squared_norms.items()}

    def scaled(self, factor: float) -> FlatClipping:
        return NoClipping(self.clipping_norm * factor)


class ByTheBatch(FlatClipping):
    """Each example's weight depends on the largest norm among its batch mates."""

    def weights(self, squared_norms: Any) -> Any:
        largest = torch.stack(list(squared_norms.values())).sum(0).max().sqrt()
        return {n: (self.clipping_norm / largest).expand(len(s)) for n, s in squared_norms.items()}

    def scaled(self, factor: float) -> FlatClipping:
        return ByTheBatch(self.clipping_norm * factor)


@pytest.mark.parametrize("policy", [TwiceTheBound(C), NoClipping(C)])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_policy_that_does_not_bound_is_refused(
    policy: FlatClipping, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match=f"^clipping='{type(policy).__name__}'.*It moved by"):
        fly(Reader(), clipping=policy, one_by_one=one_by_one)
    monkeypatch.setattr(module, "_check_influence", lambda *_: None)
    fly(Reader(), clipping=policy, one_by_one=one_by_one)  # nothing else sees it


def test_weights_that_depend_on_batch_mates_are_refused() -> None:
    with pytest.raises(PrivacyError):
        fly(Reader(), clipping=ByTheBatch(C))


# ---- what draws at random ---------------------------------------------------------------------------


class SkipsLayers(nn.Module):
    """Stochastic depth: not dropout by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1) < 0.5) if self.training else x


def test_other_draws_than_dropout_are_tried_in_evaluation_mode() -> None:
    fly(Reader(SkipsLayers()))
    with pytest.raises(ConfigurationError):
        fly(Reader(nn.Sequential(SkipsLayers(), Centred())))


class Attending(nn.Module):
    """Every way in which dropout is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.attention.requires_grad_(False)
        self.alpha = nn.AlphaDropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :2]  # positions that no example lacks, so that padding plays no part
        x = nn.functional.scaled_dot_product_attention(x, x, x, None, 0.5)
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        x = nn.functional.dropout(self.alpha(x), inplace=False) + torch.dropout(x, 0.5, train=True)
        return x + self.attention(x, x, x, need_weights=False)[0]


class FirstTwo(Reader):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.body(self.table(ids))).mean(1))
        return logits


def test_every_kind_of_dropout_is_off_and_training_mode_stays() -> None:
    seen: list[bool] = []

    class Watching(Attending):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.training)
            return super().forward(x)

    model = FirstTwo(Watching())
    fly(model)
    assert seen[:3] == [True] * 3  # engines may look at it in evaluation mode as well


def test_a_scalar_of_zero_is_filled_and_dropout_is_off_in_the_backward_pass_too() -> None:
    """The gate is the model's own, so the generic rule runs all of it again, dropout included."""

    class Scaled(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, mask) * (1 + self.gate)

    model = Scaled()
    fly(model)
    assert float(model.gate.detach()) == 0


def test_torch_is_put_back() -> None:
    functions = nn.functional
    before = [functions.dropout, functions.scaled_dot_product_attention, torch.dropout]
    fly(Reader())
    with pytest.raises(ConfigurationError):
        fly(Reader(Centred()))
    after = [functions.dropout, functions.scaled_dot_product_attention, torch.dropout]
    assert all(a is b for a, b in zip(before, after, strict=True))


class DropConnect(nn.Linear):
    """A plain linear layer as long as nothing drops out."""

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.dropout(self.weight, 0.5, self.training)
        return nn.functional.linear(x, weight, self.bias)


def test_what_a_layer_is_taken_for_is_what_it_is_with_its_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, engine = Reader(DropConnect(8, 8)).train(), BookKeepingEngine()
    fly(model, engine=engine)
    [point] = [p for p in engine.recorder.coverage(model).points if p.module is model.between]
    assert point.rule is None
    monkeypatch.setattr(BookKeepingEngine, "prepare", lambda *_: None)
    hasty = BookKeepingEngine()
    fly(model, engine=hasty)
    [point] = [p for p in hasty.recorder.coverage(model).points if p.module is model.between]
    assert point.rule is not None, "without it the trial's own view would stay"

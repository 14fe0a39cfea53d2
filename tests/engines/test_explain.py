"""What an engine is said to do is what it does: rule, form, cost, and every parameter once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_zoo import Batch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_dp.engines import engine_named
from hf_dp.engines.explain import EngineReport, EngineRow, explain_engine

WIDTH, TABLE = 48, 300


class Stack(nn.Module):
    """An embedding, two equal blocks, a head on the mean."""

    def __init__(self, *, gated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(TABLE, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.idle = nn.Linear(4, 4)
        if gated:
            self.gate = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        states = self.table(ids)
        for block in self.blocks:
            states = torch.tanh(block(states))
        if hasattr(self, "gate"):
            states = states * self.gate
        logits: Tensor = self.head(self.norm(states).mean(1))
        return logits


def loss_of(model: nn.Module, inputs: Batch) -> Tensor:
    return model(inputs["ids"]).square().sum(-1)


def report(length: int = 6, engine: str = "auto", model: nn.Module | None = None) -> EngineReport:
    ids = torch.randint(0, TABLE, (3, length), generator=torch.Generator().manual_seed(1))
    return explain_engine(
        model or Stack(),
        {"ids": ids},
        engine=engine_named(engine),
        example_loss=loss_of,
        length=length,
    )


def row(found: EngineReport, name: str) -> EngineRow:
    (only,) = [row for row in found.rows if row.parameters == name]
    return only


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_every_parameter_is_in_one_row(engine: str) -> None:
    model = Stack()
    found = report(engine=engine, model=model)
    assert sum(r.count for r in found.rows) == len(list(model.parameters()))
    assert found.engine == ("book_keeping" if engine == "auto" else engine)
    assert row(found, "blocks.*.weight").count == 2
    assert row(found, "blocks.*.weight").shape == (WIDTH, WIDTH)


def test_frozen_parameters_are_left_out() -> None:
    model = Stack()
    model.table.requires_grad_(False)
    assert "table.weight" not in {r.parameters for r in report(model=model).rows}


def test_rules_and_modules_are_named() -> None:
    found = report()
    assert row(found, "table.weight").rule == "embedding"
    assert row(found, "blocks.*.weight").rule == "linear"
    assert row(found, "norm.weight").module == "LayerNorm"
    assert row(found, "idle.weight").form == "not used"
    generic = report(model=Stack(gated=True))
    assert row(generic, "gate").rule == "generic"
    assert generic.counted_flops is not None
    assert generic.overhead is not None
    assert 1 < generic.overhead < 3
    assert generic.summary.startswith("Counted: ")
    unknown = replace(generic, counted_flops=None)
    assert unknown.overhead is None
    assert "not known" in unknown.summary


@pytest.mark.parametrize(("length", "form"), [(4, "gram"), (60, "written out")])
def test_the_form_follows_the_length(length: int, form: str) -> None:
    found = row(report(length), "blocks.*.weight")
    assert found.form == form
    assert found.ordinary_flops == 2 * 4 * length * WIDTH**2
    extra = length * (length + 1) * 2 * WIDTH if form == "gram" else 4 * WIDTH**2
    assert found.extra_flops == 2 * extra
    assert row(report(length), "table.weight").form == "segmented"


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
def test_in_the_l1_norm_every_gradient_is_written_out(engine: str) -> None:
    ids = torch.arange(12).view(2, 6)
    found = explain_engine(
        Stack(), {"ids": ids}, engine=engine_named(engine), example_loss=loss_of, norm="l1"
    )
    used = [row for row in found.rows if row.form != "not used"]
    assert {row.form for row in used} == {"written out"}
    assert sum(r.extra_bytes for r in used) >= 4 * (TABLE * WIDTH + 2 * WIDTH * WIDTH)


def test_tied_weights_show_both_uses() -> None:
    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, TABLE, bias=False)
            self.head.weight = self.table.weight

    found = row(report(model=Tied()), "table.weight")
    assert set(found.module.split(" + ")) == {"Embedding", "Linear"}
    assert "segmented" in found.form


def test_the_plain_step_is_counted() -> None:
    model, length = Stack(), 8
    found = report(length, model=model)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, {"ids": torch.zeros(1, length, dtype=torch.long)}).sum().backward()
    assert found.plain_flops == counter.get_total_flops()
    known = replace(found, foreign="").overhead
    assert known is not None
    assert 1 < known < 1.3
    two = report(length, "two_pass").overhead
    assert two is not None
    assert two == pytest.approx(found.overhead + 1 / 3)


def test_what_makes_every_batch_be_proved_is_said() -> None:
    found = report()
    assert found.foreign.endswith("test_explain.Stack")
    assert f"because of class {found.foreign.removeprefix('class ')}" in found.summary
    assert report(model=nn.Sequential(nn.Embedding(TABLE, 4), nn.Flatten())).foreign == ""
    known = replace(found, foreign="")
    assert "proves" not in known.summary
    assert found.overhead == pytest.approx((known.overhead or 0) + 1 / 3)


def test_sequential_adds_nothing_and_says_what_it_costs() -> None:
    found = report(engine="sequential")
    assert found.overhead == 1
    assert "batches of one" in found.summary
    assert {r.rule for r in found.rows} == {"sequential"}


def test_the_model_is_left_as_it_was() -> None:
    model = Stack()
    nn.init.zeros_(model.head.weight)
    before = [(p, p.clone(), p.requires_grad) for p in model.parameters()]
    report(model=model)
    assert all(torch.equal(p, old) and p.requires_grad == on for p, old, on in before)
    assert all(p.grad is None for p in model.parameters())


def test_text_and_json_hold_every_row() -> None:
    found = report()
    text = str(found)
    assert text.startswith("engine book_keeping at length 6\n")
    data: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    assert len(data["rows"]) == len(found.rows) == len(text.splitlines()) - 3
    assert all(r.parameters in text for r in found.rows)
    assert data["overhead"] == found.overhead

"""Several texts to choose from: columns ``(B, C, T)``, whose positions are on the third axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import host_arguments
from tiny_settings import SMALL
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertTokenizerFast,
    DataCollatorForMultipleChoice,
    RobertaConfig,
    RobertaForMultipleChoice,
)

from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.engines.rows import row
from hf_dp.training.alone import alone
from hf_dp.training.batches import LogicalBatchCollator
from hf_dp.training.joining import MASK, USUAL_FILLS, fills_of, width_of
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.positions import axis_of

CHOICES = 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def items(size: int = 6) -> list[dict[str, Any]]:
    """Of different lengths, and of different lengths within each."""
    made = []
    for place in range(size):
        lengths = [2 + (place + 2 * choice) % 5 for choice in range(CHOICES)]
        texts = [[5 + (place + i) % 8 for i in range(length)] for length in lengths]
        masks = [[1] * length for length in lengths]
        made.append({"input_ids": texts, MASK: masks, "label": place % CHOICES})
    return made


def collator(folder: Path, side: str = "right", **options: Any) -> DataCollatorForMultipleChoice:
    (folder / "vocab.txt").write_text("\n".join(["x", *WORDS]), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), padding_side=side)
    return DataCollatorForMultipleChoice(tokenizer, **options)


def bert() -> BertForMultipleChoice:
    torch.manual_seed(0)
    return BertForMultipleChoice(BertConfig(**SMALL, **STILL))


def plain_sum(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Clipped to norm one, example by example, with autograd alone."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        F.cross_entropy(model(**inputs).logits, batch["labels"]).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        for name, p in model.named_parameters():
            total[name] += 0 if p.grad is None else p.grad / norm.clamp(min=1.0)
    model.zero_grad()
    return total


@pytest.mark.parametrize("to_a_multiple", [None, 4])
def test_examples_are_joined_as_the_library_joins_them(
    tmp_path: Path, to_a_multiple: int | None
) -> None:
    given = collator(tmp_path, pad_to_multiple_of=to_a_multiple)
    found = fills_of(given, items()[0])
    assert found == {
        "input_ids": 1
    }  # the tokenizer's padding; the mask is filled with zeros anyway
    [batch] = LogicalBatchCollator(given, 6, "input_ids", None, {**USUAL_FILLS, **found})(
        items()
    ).micro_batches
    order = sorted(items(), key=lambda one: width_of(given([dict(one)]), "input_ids"), reverse=True)
    expected = given(order)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_the_clipped_sum_is_that_of_plain_autograd(tmp_path: Path, engine: str) -> None:
    model, given = bert(), collator(tmp_path)
    batch = given(items())
    summed = clipped_sum(model, batch, clipping_norm=1.0, engine=engine)
    expected = plain_sum(model, [given([one]) for one in items()])
    for name, grad in summed.grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_no_share_depends_on_how_long_others_are(tmp_path: Path, side: str) -> None:
    """Padding on the left would move an example's positions."""
    model, given = bert(), collator(tmp_path, side)
    first, longer = items()[0], items(6)[5]
    longer = {**longer, "input_ids": [[6] * 20] * CHOICES, MASK: [[1] * 20] * CHOICES}
    by_itself = clipped_sum(model, given([dict(first)]), clipping_norm=1.0)
    beside = clipped_sum(model, given([dict(first), longer]), clipping_norm=1.0)
    torch.testing.assert_close(beside.norms[0], by_itself.norms[0], atol=0, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_example_alone_has_only_its_own_padding(tmp_path: Path, side: str) -> None:
    given = collator(tmp_path, side)
    both = given(items())
    for place, one in enumerate(items()):
        cut, expected = alone(bert(), both, place), given([one])
        assert all(torch.equal(cut[name], expected[name]) for name in expected)


def test_made_up_examples_have_as_many_choices_and_lengths_of_their_own(tmp_path: Path) -> None:
    columns = collator(tmp_path)(items()[:1])
    rows = made_up_rows(bert(), columns)
    assert axis_of(columns) == axis_of(rows) == 2
    assert rows["input_ids"].shape == (4, CHOICES, 7)
    assert rows[MASK].sum(2)[:, 0].tolist() == [5, 7, 2, 4]
    assert rows["labels"].max() < CHOICES


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_training_takes_several_at_a_time(tmp_path: Path, family: str) -> None:
    model: Any = bert()
    if family == "roberta":
        model = RobertaForMultipleChoice(RobertaConfig(**SMALL, **STILL))
    trainer = DPTrainer(
        model=model,
        args=host_arguments(tmp_path, max_steps=2),
        dp_args=DPArguments(noise_multiplier=1.0),
        train_dataset=items(24),
        data_collator=collator(tmp_path),
    )
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert trainer._choice is not None
    assert not trainer._choice.alone
    assert "checked against compute_loss" in trainer._choice.description
    assert max(seen) > 1
    assert "book_keeping" in str(trainer.explain_engine(length=8))


def test_a_row_of_a_mask_with_as_many_queries_is_no_choice() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert axis_of({"input_ids": ids, MASK: torch.ones(1, 4, 4)}) == 1
    assert axis_of(row({"input_ids": ids, MASK: torch.ones(1, 4)}, 0)) == 1

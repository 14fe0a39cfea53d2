"""Examples whose pictures come as one tensor of patches: of one example, all of it is that example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import trainer_for
from torch import Tensor, nn
from torch.nn import functional as F
from user_runs import Recorded, clipped, close

from hf_dp import clipped_sum
from hf_dp.clipping.flat import FlatClipping
from hf_dp.engines import ENGINES, OneExample, engine_named
from hf_dp.engines.rows import batch_size, row, rows, select_rows
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.alone import definition_loss
from hf_dp.training.step import tracked

PICTURE, BEGIN, END = 9, 11, 12
C = 0.05
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
SEEN = {"depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
GRIDS = ([(2, 2)], [(2, 4), (4, 4)], [(4, 2)])
"""Height and width, in patches, of an example's pictures."""

CHANNELS = 3 * 2 * 2 * 2  # colours, two frames, and 2 x 2 pixels


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={**SEEN, "embed_dim": 8, "hidden_size": 16},
            image_token_id=PICTURE,
            vision_start_token_id=BEGIN,
        )
    )


def qwen2_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    seen = {"hidden_size": 8, "out_hidden_size": 16, "intermediate_size": 12, "window_size": 8}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={**SEEN, **seen, "fullatt_block_indexes": [0]},
            image_token_id=PICTURE,
            vision_start_token_id=BEGIN,
        )
    )


def llava() -> nn.Module:
    """With as many whole pictures as an example has, one under the other."""
    seen = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "patch_size": 2}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={
                **seen,
                "model_type": "clip_vision_model",
                "num_attention_heads": 2,
                "image_size": 4,
            },
            image_token_index=PICTURE,
        )
    )


MODELS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "llava": llava}


def seeded(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()


def patches(grid: list[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(height * width for height, width in grid)
    return {
        "pixel_values": torch.randn(count, CHANNELS, generator=generator),
        "image_grid_thw": torch.tensor([[1, *one] for one in grid]),
    }


def whole(grid: list[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(len(grid), 3, 4, 4, generator=generator)}


def examples(name: str, grids: Any = GRIDS, count: int = 12) -> list[dict[str, Any]]:
    """Texts with as many pictures as the grids say, over and over."""
    made = []
    for index in range(count):
        grid = grids[index % len(grids)]
        ids = [20 + index, 21 + index % 4]
        for height, width in grid:
            shown = [PICTURE] * (4 if name == "llava" else height * width // 4)
            ids += [BEGIN, *shown, END]
        ids += [31 + index, 32]
        pictures = (whole if name == "llava" else patches)(grid, index) if grid else {}
        made.append({"input_ids": torch.tensor(ids), **pictures, "author": index // 3})
    return made


def padded(name: str) -> Any:
    """A collator for any number of examples, as processors of transformers batch them."""

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.stack([F.pad(i["input_ids"], (0, width - len(i["input_ids"]))) for i in items])
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        batch["labels"] = ids.masked_fill((ids == 0) | (ids == PICTURE), -100)
        if name != "llava":
            batch["mm_token_type_ids"] = (ids == PICTURE).long()
        for column in ("pixel_values", "image_grid_thw"):
            held = [item[column] for item in items if column in item]
            if held:
                batch[column] = torch.cat(held)
        return batch

    return collate


def loop(name: str, data: list[dict[str, Any]]) -> Tensor:
    """The clipped sum by plain autograd, an example at a time."""
    model = seeded(name).train()
    total = torch.zeros(())
    for item in data:
        total = total + clipped(gradient(model, padded(name)([item])), C)
    return total


def gradient(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(
        model(**batch).loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in found])


def run(folder: Path, name: str, data: Any, **dp: Any) -> Any:
    """A trainer whose every batch is all of the data."""
    asked = {"clipping_norm": C, "expected_batch_size": len(data), "private_loss": False, **dp}
    return trainer_for(
        folder,
        model=seeded(name),
        train_dataset=data,
        data_collator=padded(name),
        host={"max_steps": 1, "remove_unused_columns": False},
        dp=asked,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_a_step_is_a_loop_over_examples(
    tmp_path: Path, recorded: Recorded, name: str, engine: str
) -> None:
    data = examples(name)
    run(tmp_path, name, data, engine=engine).train()
    assert close(recorded.sums[0], loop(name, data))
    assert len(recorded.norms[0]) == len(data)
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", [[], [(2, 2)]], ids=["text first", "picture first"])
@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass"])
def test_texts_without_pictures_share_a_draw_with_others(
    tmp_path: Path, recorded: Recorded, name: str, first: list[tuple[int, int]], engine: str
) -> None:
    """Where the first is a text, texts are taken together."""
    data = examples(name, grids=(first, [(2, 4), (2, 2)], []))
    run(tmp_path, name, data, engine=engine).train()
    assert close(recorded.sums[0], loop(name, data))


def test_users_with_pictures_are_clipped_as_one(tmp_path: Path, recorded: Recorded) -> None:
    name, data = "qwen2_vl", examples("qwen2_vl", grids=([], [(2, 4), (2, 2)], [(4, 4)], []))
    dp = {"privacy_unit": "user", "user_column": "author", "max_examples_per_user": 3}
    run(tmp_path, name, data, **dp, expected_batch_size=4).train()
    model, expected = seeded(name).train(), torch.zeros(())
    for author in range(4):
        own = [gradient(model, padded(name)([i])) for i in data if i["author"] == author]
        expected = expected + clipped(torch.stack(own).mean(0), C)
    assert close(recorded.sums[0], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_no_patch_moves_more_than_the_clipping_norm(
    tmp_path: Path, recorded: Recorded, value: float
) -> None:
    name, data = "qwen2_vl", examples("qwen2_vl")
    run(tmp_path / "one", name, data[1:]).train()
    data[0]["pixel_values"][0, 0] = value
    run(tmp_path / "other", name, data).train()
    moved = (recorded.sums[1] - recorded.sums[0]).norm()
    assert moved <= C * (1 + 1e-5)


def test_a_collator_that_splits_examples_is_still_refused(tmp_path: Path) -> None:
    """Two texts of one example would be clipped twice."""

    def split(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded("qwen2_vl")(items)
        return batch | {"input_ids": batch["input_ids"].repeat(2, 1)}

    trainer = run(tmp_path, "qwen2_vl", examples("qwen2_vl"))
    trainer.data_collator = split
    with pytest.raises(ConfigurationError, match="same number of rows"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_of_ones_own_adds_examples_up(engine: str) -> None:
    name, data = "qwen2_vl", examples("qwen2_vl", count=3)
    model, total = seeded(name).train(), torch.zeros(())
    chosen = engine_named(engine)
    for item in data:
        batch = OneExample(padded(name)([item]))
        summed = clipped_sum(model, batch, clipping_norm=C, engine=chosen)
        total = total + torch.cat([grad.flatten() for grad in summed.grads.values()])
        assert len(summed.norms) == 1
    assert close(total, loop(name, data))
    with pytest.raises(ConfigurationError, match="OneExample"):
        clipped_sum(model, padded(name)(data), clipping_norm=C)


def test_its_one_row_is_all_of_it() -> None:
    one = OneExample(ids=torch.ones(1, 3), patches=torch.ones(7, 2))
    assert batch_size(one) == 1
    for same in (row(one, 0), rows(one, 0, 1), select_rows(one, [0])):
        assert isinstance(same, OneExample)
        assert same["patches"].shape == (7, 2)
    for wrong in ([], [0, 0], [1]):
        with pytest.raises(IndexError):
            select_rows(one, wrong)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_runs_it_once_by_plain_autograd(name: str) -> None:
    """Without looking the model over, or choosing by it."""
    model, engine = seeded("qwen2_vl").train(), engine_named(name)
    runs: list[None] = []
    model.register_forward_pre_hook(lambda *_: runs.append(None))
    batch = OneExample(padded("qwen2_vl")(examples("qwen2_vl", count=1)))
    engine.clipped_sum(
        model, batch, example_loss=definition_loss(own_loss), clipping=FlatClipping(C)
    )
    assert len(runs) == 1
    assert getattr(engine, "chosen", None) is None


def own_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).loss


def test_its_padding_stays_where_positions_have_three_axes(
    tmp_path: Path, recorded: Recorded
) -> None:
    """Height, width and time of each position: ``(3, 1, T)``."""
    name, data = "qwen2_vl", examples("qwen2_vl", count=4)

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded(name)(items)
        del batch["mm_token_type_ids"]
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        wider = {column: F.pad(batch[column], (0, 3), value=fills[column]) for column in fills}
        width = wider["input_ids"].shape[1]
        return {**batch, **wider, "position_ids": torch.arange(width).expand(3, len(items), width)}

    trainer = run(tmp_path, name, data)
    trainer.data_collator = collate
    trainer.train()
    model, expected = seeded(name).train(), torch.zeros(())
    for item in data:
        expected = expected + clipped(gradient(model, collate([item])), C)
    assert close(recorded.sums[0], expected)


def test_what_inference_mode_made_is_copied() -> None:
    with torch.inference_mode():
        one = OneExample(ids=torch.ones(1, 3), patches=torch.ones(7, 2))
    copied = tracked(one)
    assert isinstance(copied, OneExample)
    assert not any(value.is_inference() for value in copied.values())


def test_a_loss_of_ones_own_is_given_all_of_it(tmp_path: Path, recorded: Recorded) -> None:
    name, data = "llava", examples("llava")

    def tripled(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        assert len(inputs["input_ids"]) == 1
        return 3 * model(**inputs).loss[None]

    trainer = trainer_for(
        tmp_path,
        model=seeded(name),
        train_dataset=data,
        data_collator=padded(name),
        example_loss=tripled,
        host={"max_steps": 1, "remove_unused_columns": False},
        dp={"clipping_norm": 1e6, "expected_batch_size": len(data), "private_loss": False},
    )
    trainer.train()
    model = seeded(name).train()
    expected = sum(3 * gradient(model, padded(name)([item])) for item in data)
    assert close(recorded.sums[0], expected)


def test_what_explains_engines_says_why_it_cannot(tmp_path: Path) -> None:
    trainer = run(tmp_path, "qwen2_vl", examples("qwen2_vl"))
    with pytest.raises(ConfigurationError, match="one example at a time"):
        trainer.explain_engine()

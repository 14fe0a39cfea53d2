"""DPArguments beside the host's arguments: nothing is shared, both are parsed together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_dp import DPArguments


def shared(ours: type, theirs: type) -> set[str]:
    fields = [{field.name for field in dataclasses.fields(one)} for one in (ours, theirs)]
    return fields[0] & fields[1]


@pytest.mark.parametrize("host", [TrainingArguments, Seq2SeqTrainingArguments])
def test_no_field_is_named_like_one_of_the_host(host: type) -> None:
    assert shared(DPArguments, host) == set()


def test_a_planted_collision_is_found() -> None:
    planted = dataclasses.make_dataclass("Planted", [("max_grad_norm", float), ("ours", int)])
    assert shared(planted, TrainingArguments) == {"max_grad_norm"}


def test_one_parser_reads_both(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, DPArguments))
    host, ours = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--max_grad_norm", "0", "--target_epsilon", "2.5"]
    )
    assert (host.output_dir, ours.target_epsilon) == (str(tmp_path), 2.5)


def test_every_option_is_explained_once() -> None:
    helps = [field.metadata.get("help", "") for field in dataclasses.fields(DPArguments)]
    assert all(len(text) > 20 for text in helps)
    assert len(set(helps)) == len(helps)

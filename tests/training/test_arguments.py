"""DPArguments refuses what cannot be, in the one form that all messages have, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import transformers as tf
from transformers import HfArgumentParser, TrainingArguments

from hf_dp import DPArguments
from hf_dp.errors import ConfigurationError
from hf_dp.training.arguments import checked

POSITIVE = (
    "target_epsilon",
    "noise_multiplier",
    "clipping_norm",
    "expected_batch_size",
    "loss_ceiling",
)
SHARES = ("target_delta", "loss_share")
CHOICES = {
    "accountant": ("pdl", "pld"),
    "engine": ("bookkeeping", "book_keeping"),
    "ledger": ("continued", "continue"),
    "privacy_unit": ("examples", "example"),
    "sampling": ("Poisson", "poisson"),
    "user_reduction": ("means", "mean"),
    "user_sampling": ("user", "users"),
    "user_selection": ("Random", "random"),
}


def make(**options: Any) -> DPArguments:
    if "target_epsilon" not in options:
        options.setdefault("noise_multiplier", 1.0)
    return DPArguments(**options)


@pytest.mark.parametrize("field", POSITIVE)
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, "3", True, [1.0]])
def test_sizes_must_be_finite_numbers_above_zero(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^DPArguments\.{field}=.*: expected a finite"):
        make(**{field: value})


@pytest.mark.parametrize("field", SHARES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2, math.nan, "0.1", False])
def test_shares_must_lie_strictly_between_zero_and_one(field: str, value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^DPArguments\.{field}=.*strictly between 0 and 1"
    ):
        make(**{field: value})


@pytest.mark.parametrize("field", [*POSITIVE, *SHARES])
def test_sizes_and_shares_in_range_are_taken(field: str) -> None:
    assert getattr(make(**{field: 0.25}), field) == 0.25


@pytest.mark.parametrize("field", CHOICES)
def test_an_unknown_word_is_answered_with_the_nearest_one(field: str) -> None:
    wrong, right = CHOICES[field]
    with pytest.raises(
        ConfigurationError,
        match=rf"^DPArguments\.{field}='{wrong}': expected.*Did you mean '{right}'",
    ):
        make(**{field: wrong})
    assert getattr(make(**{field: right}), field) == right


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", ["", "zzzzzz", None, 3])
def test_a_word_like_no_other_is_answered_with_all_of_them(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"DPArguments\.{field}=.*expected one of"):
        make(**{field: value})


@pytest.mark.parametrize(
    "options", [{}, {"target_epsilon": 3.0, "noise_multiplier": 1.0}, {"target_epsilon": None}]
)
def test_exactly_one_of_target_and_noise(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="exactly one of the two"):
        DPArguments(**options)


def test_it_is_a_value_error_for_those_who_catch_one() -> None:
    with pytest.raises(ValueError, match="target_epsilon"):
        DPArguments(target_epsilon=-1.0)


def test_the_default_delta_depends_on_the_data_alone() -> None:
    assert make().delta_for(1000) == pytest.approx(1000**-1.1)
    assert make(target_delta=1e-6).delta_for(1000) == 1e-6


@pytest.mark.parametrize("delta", [1 / 1000, 0.5])
def test_a_delta_that_allows_publishing_somebody_is_refused(delta: float) -> None:
    with pytest.raises(ConfigurationError, match=r"less than 1 / the number of units = 0\.001"):
        make(target_delta=delta).delta_for(1000)


def test_no_name_is_shared_with_the_hosts_arguments() -> None:
    ours = {field.name for field in dataclasses.fields(DPArguments)}
    for cls in (TrainingArguments, tf.Seq2SeqTrainingArguments):
        assert not ours & {field.name for field in dataclasses.fields(cls)}
        assert not ours & set(dir(cls))


def test_every_option_explains_itself_once() -> None:
    helps = [field.metadata["help"] for field in dataclasses.fields(DPArguments)]
    assert len(set(helps)) == len(helps)
    assert all(text.endswith(".") and len(text) > 20 for text in helps)


def test_the_command_line_takes_every_option() -> None:
    words = (
        "--noise_multiplier 1.5 --clipping_norm 0.3 --expected_batch_size 64 --accountant rdp "
        "--engine sequential --private_loss False --loss_share 0.2 --loss_ceiling 4 "
        "--nonprivate_metrics --ledger continue --target_delta 1e-6 --sampling poisson "
        "--privacy_unit example"
    )
    (parsed,) = HfArgumentParser(DPArguments).parse_args_into_dataclasses(words.split())
    assert parsed == DPArguments(
        noise_multiplier=1.5,
        clipping_norm=0.3,
        expected_batch_size=64.0,
        accountant="rdp",
        engine="sequential",
        private_loss=False,
        loss_share=0.2,
        loss_ceiling=4.0,
        nonprivate_metrics=True,
        ledger="continue",
        target_delta=1e-6,
    )


def test_a_checked_copy_is_equal_and_its_own() -> None:
    given = make(clipping_norm=0.5)
    copy = checked(given)
    assert copy == given
    assert copy is not given
    given.clipping_norm = -1.0
    assert copy.clipping_norm == 0.5
    with pytest.raises(ConfigurationError, match="clipping_norm=-1"):
        checked(given)
    with pytest.raises(ConfigurationError, match="a DPArguments"):
        checked(None)


def test_a_subclass_keeps_its_own_fields() -> None:
    @dataclasses.dataclass
    class Mine(DPArguments):
        note: str = "x"

    copy = checked(Mine(noise_multiplier=1.0, note="y"))
    assert isinstance(copy, Mine)
    assert copy.note == "y"

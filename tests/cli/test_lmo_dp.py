"""``hf-dp lmo-dp``: published labels beside what holds, for people and for programs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hf_dp.accounting.as_published import report
from hf_dp.accounting.as_published.report import WORDING, Step, Total
from hf_dp.accounting.as_published.sets import TASKS, set_named
from hf_dp.cli.lmo_dp import without_infinities


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One set only: the others are told apart in tests of the arithmetic."""

    def rows(task: report.PublishedTask, *, with_steps: bool) -> Iterator[Step | Total]:
        assert with_steps
        yield report.step(set_named("0.3"), task.dimension)
        yield report.total(set_named("0.3"), task)

    monkeypatch.setattr(report, "_rows", rows)
    report._warn_once.cache_clear()


@pytest.mark.usefixtures("two_rows")
def test_each_label_stands_beside_what_holds(
    hf_dp_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = hf_dp_program("lmo-dp")
    assert answer.code == 0
    assert "Warning" not in answer.err
    for expected in (
        "as_published_label",
        "0.29321",
        "0.157",
        "2.71 / 0.565",
        "3.593 / 7.124",
        "22.730",
        "SST-2, set 0.3: label 0.16 at delta = 1e-10; our accounting proves epsilon 6.2 / 0.62 "
        "for all parameters, with the released sampler / with the accountant's reading, and with many "
        "parameters the true one is not below 2.7 / 0.56",
        WORDING,
    ):
        assert expected in answer.out


@pytest.mark.usefixtures("two_rows")
def test_the_json_names_labels_labels(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program("lmo-dp", "--json", "--task", "QNLI")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["task"] == "QNLI"
    (step,), (total,) = found["steps"], found["totals"]
    assert step["as_published_label"] == pytest.approx(0.29321, abs=5e-6)
    assert total["as_published_total_label"] == pytest.approx(0.150, abs=6e-4)
    assert "epsilon" not in step
    assert [one["reading"] for one in total["holds"]] == ["sampled", "accounted"]


def test_an_unknown_task_is_a_sentence(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program("lmo-dp", "--task", "SST2")
    assert answer.code == 2
    assert "expected one of ['E2E', 'MNLI', 'QNLI', 'QQP', 'SST-2']" in answer.err


def test_what_is_infinite_is_null_however_deep() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = without_infinities({"a": [1.0, float("inf")], "b": TASKS[:1], "c": "x"})
    assert found["a"] == [1.0, None]
    assert found["b"][0]["name"] == "SST-2"
    assert found["c"] == "x"

"""LMO-DP's published labels: reproduced to the digit, and kept apart from what holds."""

from __future__ import annotations

import ast
import json
import math
import warnings
from pathlib import Path

import pytest

import hf_dp
from hf_dp.accounting.as_published import formula, lmo_published, report
from hf_dp.accounting.as_published.formula import (
    as_published_label,
    as_published_total_label,
    inside_domain,
    matched_noise,
)
from hf_dp.accounting.as_published.report import Size, Step
from hf_dp.accounting.as_published.sets import DELTA, SETS, TASKS, set_named
from hf_dp.errors import ConfigurationError

ROOT = Path(hf_dp.__file__).parent
KEPT = ROOT.parent / "benchmarks" / "results" / "lmo_dp.json"

LABELS = {
    "0.15": 0.14887,
    "0.2": 0.19321,
    "0.3": 0.29321,
    "0.7": 0.69321,
    "1": 0.99321,
    "2": 1.92809,
    "3": 2.99648,
    "4": 3.99887,
    "usefulness 0.3": 0.2368,
}
# The same formula at orders where the moment generating function is finite.
INSIDE = {
    "0.3": 1.308,
    "0.7": 1.708,
    "2": 4.163,
    "3": 5.118,
    "usefulness 0.3": 24.5,
    "5": 28.95,
}
TOTALS = {
    "SST-2": (0.157, 0.261, 0.823, 1.347, 2.945),
    "MNLI": (0.139, 0.157, 0.322, 0.536, 1.320),
    "QNLI": (0.150, 0.217, 0.654, 1.061, 2.325),
    "QQP": (0.139, 0.158, 0.335, 0.555, 1.364),
    "E2E": (0.046, 0.046, 0.068, 0.176),
}
# Set: standard deviation and mean absolute value (accounted, sampled), usefulness at 0.9, information
# times variance as sampled.
SIZES = {
    "0.3": ((7.124, 3.593), (4.874, 2.153), (0.178, 0.423), 6.96),
    "0.7": ((2.311, 1.580), (1.627, 1.057), (0.427, 0.598), 3.08),
    "2": ((0.831, 0.685), (0.586, 0.475), (0.785, 0.849), 2.27),
    "3": ((0.585, 0.504), (0.411, 0.351), (0.888, 0.921), 2.21),
    "usefulness 0.3": ((1.592, 1.592), (0.872, 0.872), (0.712, 0.712), 8.95),
}


@pytest.mark.reference
@pytest.mark.parametrize(("name", "label"), LABELS.items())
def test_the_published_label_is_reproduced_to_the_printed_digit(name: str, label: float) -> None:
    digits = len(str(label).partition(".")[2])
    assert round(as_published_label(set_named(name)).value, digits) == label


@pytest.mark.reference
def test_the_one_label_that_the_released_files_hold_is_reproduced_to_all_digits() -> None:
    label = as_published_label(set_named("5"))
    assert label.value == pytest.approx(4.921456706, abs=5e-10)
    assert label.order == 128  # the released file says so too
    assert label.largest_valid_order == 2


@pytest.mark.reference
@pytest.mark.parametrize(("name", "expected"), INSIDE.items())
def test_inside_its_domain_the_formula_gives_much_more(name: str, expected: float) -> None:
    label = as_published_label(set_named(name))
    digits = len(str(expected).partition(".")[2])
    assert round(label.inside_domain, digits) == expected
    assert label.inside_domain > 1.7 * label.value


def test_most_labels_come_from_orders_at_which_nothing_is_finite() -> None:
    beyond = [
        noise.name
        for noise in SETS
        if (label := as_published_label(noise)).order > label.largest_valid_order
    ]
    assert len(beyond) == len(SETS)


def test_the_domain_ends_where_the_moment_generating_function_does() -> None:
    label = as_published_label(set_named("0.3"))
    assert label.largest_valid_order == 20  # finite below order 21
    law = set_named("0.3").law("accounted")
    assert math.isfinite(law.log_moment(19.99))
    assert math.isinf(law.log_moment(20.0))
    assert inside_domain(law, DELTA) == label.inside_domain


@pytest.mark.reference
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_totals_of_the_matched_gaussian_are_reproduced(task: report.PublishedTask) -> None:
    for name, expected in zip(task.sets, TOTALS[task.name], strict=True):
        found = as_published_total_label(set_named(name).nominal, task)
        assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.reference
def test_the_matched_noise_is_that_of_the_released_runs() -> None:
    found = [matched_noise(set_named(name).nominal, DELTA) for name in TASKS[0].sets]
    assert found == pytest.approx([22.730, 9.741, 3.410, 2.273, 1.364], abs=6e-4)


@pytest.mark.reference
@pytest.mark.parametrize("name", SIZES)
def test_noise_sizes_are_reproduced(name: str) -> None:
    deviation, mean_absolute, usefulness, product = SIZES[name]
    for index, reading in enumerate(("accounted", "sampled")):
        size = Size.of(set_named(name).law(reading), reading)
        assert size.deviation == pytest.approx(deviation[index], abs=6e-4)
        assert size.mean_absolute == pytest.approx(mean_absolute[index], abs=6e-4)
        assert size.usefulness == pytest.approx(usefulness[index], abs=6e-4)
    assert size.information * size.deviation**2 == pytest.approx(product, abs=6e-3)


def test_labels_need_to_be_asked_for_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"report_as_published=False: expected True"):
        lmo_published(report_as_published=False)
    with pytest.raises(ConfigurationError, match=r"report_as_published=1: expected True"):
        lmo_published(report_as_published=1)
    with pytest.raises(ConfigurationError, match=r"lmo_published\.task='SST-3'.*expected one of"):
        lmo_published(report_as_published=True, task="SST-3")


def test_whoever_asks_is_warned_once() -> None:
    report._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="It is not an epsilon") as seen:
        lmo_published(report_as_published=True)
    assert seen[0].filename == __file__
    lmo_published(report_as_published=True)  # a second warning would be an error


def test_no_label_is_called_epsilon() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = next(iter(lmo_published(report_as_published=True)))
    assert isinstance(first, Step)
    assert "epsilon" not in " ".join(vars(first))
    for total in (report.Total, report.Holds):
        named = [name for name in total.__dataclass_fields__ if "label" in name]
        assert all("epsilon" not in name for name in named)


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def readers(root: Path) -> set[str]:
    """Modules below `root` that import something as published, or name it in a string."""
    package = root / "accounting" / "as_published"
    return {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if package not in path.parents
        and (
            any("as_published" in name for name in imports_of(path))
            or "accounting.as_published" in path.read_text("utf-8")
        )
    }


def test_no_figure_as_published_is_within_reach_of_training() -> None:
    assert readers(ROOT) == {"cli/lmo_dp.py"}


@pytest.mark.parametrize(
    "line",
    [
        "from hf_dp.accounting.as_published import lmo_published",
        "from hf_dp.accounting import as_published",
        "import importlib\nimportlib.import_module('hf_dp.accounting.as_published.report')",
    ],
)
def test_a_planted_reader_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(line)
    assert readers(tmp_path) == {"plan.py"}


def test_a_formula_that_respects_its_domain_gives_other_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed_form = formula._closed_form

    def respectful(noise: formula.PublishedNoise, t: float) -> float:
        inside = t < noise.law("accounted").domain_end
        return closed_form(noise, t) if inside else math.inf  # type: ignore[arg-type]

    monkeypatch.setattr(formula, "_closed_form", respectful)
    label = as_published_label(set_named("0.3"))
    assert label.order <= label.largest_valid_order
    assert label.value == pytest.approx(label.inside_domain, abs=2e-3)


@pytest.mark.reference
def test_the_limit_of_many_parameters_is_that_of_a_gaussian() -> None:
    task = TASKS[0]
    run = (task.sampling_probability, task.num_steps, task.delta, task.dimension)
    assert report._limit(1.3625, run) == pytest.approx(2.71, abs=6e-3)
    assert report._limit(4.536, run) == pytest.approx(0.565, abs=6e-4)
    assert report._limit(0.1612, run) == pytest.approx(450, rel=2e-3)  # where bounds are loose


@pytest.mark.reference
def test_what_holds_for_the_published_runs_is_kept() -> None:
    kept = json.loads(KEPT.read_text("utf-8"))
    rows = {row["name"]: row for row in kept["totals"] if row["task"] == "SST-2"}
    held = {name: {one["reading"]: one for one in row["holds"]} for name, row in rows.items()}
    for name, sampled, accounted in (("0.3", 1.63, 0.513), ("0.7", 2.64, 1.50), ("2", 6.64, 4.88)):
        one = held[name]
        assert one["sampled"]["epsilon_one_coordinate"] == pytest.approx(sampled, rel=3e-3)
        assert one["accounted"]["epsilon_one_coordinate"] == pytest.approx(accounted, rel=3e-3)
    limits = (
        ("0.3", 2.71, 0.565),
        ("0.7", 6.53, 2.05),
        ("2", 36.3, 19.3),
        ("3", 76.6, 48.7),
        ("5", 450, 450),
    )
    for name, sampled, accounted in limits:
        one = held[name]
        assert one["sampled"]["high_dimension_limit"] == pytest.approx(sampled, rel=6e-3)
        assert one["accounted"]["high_dimension_limit"] == pytest.approx(accounted, rel=6e-3)
    for row in rows.values():
        for one in row["holds"]:
            proven = one["epsilon_all_coordinates"]
            assert one["high_dimension_limit"] > 1.9 * row["as_published_total_label"]
            assert proven is None or proven > one["high_dimension_limit"]


def test_one_row_is_computed_as_it_is_kept() -> None:
    kept = json.loads(KEPT.read_text("utf-8"))["totals"][0]
    found = report.total(set_named("0.3"), TASKS[0])
    assert (found.name, found.task) == (kept["name"], kept["task"])
    assert found.as_published_total_label == pytest.approx(kept["as_published_total_label"])
    for one, before in zip(found.holds, kept["holds"], strict=True):
        assert one.reading == before["reading"]
        assert one.epsilon_all_coordinates <= before["epsilon_all_coordinates"] * (1 + 1e-5)
        for name in ("epsilon_one_coordinate", "high_dimension_limit", "gaussian_with_that_limit"):
            assert getattr(one, name) == pytest.approx(before[name], rel=1e-5)

"""``hf-dp report``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.events import Gaussian, NonPrivate, PoissonSampled, PrivacyEvent, SelfComposed
from hf_dp.ledger import LEDGER_NAME, Ledger
from hf_dp.reports.report import PrivacyReport

STEP = PoissonSampled(0.01, Gaussian(1.0))
HEADER = {
    "delta": 1e-5,
    "unit": "example",
    "relation": "replace_special",
    "accountant": "pld",
    "population_size": 1000,
    "coins": "operating system",
    "plan": {
        "sampler": {"type": "hf_dp.sampling.poisson.PoissonSampling", "sampling_probability": 0.01},
        "clipping": {"type": "hf_dp.clipping.flat.FlatClipping", "clipping_norm": 1.0},
        "noise": {"type": "hf_dp.noise.gaussian.GaussianNoise", "noise_multiplier": 1.0},
        "num_steps": 100,
    },
}


def run_folder(folder: Path, *events: PrivacyEvent) -> Path:
    with Ledger.create(folder / LEDGER_NAME, HEADER) as ledger:
        for step, event in enumerate(events, start=1):
            ledger.append(event, step=step)
    return folder


def test_json_counts_what_was_released(hf_dp_program: Callable[..., Any], tmp_path: Path) -> None:
    answer = hf_dp_program("report", run_folder(tmp_path, *[STEP] * 7), "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    whole = accountant_named("pld").guarantee(SelfComposed(STEP, 7), delta=1e-5)
    assert (found["epsilon"], found["delta"]) == (whole.epsilon, 1e-5)
    assert (found["accountant"], found["is_upper_bound"]) == ("pld", True)
    assert found["noise_multiplier"] == 1.0
    assert found["num_releases"] == 7
    assert (found["unit"], found["relation"]) == ("example", "replace_special")


def test_another_accountant_can_be_asked(hf_dp_program: Callable[..., Any], tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *[STEP] * 7)
    found = json.loads(hf_dp_program("report", folder, "--accountant", "rdp", "--json").out)
    whole = accountant_named("rdp").guarantee(SelfComposed(STEP, 7), delta=1e-5)
    assert (found["accountant"], found["epsilon"]) == ("rdp", whole.epsilon)


def test_the_report_is_the_librarys_own(hf_dp_program: Callable[..., Any], tmp_path: Path) -> None:
    folder = run_folder(tmp_path, STEP)
    answer = hf_dp_program("report", folder)
    assert answer.code == 0
    assert answer.out == f"{PrivacyReport.from_ledger(folder)}\n"


def test_a_release_without_privacy_is_null_in_json(
    hf_dp_program: Callable[..., Any], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, STEP, NonPrivate("exact loss"))
    assert json.loads(hf_dp_program("report", folder, "--json").out)["epsilon"] is None


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_ledger_that_cannot_be_trusted_is_explained(
    hf_dp_program: Callable[..., Any], tmp_path: Path, what: str
) -> None:
    if what == "damaged":
        path = run_folder(tmp_path, *[STEP] * 3) / LEDGER_NAME
        path.write_text(path.read_text().replace("0.01", "0.02", 1))
    answer = hf_dp_program("report", tmp_path)
    assert answer.code == 2
    assert answer.err.startswith("Error: ")
    assert answer.out == ""
    assert what == "damaged" or "Pass the output_dir" in answer.err

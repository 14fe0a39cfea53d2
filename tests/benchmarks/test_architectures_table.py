"""The table of architectures that is committed covers the families that are tested, within the bars."""

from __future__ import annotations

from pathlib import Path

from family_zoo import FAMILIES

TABLE = Path(__file__).parents[2] / "benchmarks" / "architectures.md"
FLOAT32_INSIDE = {"gemma2", "gemma3"}


def lines() -> list[list[str]]:
    text = TABLE.read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if "|" in line]
    return rows[2:]


def test_every_family_is_there_in_every_form() -> None:
    forms = {(row[0], row[2]) for row in lines()}
    expected = {(f, form) for f in FAMILIES for form in ("all", "two thirds", "LoRA")}
    assert expected <= forms
    assert len(FAMILIES) >= 30


def test_no_family_needs_one_example_at_a_time() -> None:
    assert not any("sequential" in row for row in lines())


def test_errors_are_within_the_bars() -> None:
    for family, *_, wide, narrow in lines():
        assert float(narrow) <= 1e-5, family
        assert float(wide) <= (1e-7 if family in FLOAT32_INSIDE else 1e-12), family

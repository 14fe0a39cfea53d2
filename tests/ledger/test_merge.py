"""Resume: the larger count wins, foreign and diverged ledgers are refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_dp.errors import LedgerCorruptError, LedgerError, LedgerMismatchError
from hf_dp.events import Gaussian, PrivacyEvent
from hf_dp.ledger import LEDGER_NAME, Ledger, merge_ledgers, read_ledger


@pytest.fixture
def copies(
    make_ledger: Callable[..., Path], tmp_path: Path, step_event: PrivacyEvent
) -> Callable[[int, int], tuple[Path, Path]]:
    """Two copies of one run, with so many releases each."""

    def make(num_local: int, num_checkpoint: int) -> tuple[Path, Path]:
        longer = make_ledger(max(num_local, num_checkpoint), "origin")
        lines = longer.read_bytes().splitlines(keepends=True)
        paths = (tmp_path / "out" / LEDGER_NAME, tmp_path / "checkpoint-7" / LEDGER_NAME)
        for path, count in zip(paths, (num_local, num_checkpoint), strict=True):
            path.parent.mkdir()
            path.write_bytes(b"".join(lines[: count + 1]))
        return paths

    return make


def tear(path: Path, num_bytes: int = 60) -> None:
    """Cut the last line short; its release still counts."""
    path.write_bytes(path.read_bytes()[:-num_bytes])


def append(path: Path, event: PrivacyEvent, step: int = 99) -> None:
    with Ledger.open(path) as ledger:
        ledger.append(event, step=step)


@pytest.mark.parametrize(("local", "checkpoint"), [(5, 3), (3, 5), (4, 4), (0, 2), (2, 0), (0, 0)])
def test_the_larger_count_ends_up_in_the_output_directory(
    copies: Callable[[int, int], tuple[Path, Path]], local: int, checkpoint: int
) -> None:
    ours, theirs = copies(local, checkpoint)
    before = theirs.read_bytes()
    record = merge_ledgers(ours, theirs)
    assert record.num_releases == max(local, checkpoint)
    assert read_ledger(ours) == record
    assert theirs.read_bytes() == before
    with Ledger.open(ours) as ledger:
        assert ledger.num_releases == max(local, checkpoint)


def test_a_missing_local_ledger_is_taken_from_the_checkpoint(
    copies: Callable[[int, int], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, theirs = copies(0, 3)
    moved = tmp_path / "elsewhere" / "new" / LEDGER_NAME
    assert merge_ledgers(moved, theirs).num_releases == 3
    assert moved.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_without_a_copy_leaves_the_local_ledger(
    copies: Callable[[int, int], tuple[Path, Path]],
) -> None:
    ours, theirs = copies(3, 0)
    theirs.unlink()
    before = ours.read_bytes()
    assert merge_ledgers(ours, theirs).num_releases == 3
    assert ours.read_bytes() == before


def test_no_ledger_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerMismatchError, match="Without one nobody knows"):
        merge_ledgers(tmp_path / "a" / LEDGER_NAME, tmp_path / "b" / LEDGER_NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_merges_with_itself(copies: Callable[[int, int], tuple[Path, Path]]) -> None:
    ours, _ = copies(3, 3)
    assert merge_ledgers(ours, ours).num_releases == 3


def test_a_foreign_ledger_is_refused_and_neither_is_changed(
    make_ledger: Callable[..., Path],
) -> None:
    ours, theirs = make_ledger(2, "a"), make_ledger(3, "b")
    before = ours.read_bytes(), theirs.read_bytes()
    with pytest.raises(LedgerMismatchError, match="It belongs to another run"):
        merge_ledgers(ours, theirs)
    assert (ours.read_bytes(), theirs.read_bytes()) == before


@pytest.mark.parametrize(("local", "checkpoint"), [(1, 1), (2, 1), (1, 2)])
def test_two_continuations_of_one_run_are_refused(
    copies: Callable[[int, int], tuple[Path, Path]],
    step_event: PrivacyEvent,
    monkeypatch: pytest.MonkeyPatch,
    local: int,
    checkpoint: int,
) -> None:
    # Same event, same step, same moment: nothing but the writers' names tells the lines apart.
    monkeypatch.setattr("hf_dp.ledger.entry._now", lambda: "2030-01-01T00:00:00.000+00:00")
    ours, theirs = copies(3, 3)
    for path, count in ((ours, local), (theirs, checkpoint)):
        for _ in range(count):
            append(path, step_event)
    before = ours.read_bytes(), theirs.read_bytes()
    with pytest.raises(LedgerMismatchError, match="continued twice from the same point"):
        merge_ledgers(ours, theirs)
    assert (ours.read_bytes(), theirs.read_bytes()) == before


@pytest.mark.parametrize(
    ("local", "checkpoint", "torn", "expected"),
    [
        (4, 3, "local", 4),
        (3, 3, "local", 3),
        (3, 4, "checkpoint", 4),
        (3, 3, "checkpoint", 3),
        (3, 3, "both", 3),
        (2, 5, "local", 5),
        (5, 2, "checkpoint", 5),
    ],
)
def test_a_torn_line_in_either_counts(
    copies: Callable[[int, int], tuple[Path, Path]],
    local: int,
    checkpoint: int,
    torn: str,
    expected: int,
) -> None:
    ours, theirs = copies(local, checkpoint)
    if torn in ("local", "both"):
        tear(ours, 70)
    if torn in ("checkpoint", "both"):
        tear(theirs)
    assert merge_ledgers(ours, theirs).num_releases == expected
    with Ledger.open(ours) as ledger:
        assert ledger.num_releases == expected


def test_a_torn_line_merges_with_the_line_that_was_put_in_its_place(
    copies: Callable[[int, int], tuple[Path, Path]], step_event: PrivacyEvent
) -> None:
    ours, theirs = copies(3, 3)
    tear(ours)
    shutil.copy(ours, theirs)
    append(ours, step_event)
    assert merge_ledgers(ours, theirs).num_releases == 4


@pytest.mark.parametrize("other", ["whole", "torn"])
def test_a_torn_line_of_another_continuation_is_refused(
    copies: Callable[[int, int], tuple[Path, Path]], step_event: PrivacyEvent, other: str
) -> None:
    ours, theirs = copies(3, 3)
    append(ours, step_event, step=1)
    append(theirs, Gaussian(4.0), step=2)
    tear(ours)
    if other == "torn":
        tear(theirs)
    with pytest.raises(LedgerMismatchError, match="continued twice"):
        merge_ledgers(ours, theirs)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_ledger_is_refused(
    copies: Callable[[int, int], tuple[Path, Path]], damaged: int
) -> None:
    paths = copies(3, 2)
    data = paths[damaged].read_bytes()
    paths[damaged].write_bytes(data.replace(b'"step":0', b'"step":9', 1))
    with pytest.raises(LedgerCorruptError, match="Line 2 does not match its own hash"):
        merge_ledgers(*paths)


def test_a_merge_that_cannot_be_written_is_refused_and_keeps_the_local_ledger(
    copies: Callable[[int, int], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = copies(1, 3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(LedgerError, match="bring it up to date: No space left"):
            merge_ledgers(ours, theirs)
    assert read_ledger(ours).num_releases == 1
    assert merge_ledgers(ours, theirs).num_releases == 3

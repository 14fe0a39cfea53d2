"""Verification: what an edit does, what a torn line counts for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.errors import LedgerCorruptError, LedgerError
from hf_dp.events import Composed, Gaussian, NonPrivate, PrivacyEvent, SelfComposed, to_json
from hf_dp.ledger import Ledger, read_ledger
from hf_dp.ledger.chain import verify
from hf_dp.ledger.entry import header_line, line_hash, release_line, seal

WHERE = Path("ledger")
RELEASES = 4


@pytest.fixture
def data(make_ledger: Callable[..., Path]) -> bytes:
    return make_ledger(RELEASES).read_bytes()


def edits_at(data: bytes, position: int) -> list[bytes]:
    """One byte changed in four ways, removed, doubled, and a line break put before it."""
    before, byte, after = data[:position], data[position], data[position + 1 :]
    changed = [bytes([byte ^ 1]), bytes([byte ^ 0x20]), b"0", b"\n", b"", bytes([byte] * 2)]
    changed.append(b"\n" + bytes([byte]))
    return [before + c + after for c in changed if c != bytes([byte])]


def verdict(data: bytes) -> str | int:
    try:
        return verify(data, WHERE).num_releases
    except LedgerCorruptError:
        return "corrupt"


def test_any_edit_of_any_byte_before_the_last_line_is_detected(data: bytes) -> None:
    start_of_last_line = data[:-1].rindex(b"\n") + 1
    for position in range(start_of_last_line):
        for edited in edits_at(data, position):
            assert verdict(edited) == "corrupt", (position, edited)


def test_an_edit_of_the_last_line_is_detected_or_counts_as_a_torn_release(data: bytes) -> None:
    start_of_last_line = data[:-1].rindex(b"\n") + 1
    verdicts = set()
    for position in range(start_of_last_line, len(data)):
        for edited in edits_at(data, position):
            verdicts.add(verdict(edited))
    assert verdicts <= {"corrupt", RELEASES, RELEASES + 1}
    assert "corrupt" in verdicts


def test_a_change_of_a_value_in_the_last_line_is_detected(data: bytes) -> None:
    position = data.rindex(b'"noise_multiplier":1.5')
    edited = data[:position] + b'"noise_multiplier":9.5' + data[position + 22 :]
    with pytest.raises(LedgerCorruptError, match="Line 5 does not match its own hash"):
        verify(edited, WHERE)


def test_lines_taken_out_swapped_or_doubled_are_detected(data: bytes) -> None:
    lines = data.splitlines(keepends=True)
    for order in ((0, 2, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 3, 4, 4), (1, 2, 3, 4), (0, 0, 1)):
        assert verdict(b"".join(lines[i] for i in order)) == "corrupt"


@pytest.mark.parametrize(
    "data_", [b"", b"\n", b"\x00" * 50, b"{}"], ids=["empty", "blank", "zeros", "open"]
)
def test_a_file_without_a_whole_header_is_corrupt(data_: bytes) -> None:
    with pytest.raises(LedgerCorruptError, match=r"Line 1 .*\. Restore the file"):
        verify(data_, WHERE)


def test_a_torn_header_is_corrupt_because_headers_are_written_whole(data: bytes) -> None:
    header = data[: data.index(b"\n") + 1]
    for length in range(len(header)):
        assert verdict(header[:length]) == "corrupt"
    assert verdict(header) == 0


def forged(*releases: dict[str, Any], header: dict[str, Any] | None = None) -> bytes:
    """A ledger with right hashes and chain but whatever content."""
    own = {"kind": "header", "format": 1, "run_id": "a"}
    lines = [seal(own if header is None else header, "0" * 64)]
    for fields in releases:
        lines.append(seal(fields, line_hash(lines[-1])))
    return b"\n".join([*lines, b""])


RELEASE = {"kind": "release", "index": 1, "step": 0, "event": to_json(Gaussian(1.0))}


@pytest.mark.parametrize(
    ("data_", "problem"),
    [
        (forged(header={"kind": "release"}), "Line 1 is not a header"),
        (forged(header={"kind": "header", "format": 1}), "Line 1 has no run_id"),
        (forged({**RELEASE, "index": 2}), "Line 2 is not release number 1"),
        (forged(RELEASE, RELEASE), "Line 3 is not release number 2"),
        (forged({**RELEASE, "kind": "header"}), "Line 2 is a second header"),
        (forged({"kind": "release", "index": 1, "step": 0}), "Line 2 lacks its step or its event"),
        (forged({"kind": "release", "index": 1, "event": {}}), "Line 2 lacks its step"),
        (forged() + b"7\n", "Line 2 is not a JSON object"),
        (forged() + b"{}\n", "Line 2 does not match its own hash"),
        (forged() + seal(RELEASE, "0" * 64) + b"\n", "Line 2 does not follow from the line before"),
        (forged() + seal(RELEASE, "0" * 64), "Line 2 does not follow from the line before"),
        (forged() + b"{}garbage", "Line 2 goes on after the end of its entry"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_right_hashes_around_wrong_content_are_corrupt(data_: bytes, problem: str) -> None:
    with pytest.raises(LedgerCorruptError, match=problem):
        verify(data_, WHERE)


@pytest.mark.parametrize(
    ("data_", "message"),
    [
        (
            forged(header={"kind": "header", "format": 2, "run_id": "a"}),
            "Ledger.format=2: expected 1",
        ),
        (forged({**RELEASE, "kind": "refund"}), "Ledger.kind='refund': expected 'release'"),
        (forged({**RELEASE, "event": {"type": "Later"}}), "line 2: PrivacyEvent.type='Later'"),
        (
            forged(header={"kind": "header", "format": 1, "run_id": "a", "step_event": 7})
            + b"torn",
            "line 2: 'int' object",
        ),
    ],
    ids=["format", "kind", "event", "step-event"],
)
def test_what_this_version_does_not_know_is_refused_but_not_called_corrupt(
    data_: bytes, message: str
) -> None:
    with pytest.raises(LedgerError, match=message) as raised:
        verify(data_, WHERE)
    assert not isinstance(raised.value, LedgerCorruptError)


def test_every_way_to_tear_the_last_line_counts_one_release(data: bytes) -> None:
    start_of_last_line = data[:-1].rindex(b"\n") + 1
    for length in range(start_of_last_line + 1, len(data)):
        chain = verify(data[:length], WHERE)
        assert chain.num_releases == RELEASES
        assert chain.tail == data[start_of_last_line:length]
        assert sum(run.count for run in chain.runs) == RELEASES


@pytest.mark.parametrize(
    "tail",
    [
        b"{",
        b'{"event":{"re',
        b"\x00" * 400,
        b"\x00" * 400 + b"\n",
        b"\xc3",
        b'{"e":"\xe8\xa9',
        b"\n",
        b"7",
    ],
    ids=["brace", "string", "zeros", "zeros-line", "utf8-2", "utf8-3", "blank-line", "digit"],
)
def test_a_torn_line_counts_as_the_event_before_it(
    data: bytes, tail: bytes, step_event: PrivacyEvent
) -> None:
    chain = verify(data + tail, WHERE)
    assert chain.runs == (SelfComposed(step_event, RELEASES + 1),)
    again = verify(chain.repaired(), WHERE)
    assert again.runs == chain.runs
    assert again.tail is None
    assert again.num_recovered == 1
    assert again.last_step == RELEASES - 1


def test_a_line_that_only_lacks_its_newline_counts_as_itself(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "x", {}) as ledger:
        ledger.append(Gaussian(5.0), step=0)
        ledger.append(Gaussian(0.5), step=1)
    chain = verify((tmp_path / "x").read_bytes()[:-1], WHERE)
    assert chain.tail is not None
    assert chain.runs == (SelfComposed(Gaussian(5.0), 1), SelfComposed(Gaussian(0.5), 1))
    again = verify(chain.repaired(), WHERE)
    assert again.runs == chain.runs
    assert again.last_step == 1


def test_a_torn_first_release_counts_as_the_step_event_of_the_header(
    header: dict[str, Any], step_event: PrivacyEvent
) -> None:
    chain = verify(header_line(header) + b"\n{", WHERE)
    assert chain.runs == (SelfComposed(step_event, 1),)
    assert chain.num_releases == 1


def test_a_torn_first_release_of_unknown_event_is_not_called_private() -> None:
    chain = verify(header_line({}) + b"\n{", WHERE)
    (run,) = chain.runs
    assert isinstance(run.event, NonPrivate)


def test_repairing_a_whole_ledger_changes_nothing(data: bytes) -> None:
    assert verify(data, WHERE).repaired() == data


def test_unlike_events_keep_their_order_in_runs(tmp_path: Path) -> None:
    a, b = Gaussian(1.0), Gaussian(2.0)
    with Ledger.create(tmp_path / "x", {}) as ledger:
        for event in (a, a, b, a):
            ledger.append(event, step=0)
        expected = Composed((SelfComposed(a, 2), SelfComposed(b, 1), SelfComposed(a, 1)))
        assert ledger.event() == expected
    assert read_ledger(tmp_path / "x").event() == expected


def test_recovered_lines_are_counted_apart() -> None:
    first = release_line(
        to_json(Gaussian(1.0)), index=1, step=3, previous="", writer="a", recovered=True
    )
    fields = json.loads(first)
    del fields["hash"]
    chain = verify(forged(fields), WHERE)
    assert chain.num_recovered == 1
    assert chain.num_releases == 1

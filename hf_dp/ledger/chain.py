"""Verification of a ledger's bytes, and what a torn last line counts for.

Only the last line can be torn by a crash, since every line is on the disk before the next is
begun. A torn line is a release that was about to be made: it is counted, so that a crash can
over-count by one but never under-count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dp.errors import ConfigurationError, LedgerCorruptError, LedgerError, explain
from hf_dp.events import NonPrivate, PrivacyEvent, SelfComposed, from_json, to_json
from hf_dp.ledger.entry import (
    FORMAT,
    NO_PREVIOUS,
    end_of_object,
    hash_fits,
    line_hash,
    new_writer,
    parse,
    release_line,
)


@dataclass(frozen=True)
class Chain:
    """A verified ledger.

    Attributes:
        header: the first line.
        lines: all whole lines, header first, without newlines.
        runs: every release in order, the torn one too; equal neighbours are counted together.
        last_step: global step of the last release (0 without one).
        num_recovered: how many releases were counted for a torn line in the past.
        tail: the bytes of a torn last line, or None.
    """

    header: Mapping[str, Any]
    lines: list[bytes]
    runs: tuple[SelfComposed, ...]
    last_step: int
    num_recovered: int
    tail: bytes | None

    @property
    def num_releases(self) -> int:
        """Whole releases plus the torn one, if any."""
        return len(self.lines) - 1 + (self.tail is not None)

    def repaired(self) -> bytes:
        """The whole file, with a full line, marked as recovered, in place of a torn one."""
        lines = self.lines
        if self.tail is not None:
            line = release_line(
                to_json(self.runs[-1].event),
                index=len(lines),
                step=self.last_step,
                previous=line_hash(lines[-1]),
                writer=new_writer(),
                recovered=True,
            )
            lines = [*lines, line]
        return b"\n".join([*lines, b""])


def verify(data: bytes, path: Path) -> Chain:
    """Check every line of a ledger against its hash, its predecessor and its place.

    Args:
        data: the whole file.
        path: named in error messages.

    Raises:
        LedgerCorruptError: if any line but a torn last one is damaged, with its number.
        LedgerError: if the ledger is sound but this version does not understand it.

    Guarantees:
        A release that was durably appended is counted, whatever happened to a later line.
    """
    lines = data.split(b"\n")
    tail: bytes | None = lines.pop() or None
    if tail is None and len(lines) > 1 and parse(lines[-1]) is None:
        tail = lines.pop()
    reader = _Reader(path)
    if not lines:
        raise reader.corrupt("is not a whole header")
    for line in lines:
        reader.take(line)
    if tail is not None:
        reader.take_torn(tail)
    runs = tuple(SelfComposed(event, count) for event, count in reader.runs)
    return Chain(reader.header, lines, runs, reader.step, reader.num_recovered, tail)


class _Reader:
    """Walks a ledger line by line; costs about 10 microseconds a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0
        self._previous = NO_PREVIOUS
        self._event_fields: Mapping[str, Any] | None = None
        self.header: Mapping[str, Any] = {}
        self.runs: list[tuple[PrivacyEvent, int]] = []
        self.step = 0
        self.num_recovered = 0

    def take(self, line: bytes) -> None:
        fields = self._checked(line)
        if self._number:
            self._take_release(fields)
        else:
            self._take_header(fields)
        self._previous = line_hash(line)
        self._number += 1

    def corrupt(self, problem: str) -> LedgerCorruptError:
        return LedgerCorruptError(
            explain(
                "Ledger.path",
                str(self._path),
                "an unbroken chain of entries",
                f"Line {self._number + 1} {problem}, so the count of releases is not certain.",
                "Restore the file from the copy in the newest checkpoint of this run.",
            )
        )

    def take_torn(self, tail: bytes) -> None:
        """Count a torn line: as itself if only its newline is missing, else as the last event."""
        end = end_of_object(tail)
        if not end:
            self._count(self._assumed_event())
        elif end == len(tail):
            self.take(tail)
        else:
            raise self.corrupt("goes on after the end of its entry")

    def _assumed_event(self) -> Mapping[str, Any]:
        if self._event_fields is not None:
            return _as_begun(self._event_fields)
        unknown = NonPrivate("the first release was torn and the header has no step_event")
        return self.header.get("step_event") or to_json(unknown)

    def _checked(self, line: bytes) -> dict[str, Any]:
        fields = parse(line)
        if not isinstance(fields, dict):
            raise self.corrupt("is not a JSON object")
        if not hash_fits(line, fields):
            raise self.corrupt("does not match its own hash")
        if fields.get("previous") != self._previous:
            raise self.corrupt("does not follow from the line before it")
        return fields

    def _take_header(self, fields: dict[str, Any]) -> None:
        if fields.get("kind") != "header":
            raise self.corrupt("is not a header")
        if fields.get("format") != FORMAT:
            raise self._unknown("format", fields.get("format"), str(FORMAT))
        if not isinstance(fields.get("run_id"), str):
            raise self.corrupt("has no run_id")
        self.header = fields

    def _take_release(self, fields: dict[str, Any]) -> None:
        kind = fields.get("kind")
        if kind == "header":
            raise self.corrupt("is a second header")
        if kind != "release":
            raise self._unknown("kind", kind, "'release'")
        if fields.get("index") != self._number:
            raise self.corrupt(f"is not release number {self._number}")
        if not isinstance(fields.get("step"), int) or not isinstance(fields.get("event"), dict):
            raise self.corrupt("lacks its step or its event")
        self._count(fields["event"])
        self.step = fields["step"]
        self.num_recovered += "recovered" in fields

    def _count(self, event_fields: Mapping[str, Any]) -> None:
        if event_fields == self._event_fields:
            event, count = self.runs[-1]
            self.runs[-1] = (event, count + 1)
        else:
            self.runs.append((self._event(event_fields), 1))
            self._event_fields = event_fields

    def _event(self, fields: Mapping[str, Any]) -> PrivacyEvent:
        try:
            return from_json(fields)
        except (ConfigurationError, TypeError, AttributeError) as error:
            raise LedgerError(f"{self._path}, line {self._number + 1}: {error}") from error

    def _unknown(self, field: str, value: object, expected: str) -> LedgerError:
        return LedgerError(
            explain(
                f"Ledger.{field}",
                value,
                expected,
                f"Line {self._number + 1} of {self._path} is intact but means nothing to this version.",
                "Read this ledger with the version of hf_dp that wrote it.",
            )
        )


def _as_begun(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The event of a whole pass in place of the event that only continues it: the dearer of the two."""
    if fields.get("type") == "Continued":
        begun: Mapping[str, Any] = fields["event"]
        return begun
    if fields.get("type") == "Composed":
        return {**fields, "events": [_as_begun(part) for part in fields["events"]]}
    return fields

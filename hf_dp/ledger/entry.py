"""One line of the ledger: strict JSON in one canonical form, chained to the line before.

The first line is the header, every other line is one release::

    {"created":..., "format":1, "hash":..., "kind":"header", "previous":"000...", "run_id":..., ...}
    {"event":{...}, "hash":..., "index":1, "kind":"release", "previous":..., "step":0, "writer":...}

No line says when it was written: how long a step took tells what was drawn.

``hash`` is the SHA-256 of the line's canonical JSON without ``hash`` (keys sorted, no spaces,
ASCII); ``previous`` is the SHA-256 of the whole previous line without its newline. Both rules stay
the same in every format, so that any version can tell a damaged ledger from one that it does not
understand. The chain shows damage and careless edits; it is no signature, and it cannot show that
whole lines are missing at the end.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final, NoReturn

from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import PrivacyEvent, from_json, to_json

FORMAT: Final = 1
NO_PREVIOUS: Final = "0" * 64
_OWN_HEADER_KEYS: Final = frozenset({"kind", "format", "run_id", "created", "previous", "hash"})


def canonical(fields: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON object; NaN and infinities have none."""
    text = json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def line_hash(line: bytes) -> str:
    """SHA-256 of a line without its newline, as the next line's ``previous`` holds it."""
    return sha256(line).hexdigest()


def seal(fields: Mapping[str, Any], previous: str) -> bytes:
    """The finished line, without its newline.

    Args:
        fields: what the line says.
        previous: ``line_hash`` of the line before it.
    """
    chained = {**fields, "previous": previous}
    return canonical({**chained, "hash": line_hash(canonical(chained))})


def header_line(given: Mapping[str, Any]) -> bytes:
    """The first line of a new run's ledger.

    Args:
        given: JSON values that describe the run (plan, population, versions). ``step_event`` is
            the JSON form of the event that one step of the plan releases; a first release whose
            line was torn is counted as that.

    Raises:
        ConfigurationError: if a key is the ledger's own, a value is not JSON, or ``step_event`` is
            not an event.
    """
    taken = sorted(_OWN_HEADER_KEYS & set(given))
    if taken:
        raise ConfigurationError(
            explain(
                "Ledger.header",
                taken,
                "only keys of your own",
                "The ledger writes these itself.",
                "Choose other names.",
            )
        )
    own = {
        "kind": "header",
        "format": FORMAT,
        "run_id": uuid.uuid4().hex,
        "created": _now(),
    }
    try:
        line = seal({**given, **own}, NO_PREVIOUS)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            explain(
                "Ledger.header",
                sorted(map(str, given)),
                "strict JSON values (no NaN, no infinity, no objects)",
                f"The header must be readable anywhere: {error}.",
                "Write numbers, strings, lists and mappings with string keys.",
            )
        ) from error
    if "step_event" in given:
        _check_step_event(given["step_event"])
    return line


def event_fields(event: PrivacyEvent) -> dict[str, Any]:
    """The JSON form of `event`, after checking that it can be read back.

    Raises:
        ConfigurationError: if what was written would not be read as the same event.
    """
    try:
        fields = to_json(event)
        readable = from_json(json.loads(canonical(fields))) == event
    except (ConfigurationError, TypeError, ValueError) as error:
        raise _unreadable(event) from error
    if not readable:
        raise _unreadable(event)
    return fields


def new_writer() -> str:
    """A name for one opening of a ledger.

    Two jobs that go on from copies of one ledger may release the same event at the same step in
    the same millisecond. Their lines must differ, or one release would be lost in a merge.
    """
    return secrets.token_hex(8)


def release_line(
    event: Mapping[str, Any],
    *,
    index: int,
    step: int,
    previous: str,
    writer: str,
    recovered: bool = False,
) -> bytes:
    """The line of release number `index` (from 1), made at the global step `step` by `writer`."""
    fields = {
        "kind": "release",
        "index": index,
        "event": event,
        "step": step,
        "writer": writer,
    }
    if recovered:
        fields["recovered"] = True
    return seal(fields, previous)


def parse(line: bytes) -> Any:
    """The JSON value that a line holds, or None where it holds none (a torn or damaged line)."""
    try:
        return _DECODER.decode(line.decode("ascii"))
    except (ValueError, RecursionError):
        return None


def end_of_object(line: bytes) -> int:
    """Where the JSON object that `line` begins with ends; 0 if it begins with none."""
    try:
        value, end = _DECODER.raw_decode(line.decode("ascii", "replace"))
    except (ValueError, RecursionError):
        return 0
    return end if isinstance(value, dict) else 0


def hash_fits(line: bytes, fields: Mapping[str, Any]) -> bool:
    """Whether `line`, which parses as `fields`, carries its own hash."""
    claimed = fields.get("hash")
    if not isinstance(claimed, str):
        return False
    # "kind" follows "hash" in every line, hence the comma. Cutting the hash out of the bytes as
    # they stand also notices what parsing forgives: spaces, order of keys, spelling of numbers.
    cut = line.replace(f'"hash":"{claimed}",'.encode(), b"", 1)
    return line_hash(cut) == claimed


def _check_step_event(fields: object) -> None:
    if not isinstance(fields, Mapping):
        raise ConfigurationError(
            explain(
                "Ledger.header['step_event']",
                type(fields).__name__,
                "the mapping that hf_dp.events.to_json gives for the event of one step",
                "A first release whose line is torn is counted as this.",
                "Pass to_json(plan.step_event).",
            )
        )
    from_json(fields)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _unreadable(event: object) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "Ledger.append.event",
            type(event).__name__,
            "an event of hf_dp.events with JSON values",
            "A release that cannot be read back from the ledger cannot be accounted for.",
            "Use the events of hf_dp.events, or add the new one to its EVENT_TYPES.",
        )
    )

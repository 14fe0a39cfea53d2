"""Lines: canonical, chained, strict JSON."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    Composed,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    PrivacyEvent,
    SelfComposed,
    from_json,
)
from hf_dp.ledger.entry import (
    canonical,
    end_of_object,
    event_fields,
    hash_fits,
    header_line,
    parse,
    release_line,
    seal,
)


def test_canonical_json_has_one_spelling() -> None:
    assert canonical({"b": 1, "a": [1.5, None, "é"]}) == b'{"a":[1.5,null,"\\u00e9"],"b":1}'


def test_a_line_can_be_checked_by_anyone_from_the_rule_in_the_docstring() -> None:
    line = seal({"kind": "release", "index": 1}, "ab" * 32)
    fields = json.loads(line)
    claimed = fields.pop("hash")
    rewritten = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert claimed == hashlib.sha256(rewritten.encode()).hexdigest()
    assert fields["previous"] == "ab" * 32
    assert hash_fits(line, json.loads(line))


@pytest.mark.parametrize("claimed", [None, 5, "0" * 64], ids=["absent", "number", "wrong"])
def test_a_line_without_its_own_hash_does_not_fit(claimed: object) -> None:
    line = canonical({"hash": claimed, "kind": "release"})
    assert not hash_fits(line, json.loads(line))


def test_a_nested_hash_does_not_disturb_the_line_s_own() -> None:
    line = header_line({"assets": {"hash": "1" * 64, "model": "tiny"}, "event": {"hash": "x"}})
    assert hash_fits(line, json.loads(line))


def test_other_spellings_of_the_same_values_do_not_fit() -> None:
    line = seal({"kind": "release", "index": 1, "event": {"sigma": 1.5}}, "0" * 64)
    for other in (
        line.replace(b'"sigma":1.5', b'"sigma": 1.5'),
        line.replace(b'"sigma":1.5', b'"sigma":1.50'),
        line + b"\r",
    ):
        assert other != line
        assert json.loads(other) == json.loads(line)
        assert not hash_fits(other, json.loads(other))


def test_the_header_names_its_run_format_and_time() -> None:
    first, second = (json.loads(header_line({"plan": {"x": 1}})) for _ in range(2))
    assert first["run_id"] != second["run_id"]
    assert len(bytes.fromhex(first["run_id"])) == 16
    assert first["kind"] == "header"
    assert first["format"] == 1
    assert first["previous"] == "0" * 64
    assert first["created"].endswith("+00:00")
    assert first["plan"] == {"x": 1}


@pytest.mark.parametrize("key", ["kind", "format", "run_id", "created", "previous", "hash"])
def test_a_header_cannot_take_the_ledger_s_own_keys(key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Ledger.header=\['{key}'\]: expected only keys"):
        header_line({key: "mine"})


endless: list[Any] = []
endless.append(endless)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, Path("x"), {1, 2}, {("a", 1): 2}, endless],
    ids=["nan", "inf", "path", "set", "tuple-key", "endless"],
)
def test_a_header_that_is_not_strict_json_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"Ledger.header=\['plan'\]: expected strict JSON"):
        header_line({"plan": value})


def test_a_header_whose_step_event_is_not_an_event_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"PrivacyEvent\.type"):
        header_line({"step_event": {"type": "Unheard"}})
    with pytest.raises(
        ConfigurationError, match=r"Ledger\.header\['step_event'\]='str': expected the mapping"
    ):
        header_line({"step_event": "Gaussian"})


@pytest.mark.parametrize(
    "event",
    [
        Gaussian(0.1 + 0.2),
        PoissonSampled(1 / 3, Gaussian(5e-324)),
        SelfComposed(Composed((Gaussian(1), NonPrivate("naïve 試し"))), 10**18),
        Composed(()),
    ],
    ids=["gaussian", "poisson", "nested", "empty"],
)
def test_an_event_survives_the_way_through_a_line(event: PrivacyEvent) -> None:
    line = release_line(event_fields(event), index=1, step=0, previous="0" * 64, writer="a")
    assert from_json(json.loads(line)["event"]) == event


@dataclass(frozen=True)
class Homemade(PrivacyEvent):
    strength: float


class NoDataclass(PrivacyEvent):
    pass


@pytest.mark.parametrize(
    "event",
    [
        Homemade(1.0),
        NoDataclass(),
        Composed([Gaussian(1.0)]),  # type: ignore[arg-type]
        NonPrivate(Path("x")),  # type: ignore[arg-type]
        NonPrivate(["read back", "as a tuple"]),  # type: ignore[arg-type]
        NonPrivate(math.nan),  # type: ignore[arg-type]
    ],
    ids=["foreign", "no-dataclass", "events-list", "path", "list", "nan"],
)
def test_an_event_that_cannot_be_read_back_is_refused(event: PrivacyEvent) -> None:
    with pytest.raises(ConfigurationError, match=r"Ledger\.append\.event=.*read back"):
        event_fields(event)


def test_parse_accepts_strict_json_only() -> None:
    assert parse(b'{"a":1}') == {"a": 1}
    for damaged in (b"", b'{"a":NaN}', b'{"a":1', b'{"a":"\xc3\xa9"}', b"\x00" * 9, b"[" * 10**6):
        assert parse(damaged) is None


def test_end_of_object_tells_a_torn_line_from_a_whole_one() -> None:
    assert end_of_object(b'{"a":1}') == 7
    assert end_of_object(b'{"a":1}\x0b{"b":2}') == 7
    assert end_of_object(b'{"a":1}\xff') == 7
    for torn in (b"", b'{"a":1', b"7", b"\x00\x00", b"\xc3", b"[" * 10**6):
        assert end_of_object(torn) == 0

"""The benchmark of per-user clipping measures sums that are right."""

from __future__ import annotations

from benchmarks.user_step import TINY, crowds, measure


def test_every_way_of_clipping_is_measured_and_right() -> None:
    rows = measure(TINY[0], rounds=1)
    names = {row["variant"] for row in rows}
    assert names == {"plain", "sequential, 8 rows a user", *crowds(TINY[0])}
    errors = [row["error"] for row in rows if row["variant"] in crowds(TINY[0])]
    assert len(errors) == len(crowds(TINY[0]))
    assert max(errors) < 1e-5

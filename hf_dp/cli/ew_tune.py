"""``hf-dp ew-tune``: published noise, with the epsilon that was claimed and the one that holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hf_dp.cli.options import AsJson
from hf_dp.cli.paper import paper

if TYPE_CHECKING:
    from hf_dp.cli.published_noise import Recomputed


def ew_tune(*, as_json: AsJson = False) -> None:
    """Recompute EW-Tune's noise multipliers (arXiv 2210.15042) and certify what they guarantee."""
    from hf_dp.cli.published_noise import recomputed

    rows = list(recomputed())
    if as_json:
        from hf_dp.cli.answer import show_json

        show_json({"rows": [dataclasses.asdict(row) for row in rows]})
    else:
        _show(rows)


def _show(rows: list[Recomputed]) -> None:
    from rich.table import Table

    from hf_dp.accounting.shown import rounded_up

    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    heads = (
        "delta",
        "claimed",
        "certified",
        "noise in logs",
        "recomputed",
        "PLD",
        "PRV",
        "RDP",
        "saved",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row.task,
            f"{row.delta:g}",
            f"{row.claimed:.2f}",
            f"[bold]{rounded_up(row.certified, digits=4)}[/bold]",
            f"{row.recorded_noise:g}",
            f"{row.edgeworth_noise:.4f}",
            f"{row.pld_noise:.4f}",
            f"{row.prv_noise:.4f}",
            f"{row.rdp_noise:.4f}",
            f"{row.real_saving_to_rdp:.1%}",
        )
    worst = max(rows, key=lambda row: row.certified)
    best = max(rows, key=lambda row: row.claimed_saving)
    console = paper()
    console.print(table)
    console.print(
        "Epsilon: claimed by the first-order Edgeworth estimate, and certified (a proven upper bound) at the "
        "noise multiplier of the released logs. Then the noise for the claimed epsilon: that estimate's, "
        "recomputed, and that of three accountants that prove it. Saved: noise by PLD against RDP.",
        soft_wrap=True,
    )
    console.print(
        f"{worst.task} at delta = {worst.delta:g}: claimed {worst.claimed:.2f}, certified "
        f"{rounded_up(worst.certified)}. Of the {best.claimed_saving:.1%} less noise than PRV that "
        f"the estimate promises there, {best.real_saving:.1%} is real; the rest is missing privacy. (The "
        "runs drew shuffled batches, for which neither number holds: both are for Poisson sampling.)",
        soft_wrap=True,
    )

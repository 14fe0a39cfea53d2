"""``hf-dp report``: what a finished, running or killed run has guaranteed so far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_dp.cli.options import AsJson


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Output directory or checkpoint of a run, with its ledger.")
    ],
    *,
    accountant: Annotated[
        str | None,
        typer.Option(help="Another accountant than the run's own: 'pld', 'edgeworth' or 'rdp'."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the guarantee of everything that a run released, read from its ledger."""
    from hf_dp.cli.answer import show_json
    from hf_dp.reports.report import PrivacyReport

    found = PrivacyReport.from_ledger(run_dir, accountant=accountant)
    if as_json:
        show_json(found.to_json())
    else:
        typer.echo(str(found))

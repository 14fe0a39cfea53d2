"""``hf-dp explain``: how a model's gradients would be clipped, and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hf_dp.cli.options import AsJson
from hf_dp.cli.paper import paper

if TYPE_CHECKING:
    from hf_dp.engines.explain import EngineReport


_WIDE = 110  # columns of a terminal that has room for the module's type


def explain(
    model: Annotated[
        str,
        typer.Argument(help="Folder with config.json, or a name on the Hub; weights are not read."),
    ],
    *,
    length: Annotated[int, typer.Option(help="Tokens of an example, > 1.", min=2)] = 128,
    engine: Annotated[
        str, typer.Option(help="'auto', 'book_keeping', 'two_pass' or 'sequential'.")
    ] = "auto",
    head: Annotated[
        str | None,
        typer.Option(help="A class of transformers, such as AutoModelForSequenceClassification."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print, parameter by parameter, which rule clips it, in which form, and what that costs."""
    from hf_dp.training.explaining import explain_configuration

    report = explain_configuration(model, engine=engine, length=length, head=head)
    if as_json:
        from hf_dp.cli.answer import show_json

        show_json(report.to_json())
    else:
        _show(report)


def _show(report: EngineReport) -> None:
    from rich.table import Table

    head, *rows = report.cells()
    at = "" if report.length is None else f" at length {report.length}"
    table = Table(
        title=f"engine {report.engine}{at}", title_justify="left", box=None, pad_edge=False
    )
    console = paper()
    shown = [i for i, name in enumerate(head) if name != "module" or console.width >= _WIDE]
    for name in (head[i] for i in shown):
        named = name == "parameters"  # the only column that may be broken
        table.add_column(name, overflow="fold", no_wrap=not named, min_width=16 if named else None)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    console.print(report.summary, soft_wrap=True)

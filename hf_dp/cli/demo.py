"""``hf-dp demo``: a private run on a real model and real text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def demo(
    *,
    target_epsilon: Annotated[float, typer.Option(help="The most to spend, > 0.")] = 8.0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where model, ledger and curves go; a new folder under runs/ if not given."
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option(help="Also write what was reached to this file.")
    ] = None,
) -> None:
    """Fine-tune a real encoder on real reviews with privacy, in a few minutes on two cores."""
    from hf_dp.demo.run import main as run_demo

    outcome = run_demo(target_epsilon, output_dir)
    if json_out is not None:
        facts = {
            "accuracy": outcome.accuracy,
            "majority_share": outcome.majority_share,
            "epsilon": outcome.epsilon,
            "seconds": outcome.seconds,
            "output_dir": str(outcome.output_dir),
        }
        json_out.write_text(json.dumps(facts) + "\n")

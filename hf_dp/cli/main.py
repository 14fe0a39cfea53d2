"""The program ``hf-dp``: subcommands, and what becomes of an error."""

from __future__ import annotations

import sys

import typer

from hf_dp.cli.batch_size import batch_size
from hf_dp.cli.compare import compare
from hf_dp.cli.demo import demo
from hf_dp.cli.epsilon import epsilon
from hf_dp.cli.ew_tune import ew_tune
from hf_dp.cli.explain import explain
from hf_dp.cli.lmo_dp import lmo_dp
from hf_dp.cli.noise import noise
from hf_dp.cli.plan_users import plan_users
from hf_dp.cli.report import report
from hf_dp.cli.search_noise import search_noise
from hf_dp.cli.steps import steps
from hf_dp.cli.tuning import tuning
from hf_dp.errors import HfDpError

app = typer.Typer(
    name="hf-dp",
    help="Differentially private fine-tuning with the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    epsilon,
    noise,
    search_noise,
    steps,
    batch_size,
    plan_users,
    tuning,
    compare,
    ew_tune,
    lmo_dp,
    report,
    explain,
    demo,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the program; an error of hf_dp is a sentence on stderr and exit code 2."""
    try:
        app()
    except HfDpError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)

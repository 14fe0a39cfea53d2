"""``hf-dp compare``: epsilon against steps by every accountant, bounds and estimates apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_dp.cli.options import AsJson, Delta, NoiseMultiplier, NumSteps, SamplingProbability
from hf_dp.cli.paper import paper
from hf_dp.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from hf_dp.accounting import Accountant

_POINTS = 12
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Line:
    """One accountant's numbers.

    Attributes:
        name: Of the accountant.
        kind: 'upper bound', 'lower bound' or 'estimate'.
        epsilons: One for each number of steps; None where there is none.
    """

    name: str
    kind: str
    epsilons: list[float | None]


def compare(
    *,
    sampling_probability: SamplingProbability,
    noise_multiplier: NoiseMultiplier,
    num_steps: NumSteps,
    delta: Delta,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw epsilon against steps into this .png, .svg or .pdf file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print epsilon after more and more steps by every accountant."""
    if plot is not None:
        _check_plot(plot)
    steps = _counts(num_steps)
    lines = _lines(sampling_probability, noise_multiplier, steps, delta)
    if as_json:
        from hf_dp.cli.answer import show_json

        rows = [{"accountant": x.name, "kind": x.kind, "epsilons": x.epsilons} for x in lines]
        show_json({"num_steps": steps, "delta": delta, "lines": rows})
    else:
        _show(steps, lines)
    if plot is not None:
        _draw(plot, steps, lines, delta)


def _counts(num_steps: int) -> list[int]:
    """About equally spaced numbers of steps, on a logarithmic scale, that end at `num_steps`."""
    first = max(1, num_steps // 1000)
    ratio = num_steps / first
    counts = {round(first * ratio ** (i / (_POINTS - 1))) for i in range(_POINTS)}
    return sorted(counts)


def _lines(
    sampling_probability: float, noise_multiplier: float, steps: list[int], delta: float
) -> list[Line]:
    from hf_dp.accounting import ACCOUNTANTS, ESTIMATORS
    from hf_dp.cli.run import PoissonRun

    def answers(accountant: Accountant) -> list[tuple[float | None, float | None, float | None]]:
        found = (
            accountant.guarantee(
                PoissonRun(sampling_probability, count, noise_multiplier).event(), delta=delta
            )
            for count in steps
        )
        return [
            (one.lower, one.epsilon if math.isfinite(one.epsilon) else None, one.estimate)
            for one in found
        ]

    lines = []
    for name, make in {**ACCOUNTANTS, **ESTIMATORS}.items():
        columns = zip(*answers(make()), strict=True)
        for kind, epsilons in zip(("lower bound", "upper bound", "estimate"), columns, strict=True):
            if any(one is not None for one in epsilons):
                lines.append(Line(name, kind, list(epsilons)))
    return lines


def _show(steps: list[int], lines: list[Line]) -> None:
    from rich.table import Table

    from hf_dp.accounting.shown import rounded_down, rounded_up

    table = Table(box=None, pad_edge=False)
    table.add_column("steps", justify="right")
    for line in lines:
        table.add_column(f"{line.name}\n{line.kind}", justify="right")
    for index, count in enumerate(steps):
        cells = []
        for line in lines:
            value = line.epsilons[index]
            if value is None:
                cells.append("-")
            elif line.kind == "upper bound":
                cells.append(rounded_up(value))
            else:
                cells.append(f"≈{value:.4g}" if line.kind == "estimate" else rounded_down(value))
        table.add_row(str(count), *cells)
    console = paper()
    console.print(table)
    console.print(
        "Upper bounds are proven; lower bounds too: no smaller epsilon holds. Estimates (≈) bound nothing.",
        soft_wrap=True,
    )


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in _FORMATS:
        raise ConfigurationError(
            explain(
                "compare.plot",
                str(path),
                f"a name that ends in one of {', '.join(_FORMATS)}",
                "It says in which format to draw.",
                "Use for example --plot epsilon.svg.",
            )
        )
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(
            explain(
                "compare.plot",
                str(path),
                "a file in a folder that exists",
                "The plot could not be kept.",
                f"Make the folder {path.parent} first.",
            )
        )
    try:
        import matplotlib  # noqa: F401  # asked for before minutes are spent
    except ImportError:
        raise ConfigurationError(
            explain(
                "compare.plot",
                str(path),
                "matplotlib to be installed",
                "It draws the plot; the table needs nothing more.",
                "Run `pip install matplotlib`, or leave --plot out.",
            )
        ) from None


def _draw(path: Path, steps: list[int], lines: list[Line], delta: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {"upper bound": "-", "lower bound": "--", "estimate": ":"}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        values = [math.nan if one is None else one for one in line.epsilons]
        axes.plot(
            steps,
            values,
            styles[line.kind],
            color=f"C{names.index(line.name)}",
            marker="o" if line.kind == "upper bound" else None,
            markersize=3,
            label=f"{line.name}: {line.kind}",
        )
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"epsilon at delta = {delta:g}")
    axes.legend(fontsize="small")
    figure.savefig(path)

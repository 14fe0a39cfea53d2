"""The report in a model card: a line below its title, and a section at its end."""

from __future__ import annotations

import re

from hf_dp.accounting.shown import rounded_up
from hf_dp.reports.report import PrivacyReport

_FRONT_MATTER = "\n---\n"
_TITLE = re.compile(r"^# .*$", re.MULTILINE)


def with_privacy(card: str, report: PrivacyReport) -> str:
    """A model card with the claim below its title, if it has one, and the section at its end."""
    body = max(card.find(_FRONT_MATTER), 0) if card.startswith("---\n") else 0
    title = _TITLE.search(card, body)
    if title is not None:
        claim = f"Differential privacy: {_headline(report)} See [below](#differential-privacy)."
        card = f"{card[: title.end()]}\n\n{claim}{card[title.end() :]}"
    return f"{card}\n{privacy_section(report)}"


def _headline(report: PrivacyReport) -> str:
    guarantee = report.guarantee
    if not report.is_private:
        return f"**NOT PRIVATE** ({report.why_not_private})."
    if not guarantee.is_upper_bound:
        return "**No proven bound.**"
    return (
        f"**ε ≤ {rounded_up(guarantee.epsilon)} at δ = {rounded_up(guarantee.delta)}**, "
        f"for each {guarantee.unit} ({guarantee.accountant} accountant, a proven upper bound)."
    )


def privacy_section(report: PrivacyReport) -> str:
    """Markdown that states the guarantee, what it rests on and what it leaves out."""
    secret = "; no seed brings draws or noise back" if report.is_private else ""
    rows = {
        "Neighbouring data sets": report.neighbors,
        **{name.capitalize(): f"`{text}`" for name, text in report.parts().items()},
        "Releases": f"{report.num_releases} of {report.header['plan']['num_steps']} planned",
        "Population": f"{report.header.get('population_size')} {report.guarantee.unit}s",
        "Randomness": f"{report.header.get('coins')}{secret}",
        "Ledger": f"run `{report.run_id}`, hash chain intact",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    notes = "\n".join(f"- {caveat}" for caveat in report.caveats())
    return (
        "## Differential privacy\n\n"
        f"This model was fine-tuned with hf_dp. {_headline(report)}\n\n"
        f"| | |\n|---|---|\n{table}\n\n{notes}\n"
    )

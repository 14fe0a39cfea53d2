"""The report as a section of a model card."""

from __future__ import annotations

from hf_dp.accounting.shown import rounded_up
from hf_dp.reports.report import PrivacyReport


def privacy_section(report: PrivacyReport) -> str:
    """Markdown that states the guarantee, what it rests on and what it leaves out."""
    guarantee = report.guarantee
    headline = (
        f"**ε ≤ {rounded_up(guarantee.epsilon)} at δ = {rounded_up(guarantee.delta)}**, "
        f"for each {guarantee.unit} ({guarantee.accountant} accountant, a proven upper bound)."
        if guarantee.is_upper_bound
        else "**No proven bound.**"
    )
    if not report.is_private:
        headline = f"**NOT PRIVATE** ({report.why_not_private})."
    rows = {
        "Neighbouring data sets": report.neighbors,
        **{name.capitalize(): f"`{text}`" for name, text in report.parts().items()},
        "Releases": f"{report.num_releases} of {report.header['plan']['num_steps']} planned",
        "Population": f"{report.header.get('population_size')} {guarantee.unit}s",
        "Ledger": f"run `{report.run_id}`, hash chain intact",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    notes = "\n".join(f"- {caveat}" for caveat in report.caveats())
    return (
        "## Differential privacy\n\n"
        f"This model was fine-tuned with hf_dp. {headline}\n\n"
        f"| | |\n|---|---|\n{table}\n\n{notes}\n"
    )

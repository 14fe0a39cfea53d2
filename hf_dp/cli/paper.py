"""Where the commands print their tables and sentences."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 160  # columns of a file or a pipe, where no table needs to be cut


def paper() -> Console:
    """The terminal; elsewhere something wide, and without colours."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)

"""An ``Explanation`` as a table for the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..explain import Add, Explanation

__all__ = ["table"]

WIDTH = 160


def table(explanation: Explanation, *, width: int = WIDTH) -> str:
    """The accepted adds by chain, then the rejected ones."""
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    summary = (
        f"{explanation.model}: {len(explanation.sites)} sites in {len(explanation.chains)} chains, "
        f"n = {explanation.n}; {len(explanation.rejected)} adds rejected"
    )
    grid = Table(title=summary, title_justify="left")
    for name in ("", "add", "chain", "width", "why", "where"):
        grid.add_column(name, overflow="fold", no_wrap=name in ("", "chain", "width"))
    for add in explanation.sites:
        grid.add_row("+", add.name, str(add.chain), str(add.width), add.reason, _where(add))
    for add in explanation.rejected:
        grid.add_row("-", add.name, "", "", str(add.reason), _where(add))
    console.print(grid)
    return console.export_text().rstrip()


def _where(add: Add) -> str:
    """The last two parts of the path are enough to find the file."""
    return "/".join(add.location.split("/")[-2:])

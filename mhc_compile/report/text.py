"""An ``Explanation`` as text for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..explain import Add, Explanation

__all__ = ["by_reason", "summary", "table", "where"]

WIDTH = 100


def table(explanation: Explanation, *, width: int = WIDTH) -> str:
    """The accepted adds in the order of the forward, then the rejected ones by reason.

    Args:
        explanation: what to print.
        width: columns of the terminal; longer names are folded, never cut.
    """
    text = io.StringIO()
    # Names hold brackets (``layers[0]``), which rich would read as markup.
    console = Console(
        file=text, width=width, color_system=None, markup=False, emoji=False, highlight=False
    )
    longest = max((len(add.name) for add in (*explanation.sites, *explanation.rejected)), default=0)
    names = min(longest, width // 2)
    console.print(summary(explanation))
    if explanation.sites:
        console.print("\naccepted")
        rows = [("+", a.name, f"C = {a.width}", a.reason, where(a)) for a in explanation.sites]
        console.print(_grid(rows, names))
    for reason, adds in by_reason(explanation.rejected).items():
        console.print(f"\nrejected: {reason}")
        console.print(_grid([("-", add.name, where(add)) for add in adds], names))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def summary(explanation: Explanation) -> str:
    """One line: how many adds were accepted and rejected."""
    sites, chains = len(explanation.sites), len(explanation.chains)
    return (
        f"{explanation.model}: {_count(sites, 'site')} in {_count(chains, 'chain')}, "
        f"n = {explanation.n}; {_count(len(explanation.rejected), 'add')} rejected"
    )


def by_reason(adds: Iterable[Add]) -> dict[str, list[Add]]:
    """Adds with the same reason together, in the order of first appearance."""
    groups: dict[str, list[Add]] = {}
    for add in adds:
        groups.setdefault(str(add.reason), []).append(add)
    return groups


def where(add: Add) -> str:
    """The last two parts of the path: enough to find the file."""
    return "/".join(add.location.split("/")[-2:])


def _grid(rows: Iterable[tuple[str, ...]], names: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    for position, row in enumerate(rows):
        if position == 0:
            for column in range(len(row)):
                grid.add_column(overflow="fold", min_width=names if column == 1 else None)
        grid.add_row(*row)
    return grid


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

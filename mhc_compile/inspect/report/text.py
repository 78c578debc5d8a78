"""The adds of a model as text for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from ..records import Add, Adds

__all__ = ["by_reason", "summary", "table", "where"]

WIDTH = 100


def table(explanation: Adds, *, width: int = WIDTH) -> str:
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
        rows: list[tuple[str, ...]] = [
            ("+", a.name, f"C = {a.width}", a.reason, where(a)) for a in explanation.sites
        ]
        console.print(_grid(rows, names, width))
    for reason, adds in by_reason(explanation.rejected).items():
        console.print(f"\nrejected: {reason}")
        rows = [("-", add.name, *_detail(add), where(add)) for add in adds]
        console.print(_grid(rows, names, width))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def summary(explanation: Adds) -> str:
    """One line: how many adds were accepted and rejected."""
    sites, chains = len(explanation.sites), len(explanation.chains)
    whose = " of its own" if explanation.own else ""
    return (
        f"{explanation.model}: {_count(sites, 'site')}{whose} in {_count(chains, 'chain')}, "
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


def _detail(add: Add) -> tuple[str, ...]:
    """A cell for what differs, if the reason alone does not say it."""
    return (add.detail,) if add.detail else ()


def _grid(rows: Sequence[tuple[str, ...]], names: int, width: int) -> Table:
    """Rows of which long words are folded before names are, and places never."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sizes[1] = names
    words, room = len(sizes) - 2, width - 2 * len(sizes)
    if words > 1 and sum(sizes) > room:
        sizes[1] = min(names, max(map(len, (row[1] for row in rows))), width // 3)
        sizes[words] = max(room - sum(sizes) + sizes[words], 16)
    grid = Table.grid(padding=(0, 2))
    for size in sizes:
        grid.add_column(overflow="fold", width=size)
    for row in rows:
        grid.add_row(*row)
    return grid


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

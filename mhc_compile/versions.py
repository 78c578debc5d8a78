"""The versions that this package is tested with; nowhere else are they listed.

``make versions`` runs the tests on them and writes docs/versions.md. The bounds and classifiers
of pyproject.toml repeat their ends (a test compares). No imports of other libraries: the script
reads this file in a Python that has none.
"""

from __future__ import annotations

import re
import warnings

__all__ = ["PYTHON", "TORCH", "TRANSFORMERS", "warn_of_untested"]

TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
"""Oldest first, the last release of each minor version; constraints.txt pins one of them."""

TRANSFORMERS = ("5.0.0", "5.23.0", "5.24.0")
"""The oldest that pyproject.toml allows, the one that constraints.txt pins, the newest."""

PYTHON = ("3.11", "3.12", "3.13")


def warn_of_untested(torch_version: str) -> None:
    """Warn where torch is newer than the newest one tested.

    Most of what can break are names of torch that are not public (``_torch.py``), and they do not
    change within a minor version: a newer 2.14.x does not warn.
    """
    if _minor(torch_version) > _minor(TORCH[-1]):
        warnings.warn(
            f"mhc_compile is tested with torch {TORCH[0]} to {TORCH[-1]}; this is torch "
            f"{torch_version}. It may work as well: run the tests of its repository "
            "(tests/test_torch.py says which names of torch have gone), or install an older torch.",
            stacklevel=3,
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

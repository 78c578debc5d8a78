"""Autocast off and on again, as nodes of a graph (public torch API only)."""

from __future__ import annotations

import torch
from torch.fx.node import has_side_effect

__all__ = ["enter_autocast_off", "exit_autocast"]


@has_side_effect
def enter_autocast_off(device_type: str) -> torch.autocast:
    """Enter a region in which autocast is off for one device type."""
    mode = torch.autocast(device_type, enabled=False)
    mode.__enter__()
    return mode


@has_side_effect
def exit_autocast(mode: torch.autocast) -> None:
    """Leave the region entered by ``enter_autocast_off``."""
    mode.__exit__(None, None, None)

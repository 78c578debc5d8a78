"""The errors that passes raise: each says what, where and what to do."""

from __future__ import annotations

__all__ = ["ChainBrokenError", "MhcError", "UnsupportedError"]


class MhcError(RuntimeError):
    """Base class of every error raised by mhc_compile itself (bad arguments raise ValueError)."""


class ChainBrokenError(MhcError):
    """A captured graph holds only a part of a chain, or declared parameters without their site."""


class UnsupportedError(MhcError):
    """A construct that the library does not support (for example torch.export of a model)."""

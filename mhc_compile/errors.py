"""Every error of the library: each says what, where and what to do.

Those that passes raise stand with the passes, and can be imported from here as well.
"""

from __future__ import annotations

from .passes.errors import ChainBrokenError, MhcError, UnsupportedError

__all__ = [
    "CaptureError",
    "ChainBrokenError",
    "CheckError",
    "CheckpointError",
    "DoubleTransformError",
    "ExampleInputsError",
    "GraphBreakError",
    "MhcError",
    "NoSitesError",
    "NotCapturedError",
    "NotTransformedError",
    "UnsupportedError",
]


class NoSitesError(MhcError):
    """The model has no chain of at least two residual adds."""


class GraphBreakError(MhcError):
    """Dynamo split the model between two residual adds of one stream."""


class CaptureError(MhcError):
    """Dynamo could not capture the model at all."""


class ExampleInputsError(MhcError):
    """The example inputs do not fit the model, or none were given where they are needed."""


class DoubleTransformError(MhcError):
    """The model, or a part of it, is transformed already."""


class NotTransformedError(MhcError):
    """The operation needs a model that was transformed."""


class NotCapturedError(MhcError):
    """A transformed module ran as plain Python, outside every captured graph."""


class CheckpointError(MhcError):
    """A saved mHC state does not fit the model."""


class CheckError(MhcError):
    """``Check.raise_for_problems``: a transformed model is not as it should be."""

"""The one family of errors of the library: each says what, where and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ChainBrokenError",
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


class MhcError(RuntimeError):
    """Base class of every error raised by mhc_compile itself (bad arguments raise ValueError)."""


class NoSitesError(MhcError):
    """The model has no chain of at least two residual adds."""


class GraphBreakError(MhcError):
    """Dynamo split the model between two residual adds of one stream."""


class ChainBrokenError(MhcError):
    """A captured graph holds only a part of a chain, or declared parameters without their site."""


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


class UnsupportedError(MhcError):
    """A construct that the library does not support (for example torch.export of a model)."""


class CheckError(MhcError):
    """``Check.raise_for_problems``: a transformed model is not as it should be."""

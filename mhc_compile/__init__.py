"""mhc_compile: turn any residual PyTorch model into an mHC model (arXiv:2512.24880)."""

import torch

from . import versions

# Before the other imports: one of them may fail for want of a name that a newer torch has not.
versions.warn_of_untested(torch.__version__)

# ruff: noqa: E402
from . import backend  # noqa: F401 - what transformed modules call
from .compiler.history import RewrittenGraph, graphs
from .config import Config
from .errors import MhcError
from .inspect.check import Check, check
from .inspect.explain import Explanation, explain
from .passes.sites.records import Reason
from .persistence import load, save
from .pretrained import from_pretrained
from .transform import parameters, revert, transform

__all__ = [
    "Check",
    "Config",
    "Explanation",
    "MhcError",
    "Reason",
    "RewrittenGraph",
    "check",
    "explain",
    "from_pretrained",
    "graphs",
    "load",
    "parameters",
    "revert",
    "save",
    "transform",
]

__version__ = "0.1.0"

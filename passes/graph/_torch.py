"""The private torch names of the passes; the package has its own such file."""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher

__all__ = ["enable_python_dispatcher"]

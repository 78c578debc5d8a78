"""What the classes of transformed modules call, and what stands above this room.

``backend`` and ``pretrained`` fill these in when they are imported; the package imports both, so
that nothing is missing when a model is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

eager: Callable[..., Any]
"""The backend of plain calls."""

mhc: Callable[..., Any]
"""The backend of compiled calls."""

check_options: Callable[..., None]
"""Refuses options of ``mhc`` that contradict how a model was transformed."""

save_pretrained_of: Callable[..., Any]
"""Hugging Face's ``save_pretrained`` for a transformed class, made of that of the plain one."""

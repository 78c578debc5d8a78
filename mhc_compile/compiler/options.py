"""Options of ``torch.compile(..., backend="mhc", options=...)``: ours and Inductor's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import _torch
from ..config import Config

__all__ = ["agreed", "check_options", "split_options"]


def check_options(options: Mapping[str, Any] | None, declared: Config) -> None:
    """Refuse options that a model transformed with ``declared`` cannot be compiled with.

    Raises:
        ValueError: an option is unknown, out of range, or contradicts ``declared``.
    """
    agreed(split_options(options or {}, None)[0], declared)


def split_options(
    options: Mapping[str, Any], mode: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of this library and options of Inductor."""
    own = {k: v for k, v in options.items() if k in Config.__dataclass_fields__}
    patches = _torch.inductor_options(mode)
    for name, value in options.items():
        if name in own:
            continue
        if not _torch.is_inductor_option(name):
            raise ValueError(
                f"backend 'mhc': unknown option {name!r}; options are the fields of "
                f"mhc_compile.Config ({', '.join(Config.__dataclass_fields__)}) and Inductor's"
            )
        patches[name.replace("-", "_")] = value
    return own, patches


def agreed(own: Mapping[str, Any], declared: Config) -> Config:
    """``declared``, which options given for a transformed model must not contradict.

    How much of the history is kept is no matter of the model: there the option counts.
    """
    asked = replace(declared, **own)
    for name in own:
        if name != "history" and getattr(asked, name) != getattr(declared, name):
            raise ValueError(
                f"backend 'mhc': options[{name!r}] = {getattr(asked, name)!r}, but the model was "
                f"transformed with {getattr(declared, name)!r}; leave the option out, or call "
                "mhc_compile.revert and transform the model again"
            )
    return asked

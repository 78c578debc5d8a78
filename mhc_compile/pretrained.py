"""Hugging Face's folders: ``save_pretrained`` of a transformed model, and ``from_pretrained``.

``save_pretrained`` writes what the model's class writes, the mHC parameters among the weights, and
``mhc_config.json`` beside them. ``from_pretrained`` of the class builds a plain model from such a
folder; the function here builds that, transforms it and loads what the plain one has no place for.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from .errors import CheckpointError, UnsupportedError
from .model import callbacks
from .persistence import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Saved,
    describe,
    read,
    restore,
    stored_names,
    tensors_of,
    write_config,
    write_weights,
)

__all__ = ["from_pretrained", "save_pretrained_of"]


def from_pretrained(
    cls: Any, folder: str | PathLike[str], *, example_inputs: Any = None, **kwargs: Any
) -> Any:
    """The transformed model that ``model.save_pretrained(folder)`` wrote.

    Args:
        cls: what gives the plain model: ``AutoModelForCausalLM``, ``LlamaForCausalLM``, ...
        folder: what ``save_pretrained`` of a transformed model wrote, or a Trainer's checkpoint;
            one file of weights or several. A folder on this machine.
        example_inputs: as for ``mhc_compile.transform``; rarely needed here.
        **kwargs: for ``cls.from_pretrained`` (``dtype``, ``device_map``, ``variant``, ...). The
            mHC parameters are float32 whatever the ``dtype`` is, with the digits that were saved.

    Returns:
        The model, transformed as it was; with ``output_loading_info=True`` a pair of it and the
        report of ``cls.from_pretrained``, without the names of mHC parameters.

    Raises:
        ValueError: ``cls`` has no ``from_pretrained``.
        CheckpointError: the folder has no ``mhc_config.json``, lacks weights, or its sites are
            not those of the model that ``cls`` builds of it.
    """
    if not hasattr(cls, "from_pretrained"):
        raise ValueError(f"from_pretrained needs a class with from_pretrained, got {cls!r}")
    place = Path(folder)
    inside = place / (kwargs.get("subfolder") or "")
    if not (inside / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"from_pretrained: {inside} has no {CONFIG_FILE}; give the folder that save_pretrained "
            "of a transformed model wrote (of a model on the hub, the folder that "
            f"huggingface_hub.snapshot_download returns). For a plain one: {_name(cls)}."
            "from_pretrained, then mhc_compile.transform."
        )
    saved = read(inside, kwargs.get("variant"))
    with _without_our_rows():
        loaded = cls.from_pretrained(folder, **kwargs)
    model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
    restore(model, _renamed(saved, model), example_inputs=example_inputs)
    if not report:
        return model
    unexpected = report[0]["unexpected_keys"]
    report[0]["unexpected_keys"] = type(unexpected)(k for k in unexpected if not _OURS.search(k))
    return (model, *report)


def _name(cls: Any) -> str:
    return getattr(cls, "__name__", type(cls).__name__)


def _renamed(saved: Saved, model: nn.Module) -> Saved:
    """What was saved, under the names that a model with or without a head has for it.

    A language model keeps its base as ``model``; the base alone has no such prefix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {name for name, _ in model.named_modules()}
    for rename in (str, lambda name: name.removeprefix(prefix), lambda name: prefix + name):
        weights = {rename(name): tensor for name, tensor in saved.weights.items()}
        if all(_owner(name) in paths for name in weights):
            return replace(saved, sites=[rename(name) for name in saved.sites], weights=weights)
    return saved


def _owner(name: str) -> str:
    """The path of the module that owns a parameter of ours."""
    return f".{name}".rpartition(".mhc.")[0].removeprefix(".")


# --- the report of transformers -------------------------------------------------------------------

_OURS = re.compile(r"(^|\.)mhc\.([^.|]+\.(phi|alpha|bias)|_extra_state)\s*($|\|.*UNEXPECTED)")
_ROW = re.compile(r"\|.*(UNEXPECTED|MISSING|MISMATCH|CONVERSION)")


@contextmanager
def _without_our_rows() -> Iterator[None]:
    """Leave mHC parameters out of the table of weights that found no place: they will."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_drop_our_rows)
    try:
        yield
    finally:
        logger.removeFilter(_drop_our_rows)


def _drop_our_rows(record: logging.LogRecord) -> bool:
    lines = record.getMessage().split("\n")
    kept = [line for line in lines if not _OURS.search(line)]
    if len(kept) == len(lines):
        return True
    record.msg, record.args = "\n".join(kept), ()
    return any(_ROW.search(line) for line in kept)


# --- save_pretrained ------------------------------------------------------------------------------


def save_pretrained_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """``save_pretrained`` of a class, for its transformed instances."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = {**call.arguments.get("kwargs", {}), **call.arguments}
        if given.get("push_to_hub"):
            raise UnsupportedError(
                f"save_pretrained(push_to_hub=True) would upload the folder before {CONFIG_FILE} "
                "is in it: call save_pretrained(folder), then model.push_to_hub(name)."
            )
        described = describe(self, "save_pretrained")
        result = original(self, *args, **kwargs)
        if given.get("is_main_process", True):
            folder = Path(given["save_directory"])
            _complete(self, folder, given.get("variant"), given.get("state_dict") or {})
            write_config(described, folder)
        return result

    return save_pretrained


callbacks.save_pretrained_of = save_pretrained_of


def _complete(self: nn.Module, folder: Path, variant: str | None, state: dict[str, Any]) -> None:
    """Write the mHC weights into a file of their own if the folder lacks some.

    transformers saves many models under the names of their first release, and a name of ours
    that contains one of theirs is changed along; a model with adapters saves only those.
    """
    tensors = {name: state.get(name, own) for name, own in tensors_of(self).items()}
    if tensors.keys() <= stored_names(folder, variant).keys():
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # of an earlier save
    else:
        write_weights(tensors, folder)

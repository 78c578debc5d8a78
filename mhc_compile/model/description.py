"""What a state dict says of the function that its mHC parameters belong to.

Equal shapes do not make equal functions: φ, α and b of `mhc` fit into `hc`, and 20 iterations look
like 10. Each container `<owner>.mhc` therefore puts one entry into the state dict, its *extra
state* in PyTorch's words, under `<owner>.mhc._extra_state`: canonical JSON, one character to an
element of an int32 tensor.

A tensor, because safetensors, `save_pretrained`, DDP and torch.distributed.checkpoint carry nothing
else. Not a buffer, because those are averaged, cast and moved with a model. int32, because people
average state dicts: the sum of a few equal entries, divided, is the entry again, where uint8 would
have wrapped around. Padded, because torch.distributed.checkpoint loads into tensors of the size
that the model has now, and would complain about sizes where we can say what differs.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from .._torch import FakeTensor

__all__ = ["decode", "differences", "encode"]

FORMAT = 1
PADDED_TO = 256


def encode(description: dict[str, Any]) -> Tensor:
    """A description (JSON values) as an int32 tensor on the CPU, whatever the default device is."""
    content = {"format": FORMAT, **description}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    length = -(-len(text) // PADDED_TO) * PADDED_TO
    return torch.tensor(list(text.ljust(length).encode("ascii")), dtype=torch.int32, device="cpu")


def decode(entry: Any) -> dict[str, Any] | None:
    """The description in an entry; None for a tensor that has no values (meta, fake).

    Casts of the state dict to another dtype are undone: all characters are below 128.

    Raises:
        ValueError: it is no such entry, or one of a newer format.
    """
    if not isinstance(entry, Tensor):
        raise ValueError(f"it is a {type(entry).__name__}, not a tensor")
    if entry.is_meta or isinstance(entry, FakeTensor):
        return None
    codes = entry.detach().to("cpu", torch.float64).flatten().round().long().tolist()
    description = json.loads(bytes(codes).decode("ascii"))
    if not isinstance(description, dict):
        raise ValueError("it holds no JSON object")
    if (found := description.pop("format", None)) != FORMAT:
        raise ValueError(f"it has format {found}, this version of mhc-compile reads {FORMAT}")
    return description


def differences(saved: dict[str, Any], own: dict[str, Any]) -> str | None:
    """In what a checkpoint's description and a model's own differ, and what to do; None if equal.

    Both hold options by name, and under "sites" the role of each site by its branch.
    """
    names = sorted((saved.keys() | own.keys()) - {"sites"})
    if options := [name for name in names if saved.get(name) != own.get(name)]:
        wanted = ", ".join(f"{k}={saved[k]!r}" for k in options if k in saved)
        return (
            f"the checkpoint has {_listed(saved, options)}, this model has "
            f"{_listed(own, options)}; transform the plain model with Config({wanted}) to load it"
        )
    theirs, ours = saved.get("sites", {}), own.get("sites", {})
    sites = [
        f"site {name!r} is {_role(theirs, name)} in the checkpoint, {_role(ours, name)} in this "
        "model"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if sites:
        return (
            f"{'; '.join(sites)}; transform a plain model of the same architecture, with the "
            "same include and exclude, to load it"
        )
    return None


def _listed(description: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{k}={description[k]!r}" if k in description else f"no {k}" for k in names)


def _role(sites: dict[str, str], name: str) -> str:
    if name not in sites:
        return "no n-stream site"
    return "inside its chain" if sites[name] == "inside" else f"{sites[name]} in its chain"

"""The parameter modules: one `Connection` per site, one `Head` per learned readout.

They hold parameters and compute nothing: the rewritten graph does. Where they hang is part of
their meaning: on the module that owns the add, as `<owner>.mhc.<branch>.phi | alpha | bias`.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import CheckpointError
from . import description, initial

EXACT_DTYPES = (torch.float32, torch.float64)
LARGEST_N_NAMED = 64
"""How far to search for the n of a checkpoint when an error names it."""
_LEFT_OUT = re.compile(r"\b_(checkpoint|fsdp)_wrapped_module\.")
"""Names of wrappers that leave themselves out of a state dict, but not out of `named_modules`."""
ENTRY = "_extra_state"
"""PyTorch's name for what `get_extra_state` adds to a state dict."""


class StreamParameters(nn.Module):
    """Parameters that stay float32 (float64 in a float64 model) whatever the model is cast to.

    The coefficients of mHC are computed in float32 in a model of any dtype (arXiv:2512.24880,
    §4.3). A cast of the model must therefore not touch them, not even by way of bfloat16 and back.
    """

    gates: int
    """Number of scalars in alpha."""

    phi: nn.Parameter
    alpha: nn.Parameter
    bias: nn.Parameter

    witness: Any = None
    """Of a ``Connection``: a weight of its branch, by which ``guard`` sees whether that ran."""

    def __init__(
        self,
        width: int,
        config: Config,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Allocate phi [n * width, columns], alpha [gates], bias [columns]; values come later."""
        super().__init__()
        if dtype not in EXACT_DTYPES:
            raise ValueError(f"mHC parameters are float32 or float64, not {dtype}")
        if config.n < 2:
            raise ValueError(f"n={config.n} has no mHC parameters: the residual stays as it is")
        self.width = width
        self.config = config
        # A model may see its first call, and so get its parameters, under inference_mode.
        with torch.inference_mode(False):
            for name, shape in self._shapes(config.n).items():
                values = torch.empty(shape, dtype=dtype, device=device)
                self.register_parameter(name, nn.Parameter(values))

    def _columns(self, n: int) -> int:
        """Columns of phi for n streams. Raises ValueError where n is impossible."""
        raise NotImplementedError

    def _shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        columns = self._columns(n)
        return {"phi": (n * self.width, columns), "alpha": (self.gates,), "bias": (columns,)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StreamParameters":
        def exact(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype in EXACT_DTYPES:
                return applied
            # From `tensor`, not from `applied`: its digits are gone. The device is as asked.
            return tensor.to(device=applied.device, dtype=torch.float32)

        super()._apply(exact, recurse)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if problem := self.why_not(state_dict, prefix):
            # Instead of torch's three messages about shapes, which do not mention n.
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
            return
        for key in self._keys(state_dict, prefix).values():  # assign=True takes them as they are
            if state_dict[key].dtype not in EXACT_DTYPES:
                state_dict[key] = state_dict[key].float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _keys(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, str]:
        return {name: prefix + name for name in self._parameters if prefix + name in state_dict}

    def why_not(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why this module cannot load what a state dict has for it; None if it can."""
        keys = self._keys(state_dict, prefix)
        return self._mismatch({k: tuple(state_dict[key].shape) for k, key in keys.items()})

    def _mismatch(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why parameters of these shapes cannot be loaded; None if they can."""
        own = self._shapes(self.config.n)
        if all(shape == own[name] for name, shape in shapes.items()):
            return None
        if n := self._streams_of(shapes):
            return (
                f"the checkpoint has n={n} streams, this model has n={self.config.n}; transform "
                f"the plain model with n={n} to load it"
            )
        return (
            f"the checkpoint has {dict(shapes)}, this model has {own} "
            f"(n={self.config.n}, width {self.width}, variant {self.config.variant!r}); "
            f"transform a plain model of the same width with the configuration it was saved with"
        )

    def _streams_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The n for which this module would have these shapes, if there is one."""
        for n in range(2, LARGEST_N_NAMED + 1):
            with suppress(ValueError):
                if shapes.items() <= self._shapes(n).items():
                    return n
        return None

    def extra_repr(self) -> str:
        return f"n={self.config.n}, width={self.width}, variant={self.config.variant!r}"


class Connection(StreamParameters):
    """The mHC parameters of one site (arXiv:2512.24880, eq. 14-19).

    phi `[n * width, columns]`, columns in the order pre | post | res; alpha `[3]`, one gate per
    group; bias `[columns]`. For `mhc` there are n² + 2n columns.

    Args:
        width: C, the size of the channel axis of the stream.
        config: n, variant, init, alpha_init and spread are read.
        index: position of the site in its chain, from 0. Neighbours start differently.
        linear: whether all operations between the sites of the chain are linear stream by stream;
            only then may streams differ at the start without changing what the model computes.
        last: whether the streams are read out behind the site.
        dtype: float32, or float64 for a float64 model.
        device: where; "meta" allocates nothing, `to_empty` and `reset_parameters` follow.

    Raises:
        ValueError: for n < 2, another dtype, or a variant that cannot have this n.
    """

    gates = 3

    def __init__(
        self,
        width: int,
        config: Config,
        *,
        index: int,
        linear: bool,
        last: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(width, config, dtype=dtype, device=device)
        self.index = index
        self.linear = linear
        self.last = last
        self.reset_parameters()

    @property
    def role(self) -> str:
        """The place of the site in its chain: streams start before the first, end at the last."""
        first = ["first"] if self.index == 0 else []
        return " and ".join([*first, *(["last"] if self.last else [])]) or "inside"

    def reset_parameters(self) -> None:
        """Set the initial values of `Config.init`.

        `paper` draws phi from torch's random state; `preserve` draws nothing, so that a
        transformed model sees the same random numbers as the plain one.
        """
        if std := initial.phi_std(self.config):
            nn.init.normal_(self.phi, std=std)
        else:
            nn.init.zeros_(self.phi)
        nn.init.constant_(self.alpha, self.config.alpha_init)
        with torch.no_grad():
            self.bias.copy_(initial.bias(self.config, index=self.index, linear=self.linear))

    def _columns(self, n: int) -> int:
        variant = self.config.variant_object
        variant.check(n)
        return sum(variant.columns(n))


class Head(StreamParameters):
    """The parameters of a learned readout: stream weights σ(α · (x⃗ φ) / r + b).

    phi `[n * width, n]`, alpha `[1]`, bias `[n]`. The weights start at 1/n, the mean. After the
    readout of DeepSeek-V4. Arguments and errors as for `Connection`.
    """

    gates = 1

    def __init__(
        self,
        width: int,
        config: Config,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(width, config, dtype=dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to 1/n, for every stream and token."""
        nn.init.zeros_(self.phi)
        nn.init.constant_(self.alpha, self.config.alpha_init)
        with torch.no_grad():
            self.bias.copy_(initial.head_bias(self.config.n))

    def _columns(self, n: int) -> int:
        return n


class Connections(nn.Module):
    """The container `owner.mhc`: parameter modules by the name of their branch.

    `owner.mhc["self_attn"]` is `owner.mhc.self_attn`. A branch that is called like an attribute of
    `nn.Module` ("type", "forward") gets a trailing underscore: `owner.mhc["type"]` is
    `owner.mhc.type_`, and "type_" is `type__`, so that no two branches meet.

    Its state dict has one entry more than its parameters, `_extra_state`: which function they
    belong to (see `description`). Loading refuses an entry that differs from the module's own.
    """

    def __setitem__(self, branch: str, module: StreamParameters) -> None:
        self.add_module(self.key(branch), module)

    def __getitem__(self, branch: str) -> nn.Module:
        return self.get_submodule(self.key(branch))

    def __contains__(self, branch: str) -> bool:
        return self.key(branch) in self._modules

    def key(self, branch: str) -> str:
        """The attribute under which the parameters of a branch stand."""
        stem = branch.rstrip("_")
        taken = hasattr(type(self), stem) or stem in self.__dict__
        return f"{branch}_" if taken else branch

    def tensors(self) -> list[nn.Parameter]:
        """All parameters in the order of registration, three to a module (traced by Dynamo)."""
        return [p for m in self._modules.values() for p in (m.phi, m.alpha, m.bias)]  # type: ignore[union-attr,misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Connections":
        """Copied alone (PEFT does that), its sites are known by the weights of the same model."""
        if not memo:
            known = (m.witness for m in self.modules() if isinstance(m, Connection))
            memo |= {id(w.module): w.module for w in known if w is not None}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    # --- state dicts ---------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """What the parameters mean, as `description.encode` writes it."""
        return description.encode(self._description())

    def set_extra_state(self, state: Any) -> None:
        """Nothing is taken over: `_load_from_state_dict` has compared it already."""

    def _description(self) -> dict[str, Any]:
        sites = {k: m for k, m in self._modules.items() if isinstance(m, Connection)}
        if not sites:
            return {"sites": {}}
        config = next(iter(sites.values())).config
        iterations = config.variant_object.iterations
        return {
            "n": config.n,
            "variant": config.variant,
            **({"sinkhorn_iters": iterations} if iterations else {}),
            "eps": config.eps,
            "readout": config.readout,
            "sites": {name: module.role for name, module in sites.items()},
        }

    def why_not(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why this container cannot load what a state dict has for it; None if it can."""
        if (entry := state_dict.get(prefix + ENTRY)) is not None:
            try:
                saved = description.decode(entry)
            except ValueError as error:
                return f"its entry '{ENTRY}' in the checkpoint cannot be read: {error}"
            if saved is not None and (found := description.differences(saved, self._description())):
                return found
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        refuse_other_state(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # What is missing from a plain checkpoint are the parameters.
        if prefix + ENTRY in missing_keys:
            missing_keys.remove(prefix + ENTRY)
            if any(key.startswith(prefix) for key in state_dict):
                _warn_once(missing_keys)


def refuse_other_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Raise before anything is loaded, if a state dict belongs to another function.

    Args:
        model: the module that is about to load.
        state_dict: what it is given.
        prefix: what stands in front of the module's own names in the state dict.

    Raises:
        CheckpointError: parameters or entries do not fit those of a part of the model.
    """
    if problem := why_not_loaded(dict(model.named_modules()), state_dict, prefix):
        raise CheckpointError(f"{type(model).__name__}: {problem}")


def why_not_loaded(
    modules: Mapping[str, nn.Module], state_dict: Mapping[str, Any], prefix: str = ""
) -> str | None:
    """In what a state dict does not fit modules, by their paths; None if it fits all of them."""
    problems: dict[str, list[str]] = {}
    refused: tuple[str, ...] = ()
    for path, module in modules.items():
        if isinstance(module, Connections | StreamParameters) and not path.startswith(refused):
            name = f"{path}." if path else ""
            for known in {name, _LEFT_OUT.sub("", name)}:
                if problem := module.why_not(state_dict, prefix + known):
                    problems.setdefault(problem, []).append(path)
                    refused += (name,)  # the shapes inside differ because the function does
                    break
    return "; ".join(f"{_places(paths)}{what}" for what, paths in problems.items()) or None


def _places(paths: list[str]) -> str:
    if paths == [""]:
        return ""
    return f"{paths[0]}: " if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more: "


_warned_in: list[str] | None = None


def _warn_once(missing_keys: list[str]) -> None:
    """One warning for a load: PyTorch hands the same list to every module that takes part."""
    global _warned_in
    if _warned_in is not missing_keys:
        _warned_in = missing_keys
        warn_of_old_state()


def warn_of_old_state() -> None:
    """Say that a checkpoint cannot be compared with the model."""
    warnings.warn(
        "The checkpoint does not say which function its mHC parameters belong to (an older "
        "mhc-compile wrote it): n, variant, sinkhorn_iters, eps, readout and chains are taken to "
        "be those of the model. Save the model again, and it will say so.",
        stacklevel=3,
    )

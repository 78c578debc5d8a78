"""The options of a transformation, validated in one place.

A `Config` is immutable and hashable, so that it can be part of cache keys, and goes through JSON,
so that it can be kept next to the weights it describes.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from .kernels.variants import VARIANTS, Variant, get_variant
from .passes.pipeline import EVERY
from .passes.runner import Tier

INITS = ("preserve", "paper")
READOUTS = ("mean", "sum", "head")
HISTORIES = ("notes", "full")
STREAM_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """How a residual model becomes an n-stream mHC model.

    "Paper" is arXiv:2512.24880, C the width of a site.

    Args:
        n: number of residual streams. Default 4 (paper §5). The residual stream takes n times the
            memory; n² + 2n coefficients are computed per token and site. 1 rewrites nothing.
        variant: how the coefficients are parametrised: `mhc` (the paper), `deepseek_v4`, `hc`
            (arXiv:2409.19606), `mhc_lite`, `kromhc`, `identity`, or, for experiments, `low_rank`
            (H_res = I + U Vᵀ, rank 1). Default `mhc`. Costs nC times the variant's number of
            columns in parameters per site.
        sinkhorn_iters: column and row normalisations of H_res, for `mhc` and `deepseek_v4`.
            Default 20 (paper §4.2). Fewer are cheaper and less doubly stochastic.
        eps: added to mean(x⃗²) under the root of the norm. Default 1e-6, of the order usual in
            transformers; the paper's own models use 1e-20. Free.
        alpha_init: first value of the three gates α. Default 0.01 (paper, appendix A). Free.
        init: `preserve` computes exactly what the original model computes until the first step of
            training; `paper` starts from the published values and does not preserve. Default
            `preserve`. Free.
        spread: size of the differences between streams that `preserve` starts with on chains that
            pass through a non-linear operation stream by stream (post-norm, a ReLU behind the
            add). Default 0: exact. A value d in (0, 1) costs an output error of order d² and lets
            H_res learn from the first step; 1e-2 suits post-norm transformers.
        readout: streams to one at the end of a chain: `mean` (default; preserves), `sum` (n times
            the mean: preserves only where a normalisation follows) or `head` (weights learned from
            the streams, as DeepSeek-V4 does; starts as the mean; n(nC + 1) + 1 parameters a
            readout).
        stream_dtype: dtype of the streams, a name or a `torch.dtype`; None (default) keeps the
            model's. "float32" in a bf16 model keeps small updates and doubles the stream's bytes.
        defer_norms: compute `linear(rms_norm(x), W)` as `linear(x, W) / r` for the model's own
            RMSNorms too, where nothing but matmuls reads them (the mapping of mHC always is).
            Default False: outputs then change by rounding (in bfloat16 about as much as any other
            order of operations; float16 norms are kept, as they could overflow), a norm's weight
            is multiplied into each W at every call, and each product is kept for backward.
        include: patterns (`fnmatch`) over site names; a site is taken if one of them matches.
            Default ("*",): every site. Free.
        exclude: patterns over site names that are left as plain residuals. Default (): none.
        disabled: names of passes that are not run. Default (): none. For finding out which pass
            is responsible for something.
        history: what `mhc_compile.graphs` keeps of each pass: "notes" (default: with times and
            operators, a few kB a graph) or "full", the code of every version and the graph as it
            was captured as well (megabytes for large models). Changes no graph, and is not saved.

    Raises:
        ValueError: for a value that is out of range, of the wrong type, or impossible together
            with the variant. The message says what was given and what is possible.
    """

    n: int = 4
    variant: str = "mhc"
    sinkhorn_iters: int = 20
    eps: float = 1e-6
    alpha_init: float = 0.01
    init: str = "preserve"
    spread: float = 0.0
    readout: str = "mean"
    stream_dtype: str | torch.dtype | None = None
    defer_norms: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    history: str = field(default="notes", compare=False)

    def __post_init__(self) -> None:
        _check_count("n", self.n, "the number of residual streams, for example n=4")
        _check_count("sinkhorn_iters", self.sinkhorn_iters, "the paper uses 20")
        _check_choice("variant", self.variant, VARIANTS)
        _check_choice("init", self.init, INITS)
        _check_choice("readout", self.readout, READOUTS)
        _check_choice("history", self.history, HISTORIES)
        _check_switch("defer_norms", self.defer_norms)
        for name in ("eps", "alpha_init"):
            _check_real(name, getattr(self, name), low=0.0, strict=True)
        _check_real("spread", self.spread, low=0.0, high=1.0)
        for name in ("eps", "alpha_init", "spread"):
            self._set(name, float(getattr(self, name)))
        self._set("stream_dtype", _dtype_name(self.stream_dtype))
        for name in ("include", "exclude", "disabled"):
            self._set(name, _strings(name, getattr(self, name)))
        _check_passes(self.disabled)
        if self.n > 1:
            self.variant_object.check(self.n)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def variant_object(self) -> Variant:
        """The description of the variant, with this configuration's iterations bound."""
        return get_variant(self.variant, sinkhorn_iters=self.sinkhorn_iters)

    @property
    def stream_torch_dtype(self) -> torch.dtype | None:
        """`stream_dtype` as a dtype; None where streams keep the model's."""
        return None if self.stream_dtype is None else getattr(torch, str(self.stream_dtype))

    def to_json(self) -> str:
        """This configuration as a JSON object; `from_json` gives back an equal one."""
        return json.dumps(asdict(self), indent=2)

    def meaning(self) -> dict[str, Any]:
        """The options that change graphs or parameters: what is saved, and the key of caches."""
        return {
            option.name: getattr(self, option.name) for option in fields(self) if option.compare
        }

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Read what `to_json` wrote. Options left out have their defaults.

        Raises:
            ValueError: if the text is not a JSON object, names an option that does not exist, or
                holds a value that `Config` refuses.
        """
        options = json.loads(text)
        if not isinstance(options, dict):
            raise ValueError(f"Config: expected a JSON object, got {type(options).__name__}")
        known = {option.name for option in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"Config: unknown option(s) {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}. A newer mhc-compile may have written this."
            )
        return cls(**options)


def _check_count(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Config: {name} must be a positive integer, got {value!r} ({hint})")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"Config: {name} must be True or False, got {value!r}")


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"Config: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_real(
    name: str, value: object, *, low: float, high: float = math.inf, strict: bool = False
) -> None:
    """Require low <= value < high (low < value if strict)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (low < value if strict else low <= value) and value < high:  # type: ignore[operator]
        return
    bounds = f"{'greater than' if strict else 'at least'} {low:g}"
    if high < math.inf:
        bounds += f" and less than {high:g}"
    raise ValueError(f"Config: {name} must be a number {bounds}, got {value!r}")


def _check_passes(disabled: tuple[str, ...]) -> None:
    known = [step.name for step in EVERY]
    if unknown := [name for name in disabled if name not in known]:
        raise ValueError(
            f"Config: disabled names no pass: {', '.join(unknown)}; passes are {', '.join(known)}"
        )
    if required := [p.name for p in EVERY if p.name in disabled and p.tier is Tier.REQUIRED]:
        others = ", ".join(p.name for p in EVERY if p.tier is not Tier.REQUIRED)
        raise ValueError(
            f"Config: {', '.join(required)} cannot be disabled: without it a model would run its "
            "plain residuals. To leave sites out use exclude, to leave mHC mhc_compile.revert. "
            f"Optimisations, which can be disabled, are {others}"
        )


def _dtype_name(value: object) -> str | None:
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if name is None or (isinstance(name, str) and name in STREAM_DTYPES):
        return name
    raise ValueError(
        f"Config: stream_dtype must be None or one of {', '.join(STREAM_DTYPES)} "
        f"(a name or a torch.dtype), got {value!r}"
    )


def _strings(name: str, value: object) -> tuple[str, ...]:
    """A tuple of strings from one string or from several."""
    # A lone string is iterable too: without this, exclude="*.mlp" would be five patterns.
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"Config: {name} must be a string or a list of strings, got {value!r}")
    return tuple(items)

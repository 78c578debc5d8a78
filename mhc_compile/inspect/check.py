"""``check``: what a careful user would do by hand with a transformed model, in one call.

At the start a transformed model computes what the plain one does; so would a model of which
nothing was rewritten. The same model therefore runs in turn

    plain      every module with its original class: nothing of this library takes part
    start      n-stream, with the mHC parameters at the values that preserve the function
    perturbed  n-stream, with random mHC parameters: now the streams differ and count
    compiled   the same through ``backend="mhc"`` and Inductor

each time from the same random state, and gets everything back that a run has changed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..compiler.history import RewrittenGraph, graphs
from ..errors import CheckError, MhcError, NotCapturedError, NotTransformedError
from ..model import initial, swap
from ..model.connection import Connection, Connections, StreamParameters
from ..model.declare import Spec
from ..model.pending import is_pending

__all__ = ["Check", "Step", "check"]

SIGMA = 0.5
"""Standard deviation of what is added to the mHC parameters."""

PARTS, LEAVES = ("pre", "post", "res"), ("phi", "alpha", "bias")


@dataclass(frozen=True)
class Step:
    """One thing that was checked.

    Attributes:
        claim: what was to be shown.
        holds: whether it was.
        found: what was measured, in words; the reason where it does not hold.
        seconds: how long it took.
    """

    claim: str
    holds: bool
    found: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """What ``mhc_compile.check`` found. Prints as a table; true if all is well.

    Attributes:
        model: the model's class name.
        n: number of streams.
        sites: names of the sites that have parameters.
        steps: what was checked, in order. A step that fails ends the check.
        notes: what is no mistake but worth knowing, such as sites that did not run in this call.
    """

    model: str
    n: int
    sites: Sequence[str]
    steps: Sequence[Step] = field(repr=False)
    notes: Sequence[str] = field(repr=False)

    @property
    def ok(self) -> bool:
        return all(step.holds for step in self.steps)

    @property
    def problems(self) -> list[str]:
        """One sentence for each claim that does not hold."""
        return [f"Not shown: {s.claim}. {s.found}" for s in self.steps if not s.holds]

    def __bool__(self) -> bool:
        return self.ok

    def raise_for_problems(self) -> None:
        """Do nothing if all is well.

        Raises:
            CheckError: with all problems.
        """
        if not self.ok:
            raise CheckError(f"{self.model}: {' '.join(self.problems)}")

    def __str__(self) -> str:
        verdict = "all is well" if self.ok else "NOT WELL"
        lines = [f"{self.model}: {len(self.sites)} sites, n = {self.n}: {verdict}"]
        width = max(len(step.claim) for step in self.steps)
        for s in self.steps:
            mark = "+" if s.holds else "-"
            lines.append(f"{mark}  {s.claim:{width}}  {s.found}  ({s.seconds:.1f} s)")
        return "\n".join([*lines, *(f"   note: {note}" for note in self.notes)])


def check(model: nn.Module, *args: Any, skip_compiled: bool = False, **kwargs: Any) -> Check:
    """Run a transformed model in several ways and say whether all of it is as it should be.

    - At the start its outputs are those of the plain model.
    - With all mHC parameters perturbed its outputs move: they are those of n streams.
    - Every group of every site's parameters (φ, α and b of the pre, post and res mapping) then has
      a gradient; but for H_res of the first site of each chain, in front of which all streams are
      equal.
    - Compiled by ``backend="mhc"``, outputs and gradients are the same.

    The model is left as it was: parameters, ``.grad``, buffers, random states, mode, compiled
    calls. (One that still waits for its first call is transformed by this one.) A model of a few
    layers takes seconds, nearly all of them Inductor's: ``skip_compiled=True`` leaves that out.

    Args:
        model: a transformed model, or a module that holds one.
        skip_compiled: whether to leave out the compiled run; the report notes it.
        *args, **kwargs: what its forward takes, on its device. The outputs must hold tensors of
            floating point that depend on the streams; dicts, lists, tuples and dataclasses are
            looked into. Outputs are compared in units of the precision at which the model computes:
            relative errors up to the square root of its machine epsilon are rounding.

    Raises:
        NotTransformedError: nothing in the model is transformed.

    Whatever the model's forward raises on these inputs is raised as it is, errors of this library
    are problems in what is returned.
    """
    model = _torch.unwrapped(model)
    if is_pending(model):
        with torch.no_grad():
            model(*args, **kwargs)
    if not _sites(model):
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC parameters: call mhc_compile.transform(model) "
            "first (n=1 adds none); if it was transformed, they were deleted"
        )
    return _Checking(model, args, kwargs).run(skip_compiled)


class _Failed(Exception):
    """A claim that does not hold, and why."""


@dataclass
class _Site:
    """A module of mHC parameters, and which of its groups have nothing to learn."""

    name: str
    module: StreamParameters
    idle: frozenset[str]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def groups(self, gradients: Mapping[Tensor, Tensor | None]) -> dict[str, Tensor | None]:
        """The gradients of its groups by name, such as ``phi_pre``."""
        found = [gradients[p] for p in self.parameters]
        if not isinstance(self.module, Connection):
            return dict(zip(LEAVES, found, strict=True))
        columns = list(self.module.config.variant_object.columns(self.module.config.n))
        groups: dict[str, Tensor | None] = {}
        for leaf, gradient in zip(LEAVES, found, strict=True):
            sizes = [1, 1, 1] if leaf == "alpha" else columns
            parts = [None] * 3 if gradient is None else gradient.split(sizes, dim=-1)
            groups |= {
                f"{leaf}_{part}": value
                for part, value, size in zip(PARTS, parts, columns, strict=True)
                if size  # H_res of the variant `identity` has no numbers
            }
        return groups


class _Checking:
    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.sites = _sites(model)
        self.parameters = [p for site in self.sites for p in site.parameters]
        self.config = self.sites[0].module.config
        self.notes: list[str] = []
        self.steps: list[Step] = []
        self.precision = 0.0

    def run(self, skip_compiled: bool) -> Check:
        with _everything_kept(self.model, self.parameters):
            with swap.plainly(self.model):
                self.plain = self._outputs(self.model)
            claims: list[tuple[str, Callable[[], str]]] = [
                ("parameters are trained", self._trained),
                ("at the start equal to the plain model", self._start),
                ("perturbed, the outputs move", self._moves),
                ("every group of every site has a gradient", self._gradients),
                ("compiled, outputs and gradients are the same", self._compiled),
            ]
            if skip_compiled:
                claims.pop()
                self.notes.append("the compiled call was left out")
            for claim, show in claims:
                if not self._holds(claim, show):
                    break
        names = [s.name for s in self.sites if isinstance(s.module, Connection)]
        return Check(type(self.model).__name__, self.config.n, names, self.steps, self.notes)

    def _holds(self, claim: str, show: Callable[[], str]) -> bool:
        start, holds = time.perf_counter(), True
        try:
            found = show()
        except _Failed as failed:
            holds, found = False, str(failed)
        except MhcError as error:
            holds, found = False, f"{type(error).__name__}: {error}"
        self.steps.append(Step(claim, holds, found, time.perf_counter() - start))
        return holds

    # --- the claims -----------------------------------------------------------------------------

    def _trained(self) -> str:
        frozen = [s.name for s in self.sites if not all(p.requires_grad for p in s.parameters)]
        if frozen:
            raise _Failed(
                f"requires_grad is False for those of {_named(frozen)}: they stay as they are, and "
                "so do the streams. Call p.requires_grad_() for p in mhc_compile.parameters(model) "
                "(PEFT freezes them: LoraConfig(modules_to_save=['mhc']))."
            )
        if broken := [s.name for s in self.sites if not all(map(_is_finite, s.parameters))]:
            raise _Failed(
                f"Those of {_named(broken)} hold values that are not finite. Were they ever given "
                "any (a model from the meta device)? reset_parameters() of each gives the first."
            )
        count = sum(p.numel() for p in self.parameters)
        return f"{count:,} numbers, finite, all of which require a gradient"

    def _start(self) -> str:
        for site in self.sites:
            _set_to_start(site.module)
        outputs = self._outputs(self.model)
        self.precision = max(self.precision, _precision_within(self.model))
        self.start = _distance(outputs, self.plain)
        if self.config.readout == "sum":
            self.notes.append(
                "readout='sum' starts at n times the plain stream, which only a norm behind it "
                "takes back: outputs at the start were not compared"
            )
            return "not compared"
        # The variants that add eps inside their normalisations are off by it at every site.
        allowed = self.precision**0.5 + len(self.sites) * self.config.eps
        if not self.start <= allowed:
            raise _Failed(f"Outputs differ by {self.start:.1e} (relative; allowed {allowed:.1e}).")
        return f"difference {self.start:.1e} (relative; allowed {allowed:.1e})"

    def _moves(self) -> str:
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters:
            p.data += SIGMA * torch.randn(p.shape, generator=generator).to(p.data)
        self.outputs, self.gradients = self._run(self.model, self.parameters)
        moved = _distance(self.outputs, self.plain)
        if not moved > max(10 * self.start, 4 * self.precision):
            raise _Failed(f"They move by {moved:.1e} only. {self._why_not_moved()}")
        return f"by {moved:.1e} (relative)"

    def _why_not_moved(self) -> str:
        graph = _last_graph(self.model)
        alive = {s.name for s in graph.sites if not s.excluded} if graph is not None else set()
        if len(alive) == sum(isinstance(s.module, Connection) for s in self.sites):
            return (
                "All sites are n-stream in the captured graph, but the model scales what its "
                "branches add to nothing or nearly so (LayerScale at its first values, a norm "
                "that starts at zero), so nothing can be shown: give it trained weights."
            )
        return "This call computes plain residuals."

    def _gradients(self) -> str:
        unused = [s for s in self.sites if all(self.gradients[p] is None for p in s.parameters)]
        ran = self._ran(unused) if unused else set()
        skipped = [s.name for s in unused if s.name not in ran]
        missing, counted = [], 0
        for site in self.sites:
            if site.name in skipped:
                continue
            groups = {k: g for k, g in site.groups(self.gradients).items() if k not in site.idle}
            counted += len(groups)
            missing += [
                f"{site.name}: {name}"
                for name, g in groups.items()
                if g is None or not bool(g.isfinite().all()) or not bool(g.any())
            ]
        if missing:
            raise _Failed(
                f"{_named(missing)}: no gradient, or not a finite one. Their residuals are plain "
                "in this call, or what they add does not reach the outputs."
            )
        if skipped:
            self.notes.append(f"these sites did not run in this call: {_named(skipped)}")
        return f"{counted} groups of {len(self.sites) - len(skipped)} sites"

    def _compiled(self) -> str:
        compiled = torch.compile(
            self.model, backend="mhc", options={"fallback_random": True}, **_torch.own_cache()
        )
        try:
            with _torch.dynamo_settings():
                outputs, gradients = self._run(compiled, self.parameters)
        except MhcError:
            raise
        except Exception as error:
            inner = error.inner_exception if hasattr(error, "inner_exception") else error
            raise _Failed(f"{type(inner).__name__}: {_torch.first_paragraph(inner)}") from error
        found, allowed = _distance(outputs, self.outputs), self.precision**0.5
        if not found <= allowed:
            raise _Failed(f"Outputs differ by {found:.1e} (relative; allowed {allowed:.1e}).")
        apart = _distance(*(
            [torch.cat([_or_zeros(g[p], p).flatten() for p in self.parameters])]
            for g in (gradients, self.gradients)
        ))  # fmt: skip
        if not apart <= 10 * allowed:
            raise _Failed(
                f"Gradients of the mHC parameters differ by {apart:.1e} (relative; allowed "
                f"{10 * allowed:.1e})."
            )
        return f"difference {found:.1e}, of gradients {apart:.1e} (relative)"

    # --- running the model ----------------------------------------------------------------------

    def _outputs(self, called: Callable[..., Any]) -> list[Tensor]:
        with _buffers_kept(self.model), torch.no_grad():
            return [t.detach().clone() for t in self._call(called)]

    def _run(
        self, called: Callable[..., Any], parameters: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[Tensor, Tensor | None]]:
        """Outputs, and gradients of a weighted sum of them."""
        with _buffers_kept(self.model), torch.inference_mode(False), torch.enable_grad():
            outputs = self._call(called)
            learning = [t for t in outputs if t.requires_grad]
            if not learning:
                raise _Failed("No output depends on a parameter that requires a gradient.")
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(t.shape, generator=generator).to(t) for t in learning]
            found = torch.autograd.grad(learning, parameters, weights, allow_unused=True)
        return [t.detach() for t in outputs], dict(zip(parameters, found, strict=True))

    def _call(self, called: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        outputs = list(_floating(called(*self.args, **self.kwargs)))
        if not outputs:
            raise MhcError(
                f"check: {type(self.model).__name__} returned no tensor of floating point for "
                "these inputs: nothing can be compared"
            )
        self.precision = max(_precision_of(self.model, outputs), self.precision)
        return outputs

    def _ran(self, sites: Sequence[_Site]) -> set[str]:
        """Those whose branch the plain model computes, by a gradient of a weight of the branch."""
        weights = {s.name: s.module.witness.weight for s in sites if s.module.witness is not None}
        frozen = [w for w in weights.values() if not w.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad_()
            with swap.plainly(self.model):
                found = self._run(self.model, list(weights.values()))[1]
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
        return {s.name for s in sites if s.name not in weights} | {
            name for name, weight in weights.items() if found[weight] is not None
        }


def _named(names: Sequence[str]) -> str:
    return ", ".join([f"'{name}'" for name in names[:4]] + ["..."] * (len(names) > 4))


# --- sites --------------------------------------------------------------------------------------


def _sites(model: nn.Module) -> list[_Site]:
    """All sites of a model, and readouts, each once."""
    found: dict[int, _Site] = {}
    chains: dict[int, list[Connection]] = {}
    for path, owner in model.named_modules():
        held = _held_by(owner)
        for key, part in held.items():
            name = f"{path}.{key}" if path else key
            found.setdefault(id(part), _Site(name, part, frozenset()))
        chain_of = _chains_of(owner) if held else {}
        for key, number in chain_of.items():
            part = held[key]
            assert isinstance(part, Connection)
            chains.setdefault(number, []).append(part)
    # An excluded add has no parameters, and lets equal streams be equal: the next one is the first.
    first = {id(m) for c in chains.values() for m in c if m.index == min(m.index for m in c)}
    idle = frozenset(f"{leaf}_res" for leaf in LEAVES)
    return [replace(s, idle=idle) if id(s.module) in first else s for s in found.values()]


def _held_by(owner: nn.Module) -> dict[str, StreamParameters]:
    """The parameter modules of an owner by name; of PEFT's copies the one that is trained."""
    container = owner._modules.get("mhc") if swap.is_swapped(owner) else None
    copies: dict[str, list[StreamParameters]] = {}
    for module in container.modules() if container is not None else ():
        if isinstance(module, Connections):
            for key, part in module._modules.items():
                if isinstance(part, StreamParameters):
                    copies.setdefault(key, []).append(part)
    return {
        key: next((c for c in found if all(p.requires_grad for p in c.parameters())), found[0])
        for key, found in copies.items()
    }


def _chains_of(owner: nn.Module) -> dict[str, int]:
    """The number of the chain of each connection of an owner."""
    spec, names = Spec.from_json(owner.__dict__[swap.SPEC]), Connections()
    return {names.key(site.name): site.chain for site in spec.sites if site.tensors}


def _set_to_start(module: StreamParameters) -> None:
    """The values from which a model computes what the plain one does, whatever its ``init``."""
    config = replace(module.config, init="preserve", spread=0.0)
    if isinstance(module, Connection):
        bias = initial.bias(config, index=module.index, linear=module.linear)
    else:
        bias = initial.head_bias(config.n)
    module.phi.data.zero_()
    module.alpha.data.fill_(config.alpha_init)
    module.bias.data.copy_(bias)


# --- comparing ----------------------------------------------------------------------------------


def _floating(value: Any) -> Iterator[Tensor]:
    """The tensors of floating point in what a model returns, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _floating(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floating(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _floating(getattr(value, part.name))


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor; infinite where shapes or infinities differ."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    return max(_relative(a, e) for a, e in zip(actual, expected, strict=True))


def _relative(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    if not bool((actual.isfinite() == finite).all()):
        return float("inf")
    wide = torch.float64 if expected.dtype is torch.float64 else torch.float32
    a, e = (t.to(wide).where(finite, 0) for t in (actual, expected))
    return float((a - e).norm() / e.norm().clamp_min(torch.finfo(wide).tiny))


def _is_finite(parameter: Tensor) -> bool:
    return bool(parameter.detach().isfinite().all())


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _precision_of(model: nn.Module, outputs: Sequence[Tensor]) -> float:
    """The largest machine epsilon with which a model computes."""
    dtypes = {t.dtype for t in (*model.parameters(), *outputs) if t.is_floating_point()}
    devices = {t.device.type for t in outputs}
    dtypes |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    tf32 = "cuda" in devices and torch.get_float32_matmul_precision() != "highest"
    return max([*(torch.finfo(d).eps for d in dtypes), *([2.0**-10] if tf32 else [])])


def _precision_within(model: nn.Module) -> float:
    """The largest machine epsilon inside of the model, which may set autocast itself."""
    graph = _last_graph(model)
    nodes = graph.after.graph.nodes if graph is not None else ()
    values = (n.meta.get("example_value") for n in nodes)
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max((torch.finfo(d).eps for d in dtypes), default=0.0)


def _last_graph(model: nn.Module) -> RewrittenGraph | None:
    """The graph that was captured last; None if there is none, which is what is to be found out."""
    try:
        return graphs(model)[-1]
    except NotCapturedError:
        return None


# --- leaving no trace ---------------------------------------------------------------------------


@contextmanager
def _everything_kept(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Random states, mHC parameters and compiled calls are afterwards what they were.

    Parameters get other memory meanwhile: a backward that is still to come finds its own as it was.
    """
    values = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    compiled = {
        m: m.__dict__.pop(_torch.COMPILED_CALL)
        for m in model.modules()
        if _torch.COMPILED_CALL in m.__dict__
    }
    state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    try:
        with ExitStack() as stack:
            for kind in {d.type for d in devices} or {"cuda"}:
                own = [d for d in devices if d.type == kind]
                stack.enter_context(torch.random.fork_rng(own, device_type=kind))
            yield
    finally:
        random.setstate(state)
        for module, call in compiled.items():
            module.__dict__[_torch.COMPILED_CALL] = call
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics, counters) are replaced by copies meanwhile."""
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies: dict[int, Tensor] = {}
    for module, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                copy = copies.setdefault(id(buffer), buffer.detach().clone())
                module._buffers[name] = copy
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)

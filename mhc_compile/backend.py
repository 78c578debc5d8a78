"""The backends: what becomes of a captured graph.

``mhc`` is the public one (``torch.compile(model, backend="mhc")``, through the entry point):
all passes, then Inductor. ``eager`` runs the same graph operation by operation; a transformed
model that is called plainly uses it.

Note [Graphs that others run]
    Dynamo keeps a graph for the code that it was captured from: other instances of the class run it
    without our being asked, and so does one that was reverted. That is right where a graph says
    itself what it is, by what it declares or by connections of its own. A graph of plain residuals
    does not: for whom it is the first call of a plain model, and for whom a part without a site,
    depends on who calls. Such a graph asks at every call, and is given to the backend again for a
    caller that it was not made for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from . import _torch
from .capture import copy_graph, relabelled
from .compiler import guard, history
from .compiler.context import context_of, options_of, owners_in
from .compiler.own import has_connections, rewrite
from .compiler.partitioned import PartitionedPasses
from .config import Config
from .errors import (
    ChainBrokenError,
    GraphBreakError,
    MhcError,
    NoSitesError,
    UnsupportedError,
)
from .model import callbacks, swap
from .model.attach import DDP_COMES_LAST, attach
from .model.backward_hooks import number_calls
from .model.declare import Spec, collect, declaration_nodes
from .model.hooks import errors_name_hooks
from .passes.context import Context
from .passes.pipeline import EXAMINE, PIPELINE
from .passes.runner import HistoryEntry, Pass, run_pipeline
from .passes.sites.canonicalize import canonicalize
from .passes.sites.detect import detect
from .passes.sites.records import identity_of, stack_of

__all__ = ["check_options", "eager", "mhc"]

Runner = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """What lowering needs to know of the passes that made a graph; it extends the history."""

    config: Config
    history: list[HistoryEntry] = field(default_factory=list)


Lowering = Callable[[fx.GraphModule, Sequence[Any], Run], Runner]


def mhc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Runner:
    """The backend of ``torch.compile(model, backend="mhc")``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of ``Config`` (for a model that was not transformed), and any of
            Inductor's own options.
        mode: a ``torch.compile`` mode, for Inductor.

    Raises:
        ValueError: an option that neither ``Config`` nor Inductor knows.
        MhcError: see ``transform``.
    """
    own, patches = _split_options(options or {}, mode)
    place = "post_grad_custom_pre_pass"
    after = patches.get(place, _torch.inductor_setting(place))

    def lower(graph: fx.GraphModule, inputs: Sequence[Any], run: Run) -> Runner:
        passes = PartitionedPasses(run.config, run.history, after)
        runner = _torch.compile_inductor(graph, inputs, {**patches, place: passes})
        passes.note_cache()
        return runner

    return _compile(gm, list(example_inputs), own, lower)


def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Runner:
    """Run the rewritten graph as it is, every operation on its own."""
    return _compile(
        gm, list(example_inputs), None, lambda graph, inputs, run: _run_eagerly(graph, inputs)
    )


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    own: Mapping[str, Any] | None,
    lower: Lowering,
) -> Runner:
    """All passes on one graph; ``own`` are options of this library, None for a plain call."""
    module = _caller()

    def roots() -> list[nn.Module]:
        return [module] if module is not None else _transformed_modules(gm, None)

    with errors_name_hooks(roots):
        return _compile_graph(gm, example_inputs, own, lower, module)


def _caller() -> nn.Module | None:
    """The module whose call is being compiled, or runs."""
    return swap.calling_root() or _torch.calling_module()


def _compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    own: Mapping[str, Any] | None,
    lower: Lowering,
    module: nn.Module | None,
) -> Runner:
    if _torch.is_cut_for_ddp(gm):
        raise UnsupportedError(
            "torch.compile of a DistributedDataParallel model is cut at its gradient buckets, in "
            "the middle of the residual streams, before any backend sees it. Compile the model "
            "inside: model.compile(backend='mhc'), then DistributedDataParallel(model); or set "
            "torch._dynamo.config.optimize_ddp = False."
        )
    _torch.require_constant_floats(gm)
    captured, work = copy_graph(gm), copy_graph(gm)
    declared = _declared_config(work)
    number_calls(work, module)
    owners = _transformed_modules(gm, module)
    _require_one_model(owners, module)
    sites = guard.Sites.of(owners, work.graph, example_inputs)
    if declared is None:
        if own is not None and (found := rewrite(work, module, own)) is not None:
            context, entries = found
            _require_nothing_lost(sites, gm, work, owners, module)
            runner = lower(work, example_inputs, Run(Config(**{**own, "n": 1}), entries))
            history.trace(entries)
            history.record(captured, work, entries, context, example_inputs)
            if context.own:
                return runner
            return _asking(runner, _may_stay_plain, Plain.of(gm, example_inputs, own))
        if own is not None and not _is_transformed(module):
            return _first_call_of_plain(gm, example_inputs, own, lower, module)
        # a part of the model without a site
        _require_nothing_lost(sites, gm, work, owners, module)
        runner = lower(work, example_inputs, Run(Config(**(own or {}))))
        if own is None:  # a plain call has a cache of its own
            return runner
        return _asking(runner, _may_stay_plain, Plain.of(gm, example_inputs, own))
    _refuse_constants(work)
    _require_agreement(own or {}, declared)
    context = context_of(
        work,
        example_inputs,
        *owners,
        config=declared,
        grad_enabled=torch.is_grad_enabled(),
        broken_at=_torch.break_reason(gm),
    )
    if "canonicalize" in declared.disabled:
        collect(work.graph, context)
    work, entries = run_pipeline(
        work, context, _checked(PIPELINE, sites), disabled=declared.disabled
    )
    history.trace(entries)
    _erase_declarations(work)
    broken_at = _broken_at(gm, module)
    guard.require_alive(sites, work, lambda: guard.undeclared_in(context.detection), broken_at)
    _require_synchronisation(work, context, example_inputs)
    _warn_of_frozen(work, context, example_inputs)
    runner = lower(work, example_inputs, Run(declared, entries))
    history.record(captured, work, entries, context, example_inputs)
    return runner


def _transformed_modules(gm: fx.GraphModule, module: nn.Module | None) -> list[nn.Module]:
    """The modules with declared sites that a graph may come from, outermost first.

    Args:
        module: that which is being called, if it is known.
    """
    found = [module] if module is not None and _is_transformed(module) else []
    for node in gm.graph.nodes:
        for key, _ in stack_of(node):
            part = swap.find(identity_of(key))
            if part is not None and not any(part is m for root in found for m in root.modules()):
                found.append(part)
    return found


def _require_one_model(owners: Sequence[nn.Module], module: nn.Module | None) -> None:
    """A copy may run modules of the model that it was copied from; their sites have one name."""
    if len(owners) > 1 and owners[0] is module:
        raise ChainBrokenError(
            f"This call of {type(module).__name__} runs modules of another transformed model "
            f"({type(owners[1]).__name__}), which it does not hold. A forward that was replaced "
            "may refer to modules of the model from which this one was copied: set it on the copy "
            "anew, or register the other model as a submodule."
        )


def _require_nothing_lost(
    sites: guard.Sites,
    gm: fx.GraphModule,
    work: fx.GraphModule,
    owners: Sequence[nn.Module],
    module: nn.Module | None,
) -> None:
    """In a graph in which nothing is declared no branch of a site may run."""

    def undeclared() -> list[Any]:
        context = Context(options_of(Config()), owners=owners_in(*owners), declarations={})
        run_pipeline(copy_graph(gm), context, EXAMINE)
        return guard.undeclared_in(context.detection)

    if sites.declared:
        guard.require_alive(sites, work, undeclared, _broken_at(gm, module))


def _checked(passes: Sequence[Pass], sites: guard.Sites) -> list[Pass]:
    """The passes on the graph of a model whose sites are declared.

    Declarations are read as soon as the bodies that may hold some are inlined; what was detected
    must fit them.
    """

    def canonicalize_and_collect(gm: fx.GraphModule, context: Context) -> Any:
        result = canonicalize(gm, context)
        if read := collect(result.gm.graph, context):
            notes = [*result.notes, f"{read} declarations read"]
            result = replace(result, changed=True, notes=notes)
        return result

    def detect_and_compare(gm: fx.GraphModule, context: Context) -> Any:
        result = detect(gm, context)
        guard.require_own_branches(sites, gm, context)
        return result

    run = {"canonicalize": canonicalize_and_collect, "detect": detect_and_compare}
    return [Pass(p.name, run.get(p.name, p.run), p.ensures) for p in passes]


def _run_eagerly(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Runner:
    checkpointed = any("ac_graph_id" in n.meta for n in gm.graph.nodes)
    if checkpointed and torch.is_grad_enabled():
        return _torch.partition_eagerly(gm, example_inputs)
    return gm.forward


def _declared_config(gm: fx.GraphModule) -> Config | None:
    """The configuration that the modules in a graph declare, None if there are none."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in declaration_nodes(module.graph):
                return Spec.from_json(str(node.args[1])).config
    return None


def _refuse_constants(gm: fx.GraphModule) -> None:
    """Parameters must be inputs of the graph."""
    for node in declaration_nodes(gm.graph):
        if any(parameter.op == "get_attr" for parameter in node.args[0]):  # type: ignore[union-attr]
            raise UnsupportedError(
                "torch._inductor.config.freezing makes constants of the parameters of a "
                "transformed model. Turn it off, or use model.compile(backend='mhc') in place of "
                "torch.compile(model, backend='mhc'): it does so for its own calls."
            )


def _declared_values(gm: fx.GraphModule, context: Context, inputs: Sequence[Any]) -> list[Any]:
    """The mHC parameters that a graph was given."""
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    declared = [d for group in (context.declarations or {}).values() for d in group]
    return [values[p.name] for d in declared for p in d.parameters]


def _require_synchronisation(gm: fx.GraphModule, context: Context, inputs: Sequence[Any]) -> None:
    """DistributedDataParallel averages the gradients of what it knew when it was made."""
    if not all(map(_torch.is_known_to_ddp, _declared_values(gm, context, inputs))):
        raise UnsupportedError(DDP_COMES_LAST)


def _warn_of_frozen(gm: fx.GraphModule, context: Context, inputs: Sequence[Any]) -> None:
    """Whoever trains other parameters alone may not know that the streams stay as they started."""
    declared = _declared_values(gm, context, inputs)
    others = any(isinstance(v, nn.Parameter) and v.requires_grad for v in inputs)
    if torch.is_grad_enabled() and others and not any(p.requires_grad for p in declared):
        warnings.warn(
            "All mHC parameters of this model are frozen (requires_grad is False) while others are "
            "trained: its streams stay as they are. To train them, call p.requires_grad_() for p "
            "in mhc_compile.parameters(model); PEFT freezes whatever LoraConfig(modules_to_save="
            "['mhc']) does not name.",
            stacklevel=2,
        )


def _erase_declarations(gm: fx.GraphModule) -> None:
    """Only where a disabled pass left them: running one raises."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(declaration_nodes(module.graph)):
                module.graph.erase_node(node)
            module.recompile()


# --- options ------------------------------------------------------------------------------------


def check_options(options: Mapping[str, Any] | None, declared: Config) -> None:
    """Refuse options that a model transformed with ``declared`` cannot be compiled with.

    Raises:
        ValueError: an option is unknown, out of range, or contradicts ``declared``.
    """
    _require_agreement(_split_options(options or {}, None)[0], declared)


def _split_options(
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


def _require_agreement(own: Mapping[str, Any], declared: Config) -> None:
    """Options given for a transformed model must not contradict what it was transformed with."""
    asked = replace(declared, **own)
    for name in own:
        if getattr(asked, name) != getattr(declared, name):
            raise ValueError(
                f"backend 'mhc': options[{name!r}] = {getattr(asked, name)!r}, but the model was "
                f"transformed with {getattr(declared, name)!r}; leave the option out, or call "
                "mhc_compile.revert and transform the model again"
            )


# --- plain models -------------------------------------------------------------------------------


def _is_transformed(module: nn.Module | None) -> bool:
    return module is not None and any(swap.is_swapped(m) for m in module.modules())


def _first_call_of_plain(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    own: Mapping[str, Any],
    lower: Lowering,
    module: nn.Module | None,
) -> Runner:
    """Transform a model that meets the backend untransformed.

    The graph at hand has no inputs for the new parameters, so this first call runs eagerly with
    the parameters handed over; it leaves the model transformed, Dynamo notices the new classes,
    and the second call is captured and compiled like that of any transformed model. Whoever comes
    upon the graph after that is plain again, and has a first call too.
    """
    config = Config(**own)
    if config.n == 1:
        return lower(copy_graph(gm), example_inputs, Run(config))
    if module is None:
        raise MhcError(
            "backend 'mhc' cannot find the module that a compiled plain function calls, so it has "
            "nowhere to put the mHC parameters. Call mhc_compile.transform(model) before "
            "torch.compile, or compile the module itself."
        )
    _check_whole(gm, module)
    work, captured = copy_graph(gm), copy_graph(gm)
    context = context_of(work, example_inputs, module, config=config)
    work, _ = run_pipeline(work, context, PIPELINE[:2], disabled=config.disabled)
    detection = context.detection
    if detection is None or not detection.sites:
        raise NoSitesError(
            f"The first graph that Dynamo captured of {type(module).__name__} has no chain of at "
            "least two residual adds x + F(x); mhc_compile.explain(model, *inputs) lists every add "
            "with its reason. If graph breaks cut the model into several graphs "
            "(TORCH_LOGS=graph_breaks shows them), call mhc_compile.transform(model) first."
        )
    # Dynamo keeps the runner: what belongs to this module must not stay in it.
    waiting = [(module, example_inputs, work, context, detection)]

    def first_call(*inputs: Any) -> Any:
        model, values, graph, context, detection = waiting.pop()
        found = guard.witnesses(model, graph.graph, values, detection)
        extra = _add_inputs(graph, detection, attach(model, graph, detection, found, config))
        rewritten, entries = run_pipeline(graph, context, PIPELINE[2:])
        history.record(captured, rewritten, entries, context, [*values, *extra])
        return _run_eagerly(rewritten, [*values, *extra])(*inputs, *extra)

    def is_waiting(caller: nn.Module | None) -> bool:
        return bool(waiting) and waiting[0][0] is caller

    return _asking(first_call, is_waiting, Plain.of(gm, example_inputs, own))


@dataclass(frozen=True)
class Plain:
    """A graph of plain residuals as the backend was given it: see Note [Graphs that others run].

    What it says of modules is said anew for others by their paths, from the module whose code it
    is: whoever calls that one may have it under another name.

    Attributes:
        gm: the graph.
        own: the options of this library.
        code: the class of the module whose code it is, for messages.
        modules: from the identity of each module in the graph to its path.
        names: of each input, the names by which the module has it.
    """

    gm: fx.GraphModule
    own: Mapping[str, Any]
    code: str
    modules: Mapping[str, str]
    names: Sequence[frozenset[str]]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any], own: Mapping[str, Any]) -> Plain:
        graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
        met = {identity_of(k) for g in graphs for node in g.nodes for k, _ in stack_of(node)}
        module = _torch.innermost_module()
        paths = {} if module is None else {str(id(m)): p for p, m in module.named_modules()}
        return cls(
            relabelled(gm, {}),
            own,
            type(module).__name__,
            {identity: path for identity, path in paths.items() if identity in met},
            _names_in(module, example_inputs),
        )

    def compile_again(self, inputs: Sequence[Any]) -> Runner:
        """What the backend makes of this graph for whoever is calling now, for one call.

        Raises:
            MhcError: its modules are others; or any other error of the backend.
        """
        module = _torch.innermost_module()
        theirs = {} if module is None else dict(module.named_modules(remove_duplicate=False))
        same_modules = theirs.keys() >= set(self.modules.values())
        if not same_modules or self.names != _names_in(module, inputs):
            raise MhcError(
                f"backend 'mhc' has met the code of {self.code} before, in a model whose modules "
                f"or parameters have other names than those of this {type(module).__name__}, and "
                "Dynamo does not capture it again. Call mhc_compile.transform(model) before it is "
                "compiled, or torch.compiler.reset() before its first call."
            )
        new = {known: str(id(theirs[path])) for known, path in self.modules.items()}
        return _compile(
            relabelled(self.gm, new),
            list(inputs),
            self.own,
            lambda graph, values, run: _run_eagerly(graph, values),
        )


def _names_in(module: nn.Module | None, inputs: Sequence[Any]) -> list[frozenset[str]]:
    """The names that each input has as a parameter or buffer of a module."""
    names: dict[int, set[str]] = {}
    if module is not None:
        for name, value in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            names.setdefault(id(value), set()).add(name)
    return [frozenset(names.get(id(value), ())) for value in inputs]


def _asking(runner: Runner, fits: Callable[[nn.Module | None], bool], plain: Plain) -> Runner:
    """A runner that is only run for whom it fits: see Note [Graphs that others run]."""

    def run(*inputs: Any) -> Any:
        return (runner if fits(_caller()) else plain.compile_again(inputs))(*inputs)

    return run


def _may_stay_plain(caller: nn.Module | None) -> bool:
    """Whether a graph without a site may be a part of this model."""
    return _is_transformed(caller) or has_connections(caller)


def _add_inputs(gm: fx.GraphModule, detection: Any, parameters: Mapping[Any, Any]) -> list[Any]:
    """Give a graph one more input for each new parameter."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    values: list[Any] = []
    known: dict[int, fx.Node] = {}
    mode = _fake_mode_of(gm)
    for site in detection.sites:
        for number, value in enumerate(parameters[site]):
            if id(value) not in known:
                with gm.graph.inserting_after(last):
                    last = gm.graph.placeholder(f"mhc_{len(values)}_{number}")
                last.meta["example_value"] = mode.from_tensor(value)
                known[id(value)] = last
                values.append(value)
            site.parameters.append(known[id(value)])
    return values


def _fake_mode_of(gm: fx.GraphModule) -> Any:
    values = (n.meta.get("example_value") for n in gm.graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, _torch.FakeTensor))


def _broken_at(gm: fx.GraphModule, module: nn.Module | None) -> str | None:
    """Where a graph ends early, or begins: Dynamo skips a forward that breaks inside a loop.

    Args:
        module: that which is being called.
    """
    if broken := _torch.break_reason(gm) or _torch.break_around():
        return broken
    captured = _torch.innermost_module()
    if module is None or captured in (None, module):
        return None
    name = next((path for path, m in module.named_modules() if m is captured), None)
    return None if name is None else f"a call above module '{name}'"


def _check_whole(gm: fx.GraphModule, module: nn.Module) -> None:
    """A plain model is transformed at once or not at all: its graph must be one."""
    if broken := _broken_at(gm, module):
        raise GraphBreakError(
            f"Dynamo breaks the graph of {type(module).__name__} at {broken}; a model that was not "
            "transformed must be captured whole. Call mhc_compile.transform(model) first (breaks "
            "outside the residual streams are then allowed), or remove the break "
            "(torch.compile(..., fullgraph=True) shows it). Has it hyper-connections of its own, "
            "pass options={'n': 1}: nothing is added."
        )


callbacks.eager, callbacks.mhc, callbacks.check_options = eager, mhc, check_options

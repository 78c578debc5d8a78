"""What `_torch.py` takes from torch is there: each name is looked up, each function is called.

On a torch where something has gone, `test_every_name_is_there` says which name, in which line; it
reads the source, so it also works where `import mhc_compile` fails. The tests below it are named
after the functions, and each runs its function on the real thing.
"""

from __future__ import annotations

import ast
import collections
import importlib
import inspect
import io
import logging
import operator
import re
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "mhc_compile" / "_torch.py"
PASSES = ROOT / "passes" / "graph" / "_torch.py"
SOURCE = FILE.read_text(encoding="utf-8")
OWN = re.findall(r"^(?:def |class )?(_[a-zA-Z]\w*)(?= = |\(|:)", SOURCE, re.MULTILINE)
HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def own() -> Any:
    """`_torch.py`, imported late: where that fails the tests of names still run."""
    return importlib.import_module("mhc_compile._torch")


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def a_ddp_module(module: nn.Module | None = None) -> DistributedDataParallel:
    """Without the broadcast at its start: where gloo's thread still holds a tensor of it while this
    one ends the group, both wait for ever (seen in torch 2.11)."""
    return DistributedDataParallel(module or nn.Linear(2, 2), init_sync=False)


# Where private attributes of objects stand, those that are not written as `torch.….name`.
OWNERS: dict[str, Callable[[], Any]] = {
    "a module": nn.Identity,
    "a compiled module": lambda: torch.compile(nn.Identity()),
    "a module in DDP": a_ddp_module,
    "a node": lambda: fx.Node,
    "a named tuple": lambda: collections.namedtuple("Named", "field"),
    "the room of nn.Module": lambda: torch.nn.modules.module,
    "a number of Dynamo": lambda: SymNode(sympy.Float(0.5), ShapeEnv(), float, 0.5),
}


# ------------------------------------------------------------------------------------------ names


def names_in(source: str, strings: bool = True) -> dict[str, int]:
    """Names of a source that torch must have, with their lines.

    They are dotted (`torch.a.b`): imported ones and chains of attributes from `torch`. Private
    attributes of something else come as `.name`; with `strings`, those that a string names too.
    """
    found: dict[str, int] = {}
    tree = ast.parse(source)
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = list(_names_of(node, whole=id(node) not in inner))
        elif strings and isinstance(node, ast.Constant) and is_private(str(node.value)):
            names = [f".{node.value}"]
        else:
            continue
        for name in names:
            if name.startswith((".", "torch.")):
                found.setdefault(name, node.lineno)
    return found


def _names_of(node: ast.Attribute, whole: bool) -> Iterator[str]:
    text = ast.unparse(node)
    if re.fullmatch(r"torch(\.\w+)+", text):
        if whole:
            yield text
    elif is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
        yield f".{node.attr}"


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def missing_in(source: str) -> list[str]:
    """What this torch has not of what a source takes from it."""
    with one_process():
        objects = [make() for make in OWNERS.values()]
        return [
            f"torch {torch.__version__} has no {name} (line {line})"
            for name, line in names_in(source).items()
            if not (stands(name) if name[0] != "." else any(hasattr(o, name[1:]) for o in objects))
        ]


def stands(name: str) -> bool:
    """Whether a dotted name leads to something; modules on the way are imported."""
    value: Any = torch
    first, *rest = name.split(".")
    for part in rest:
        first += f".{part}"
        if not hasattr(value, part):
            try:
                importlib.import_module(first)
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def private_identifiers(source: str) -> set[str]:
    """The private names in the code of a source, comments left out."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    names = {t.string for t in tokens if t.type == tokenize.NAME}
    names |= {t.string.strip("\"'") for t in tokens if t.type == tokenize.STRING}
    return {name for name in names if is_private(name)}


@pytest.mark.parametrize("file", [FILE, PASSES], ids=["mhc_compile", "passes"])
def test_every_name_is_there(file):
    gone = missing_in(file.read_text(encoding="utf-8"))
    assert not gone, "\n".join([f"{file}:", *gone])


@pytest.mark.parametrize("name", sorted(private_identifiers(SOURCE) - {*OWN}))
def test_a_name_that_has_gone_is_noticed(name):
    gone = missing_in(re.sub(rf"\b{name}\b", f"{name}_of_yesterday", SOURCE))
    assert gone
    assert all(f"{name}_of_yesterday" in line for line in gone)


def test_every_private_name_outside_is_there():
    """The rest of the package uses a few private attributes of modules and nodes."""
    with one_process():
        objects = [make() for make in OWNERS.values()]
    found = []
    for floor in ("mhc_compile", "passes", "kernels"):
        for file in sorted((ROOT / floor).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            own = re.findall(r"\bdef (_\w+)", text) if file != FILE else OWN
            for name, line in names_in(text, strings=file == FILE).items():
                if name[0] == "." and name[1:] not in own:
                    found.append((name[1:], f"{file.relative_to(ROOT).as_posix()}:{line}"))
    assert "_rename" in dict(found)
    gone = [where for where in found if not any(hasattr(o, where[0]) for o in objects)]
    assert not gone


def test_every_function_is_called_below(own):
    functions = {
        name
        for name, value in vars(own).items()
        if inspect.isfunction(inspect.unwrap(value) if callable(value) else value)
        and getattr(value, "__module__", "") == own.__name__
        and not is_private(name)
    }
    assert len(functions) > 20
    assert sorted(f for f in functions if f"test_{f}" not in globals()) == []


# -------------------------------------------------------------------------------- Dynamo, settings


class Recorder:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


@torch.library.custom_op("mhc_test::nothing", mutates_args=())
def nothing(x: Tensor) -> None:
    """An operator without a result."""


@nothing.register_fake
def _(x: Tensor) -> None:
    return None


def test_register_effectful(own):
    own.register_effectful(torch.ops.mhc_test.nothing.default)
    recorder = Recorder()

    @torch.compile(backend=recorder, fullgraph=True)
    def function(x):
        nothing(x)
        return x + 1

    function(torch.ones(2))
    (gm,) = recorder.graphs
    gm.graph.eliminate_dead_code()
    assert torch.ops.mhc_test.nothing.default in {n.target for n in gm.graph.nodes}


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


def test_forget_graphs(own, monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(True))
    own.forget_graphs()
    assert bool(forgotten) is (
        "isolate_recompiles" not in inspect.signature(torch.compile).parameters
    )


def test_compile_dynamo(own):
    """More shapes than Dynamo's own limit, for each of two instances: one graph per shape."""
    for _ in range(2):
        recorder = Recorder()
        with own.dynamo_settings():
            call = own.compile_dynamo(Doubler().forward, recorder, dynamic=False)
            for size in range(2, 14):
                assert call(torch.ones(size)).sum() == 2 * size
        assert len(recorder.graphs) == 12


def test_own_cache(own):
    settings = own.own_cache()
    assert set(settings) <= set(inspect.signature(torch.compile).parameters)
    assert torch.compile(lambda x: x + 1, backend="eager", **settings)(torch.ones(1)) == 2


def test_dynamo_settings(own):
    def current() -> tuple[Any, ...]:
        dynamo = torch._dynamo.config
        limits = (dynamo.recompile_limit, dynamo.accumulated_recompile_limit)
        others = (dynamo.allow_rnn, torch._inductor.config.freezing)
        return (dynamo.optimize_ddp, *limits, *others)

    before = current()
    with own.dynamo_settings(), torch._inductor.config.patch(freezing=False):
        assert current() == (False, own.RECOMPILE_LIMIT, 4 * own.RECOMPILE_LIMIT, True, False)
    assert current() == before


# --------------------------------------------------------------------------------- breaks, in words


def breaking(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


BREAK = f"{HERE}:{breaking.__code__.co_firstlineno + 2}"


def failure_of(function: Callable[..., Any]) -> Exception:
    with pytest.raises(Exception) as info:
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1))
    return info.value


def test_first_paragraph(own):
    error = failure_of(breaking)
    first = own.first_paragraph(error)
    assert first
    assert "\n\n" not in first
    assert str(error).strip().startswith(first)


def test_break_in_words(own):
    words = own.break_in_words(failure_of(breaking))
    assert BREAK in words
    assert "graph_break" in words


def test_graph_breaks(own):
    before = own.graph_breaks()
    torch.compile(breaking, backend="eager")(torch.ones(1))
    assert own.graph_breaks() > before


def test_break_reason(own):
    recorder = Recorder()
    torch.compile(breaking, backend=recorder)(torch.ones(1))
    first, second = (own.break_reason(gm) for gm in recorder.graphs)
    assert BREAK in first
    assert second is None


def test_copy_break_reason(own):
    recorder = Recorder()
    torch.compile(breaking, backend=recorder)(torch.ones(1))
    for gm in recorder.graphs:
        new = torch.fx.GraphModule(gm, gm.graph)
        own.copy_break_reason(gm, new)
        assert own.break_reason(new) == own.break_reason(gm)
    assert own.break_reason(recorder.graphs[0])


def test_exceptions_met(own):
    def raising(x):
        raise ValueError("an odd number of streams")

    before = own.exceptions_met()
    with pytest.raises(ValueError, match="an odd number"):
        torch.compile(raising, backend="eager")(torch.ones(1))
    new = {text for text, count in own.exceptions_met().items() if count > before.get(text, 0)}
    assert [text for text in new if "ValueError" in text]


def test_break_around(own):
    """What follows a break is captured while the function that has it still runs."""
    found: list[Any] = []

    def backend(gm, example_inputs):
        found.append(own.break_around())
        return gm.forward

    torch.compile(breaking, backend=backend)(torch.ones(1))
    assert BREAK in found[-1]
    assert own.break_around() is None


def test_require_constant_floats(own):
    recorder = Recorder()

    def backend(gm, example_inputs):
        own.require_constant_floats(gm)
        return recorder(gm, example_inputs)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.3

        def forward(self, x):
            return x * self.scale

    call = torch.compile(Scaled(), backend=backend, dynamic=True)
    torch.testing.assert_close(call(torch.ones(5)), torch.full((5,), 0.3))
    (gm,) = recorder.graphs
    (product,) = (n for n in gm.graph.nodes if n.name == "mul")
    assert product.args[1] == 0.3


def test_a_buffer_of_one_float64_is_no_constant(own):
    """Dynamo would drop what is written into it."""
    recorder = Recorder()

    def backend(gm, example_inputs):
        own.require_constant_floats(gm)
        return recorder(gm, example_inputs)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls.add_(1)
            return x * 2

    model = Counting()
    call = torch.compile(model, backend=backend)
    for _ in range(2):
        call(torch.ones(5))
    assert model.calls == 2


def test_unwrapped(own):
    module = Doubler()
    module.weight = nn.Parameter(torch.ones(1))
    with one_process():
        wrapped = torch.compile(a_ddp_module(module))
        assert own.unwrapped(wrapped) is own.unwrapped(nn.DataParallel(module)) is module
        del wrapped


def test_check_lookups(own):
    graph = fx.Graph()
    ids, weight = graph.placeholder("ids"), graph.placeholder("weight")
    ids.meta["example_value"] = torch.ones(2, dtype=torch.int64)
    graph.call_function(torch.nn.functional.embedding, (ids, weight))
    graph.call_function(torch.nn.functional.embedding, (), {"input": ids, "weight": weight})
    own.check_lookups(graph)
    ids.meta["example_value"] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Expected tensor for argument.*Long, Int"):
        own.check_lookups(graph)


def test_user_frame(own):
    def fails():
        nn.Linear(2, 2)(torch.ones(3))

    with pytest.raises(RuntimeError) as info:
        fails()
    assert own.user_frame(info.value).endswith(f"{HERE}:{fails.__code__.co_firstlineno + 1}")


# ---------------------------------------------------------------------------- what is going on now


class Asking(nn.Module):
    """Puts what a question answers into a list while its forward runs."""

    def __init__(self, question: Callable[[], Any], answers: list[Any]) -> None:
        super().__init__()
        self.ask = lambda: answers.append(question())

    def forward(self, x):
        self.ask()
        return x + 1


def test_is_exporting(own):
    answers: list[Any] = []
    asking = Asking(own.is_exporting, answers)
    asking(torch.ones(1))
    torch.export.export(asking, (torch.ones(1),), strict=False)
    assert answers[0] is False
    assert set(answers[1:]) == {True}
    assert torch.compile(lambda x: x + own.is_exporting(), backend="eager")(torch.ones(1)) == 1


def test_stance(own):
    assert own.stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert own.stance() == "force_eager"


def test_is_symbolically_traced(own):
    answers: list[Any] = []
    asking = Asking(own.is_symbolically_traced, answers)
    asking(torch.ones(1))
    fx.symbolic_trace(asking)
    assert answers == [False, True]


def test_calling_module(own):
    found: list[Any] = []

    def backend(gm, example_inputs):
        found.append(own.calling_module())
        return gm.forward

    first, second, outer = Doubler(), Doubler(), nn.Sequential(Doubler())
    second.compile(backend=backend)
    outer[0].compile(backend=backend)
    for call in (torch.compile(first, backend=backend), second, outer):
        torch._dynamo.reset()  # or the instances share one graph
        call(torch.ones(1))
    assert [id(m) for m in found] == [id(first), id(second), id(outer[0])]
    assert own.calling_module() is None


def test_innermost_module(own):
    """Where a graph breaks, the rest of the frame is captured while its module is on the stack."""
    found: list[Any] = []

    def backend(gm, example_inputs):
        found.append(own.innermost_module())
        return gm.forward

    class Breaking(Doubler):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return 2 * x

    whole = nn.Sequential(Doubler(), Breaking())
    torch.compile(whole, backend=backend)(torch.ones(1))
    assert found[-1] is whole[1]
    found.clear()
    torch._dynamo.reset()
    compiled = torch.compile(first := Doubler(), backend=backend)
    compiled(torch.ones(1))
    assert found == [first]
    assert own.innermost_module() is None


def test_is_functorch_active(own):
    answers: list[bool] = []

    def asking(x):
        answers.append(own.is_functorch_active())
        return (x * x).sum()

    asking(torch.ones(2))
    torch.func.grad(asking)(torch.ones(2))
    torch.func.vmap(asking)(torch.ones(2, 2))
    asking(torch.ones(2))
    assert answers == [False, True, True, False]


def test_is_listing_parameters(own):
    answers = []

    class Listing(Doubler):
        def named_modules(self, *args, **kwargs):
            answers.append(own.is_listing_parameters())
            return super().named_modules(*args, **kwargs)

    module = Listing()
    dict(module.named_modules())
    dict(module.named_parameters())
    assert answers == [False, True]


# --------------------------------------------------------------------------------------------- DDP


def test_is_known_to_ddp(own):
    answers: list[Any] = []
    module = Asking(lambda: [own.is_known_to_ddp(p) for p in module.parameters()], answers)
    module.old = nn.Parameter(torch.ones(1))
    with one_process():
        wrapped = a_ddp_module(module)
        module.late = nn.Parameter(torch.ones(1))
        module.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        wrapped(torch.ones(1))
    module(torch.ones(1))
    assert answers == [[True, False, True], [True, True, True]]


class ThreeLayers(nn.Module):
    """Each layer has more bytes than DDP's first bucket, 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(600, 600) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("optimize", [True, False])
def test_is_cut_for_ddp(own, optimize):
    """Dynamo cuts where a bucket ends, unless told not to."""
    recorder = Recorder()
    with one_process(), torch._dynamo.config.patch(optimize_ddp=optimize):
        torch.compile(a_ddp_module(ThreeLayers()), backend=recorder)(torch.ones(1, 600))
    assert {own.is_cut_for_ddp(gm) for gm in recorder.graphs} == {optimize}


# ---------------------------------------------------------------------------- AOTAutograd, Inductor


class NamedPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)

    def uuid(self) -> str:
        return "of this pass"


def test_graph_passes(own):
    one, other = NamedPass(), NamedPass()
    assert own.graph_passes(None) == ()
    assert own.graph_passes(one) == (one,)
    assert own.graph_passes([one, other]) == (one, other)


def test_call_graph_pass(own):
    class Aware(own.InferenceAwareGraphPass):  # type: ignore[name-defined, misc]
        __call__, uuid = NamedPass.__call__, NamedPass.uuid

    graph = fx.Graph()
    plain, aware = NamedPass(), Aware()
    aware.calls = []
    own.call_graph_pass(plain, graph, True)
    own.call_graph_pass(aware, graph, True)
    assert plain.calls == [(graph,)]
    assert aware.calls == [(graph, True)]


def test_uuid_of(own):
    assert own.uuid_of(NamedPass()) == "of this pass"
    assert own.uuid_of(print) is None


def test_is_inductor_option(own):
    assert own.is_inductor_option("max_autotune")
    assert own.is_inductor_option("max-autotune")
    assert not own.is_inductor_option("max_autotune_of_yesterday")


def test_inductor_options(own):
    assert own.inductor_options(None) == own.inductor_options("default") == {}
    assert own.inductor_options("max-autotune")["max_autotune"] is True


def test_inductor_setting(own):
    with torch._inductor.config.patch(freezing=True):
        assert own.inductor_setting("freezing") is True
    assert own.inductor_setting("post_grad_custom_pre_pass") is None


def test_trace_artifact(own):
    log = logging.getLogger("torch.__trace")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        own.trace_artifact("name_of_it", lambda: "text of it")
    finally:
        log.removeHandler(handler)
    metadata, payload = ([getattr(r, k, None) for r in records] for k in ("metadata", "payload"))
    assert any("name_of_it" in str(m) for m in metadata)
    assert "text of it" in payload


def sine() -> tuple[fx.GraphModule, Tensor]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(operator.mul, (graph.call_function(torch.sin, (x,)), x)),))
    return fx.GraphModule({}, graph), torch.linspace(0, 1, 5, requires_grad=True)


def assert_is_sine(compiled: Callable[..., Any], x: Tensor) -> None:
    (y,) = compiled(x)
    torch.testing.assert_close(y, x.sin() * x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, x.cos() * x + x.sin())


def test_partition_eagerly(own):
    gm, x = sine()
    assert_is_sine(own.partition_eagerly(gm, [x]), x)


def test_compile_inductor(own):
    """Inductor takes our patches, and gives the forward and the backward graph to our pass."""
    gm, x = sine()
    ours = NamedPass()
    assert_is_sine(own.compile_inductor(gm, [x], {"post_grad_custom_pre_pass": ours}), x)
    assert [own.is_backward(graph) for (graph,) in ours.calls] == [False, True]


def test_is_backward(own):
    graph = fx.Graph()
    graph.placeholder("primals_1")
    assert not own.is_backward(graph)
    graph.placeholder("tangents_1")
    assert own.is_backward(graph)


# ------------------------------------------------------------------------------------------- hooks


def ignored(*_: Any) -> None:
    """A hook of any kind."""


def test_hooks_on(own):
    module = nn.Linear(2, 2)
    assert not any(own.hooks_on(module).values())
    module.register_forward_pre_hook(ignored)
    module.register_forward_hook(ignored)
    module.register_full_backward_pre_hook(ignored)
    module.register_full_backward_hook(ignored)
    kinds = ["forward pre-hook", "forward hook", "backward pre-hook", "backward hook"]
    assert own.hooks_on(module) == {kind: [ignored] for kind in kinds}


def test_hooks_for_all_modules(own):
    room = nn.modules.module
    before = own.hooks_for_all_modules()
    handles = [
        register(ignored)
        for register in (
            room.register_module_forward_pre_hook,
            room.register_module_forward_hook,
            room.register_module_full_backward_pre_hook,
            room.register_module_full_backward_hook,
        )
    ]
    try:
        assert own.hooks_for_all_modules() == (*before, *(handle.id for handle in handles))
    finally:
        for handle in handles:
            handle.remove()
    assert own.hooks_for_all_modules() == before


def test_backward_hooks(own):
    module = nn.Linear(2, 2)
    assert own.backward_hooks(module) == {}
    everywhere = nn.modules.module.register_module_full_backward_hook(print)
    module.register_full_backward_hook(ignored)
    try:
        assert list(own.backward_hooks(module).values()) == [print, ignored]
    finally:
        everywhere.remove()
    assert list(own.backward_hooks(module).values()) == [ignored]


def test_backward_pre_hooks(own):
    module = nn.Linear(2, 2)
    assert own.backward_pre_hooks(module) == {}
    everywhere = nn.modules.module.register_module_full_backward_pre_hook(print)
    module.register_full_backward_pre_hook(ignored)
    try:
        assert list(own.backward_pre_hooks(module).values()) == [print, ignored]
    finally:
        everywhere.remove()


def test_backward_hooks_of(own):
    module = nn.Linear(2, 2)
    assert own.backward_hooks_of(module) == ("", "")
    handles = [module.register_full_backward_hook(ignored) for _ in range(2)]
    pre = module.register_full_backward_pre_hook(ignored)
    expected = " ".join(str(handle.id) for handle in handles), str(pre.id)
    assert own.backward_hooks_of(module) == expected
    found = own.backward_hooks(module), own.backward_pre_hooks(module)
    assert tuple(" ".join(map(str, hooks)) for hooks in found) == expected


def test_set_backward_hook(own):
    room, made = nn.modules.module, []
    original = room.BackwardHook

    def make(module, *args):
        made.append(module)
        return original(module, *args)

    module = nn.Linear(2, 2)
    module.register_full_backward_hook(ignored)
    own.set_backward_hook(make)
    try:
        module(torch.ones(1, 2))
    finally:
        own.set_backward_hook(original)
    assert made == [module] and room.BackwardHook is own.BackwardHook


def test_at_end_of_backward(own):
    events: list[str] = []

    def hook(gradient):
        own.at_end_of_backward(lambda: events.append("end"))
        events.append("hook")

    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(hook)
    x.register_hook(lambda gradient: events.append("last"))
    y.sum().backward()
    assert events == ["hook", "last", "end"]

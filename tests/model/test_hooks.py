"""What users put on modules counts from the next call on, or an error names it.

The model of `test_ownership`: two blocks of two adds. Hooks stand on a block, through which the
streams pass, and on branches. Truth is the plain model with the same hook at the start, and the
recurrence by hand when all parameters are perturbed.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_full_backward_hook,
)
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile import _torch
from mhc_compile.errors import ChainBrokenError
from mhc_compile.model import backward_hooks, hooks
from tests import checks
from tests.test_ownership import CALLS, CHANGEABLE, EXACT, WIDTH, Block, Root, branches, tokens
from tests.zoo.truth import Streams, readout

NAMES = ["p.a", "p.b", "q.a", "q.b"]
MASK = torch.tensor([1.0, 0.0] * (WIDTH // 2)).double()
seen: list[tuple[Tensor | None, ...]] = []


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    seen.clear()
    yield
    seen.clear()


@pytest.fixture(params=CALLS)
def called(request, monkeypatch) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """How a model is called; in Inductor's place AOTAutograd alone, which traces the backward."""
    monkeypatch.setattr(
        _torch, "compile_inductor", lambda graph, inputs, _: aot_eager(graph, inputs)
    )
    yield CALLS[request.param]
    torch._dynamo.reset()


def kept(*tensors: Tensor | None) -> None:
    seen.append(tuple(t if t is None else t.detach().clone() for t in tensors))


# --- hooks ----------------------------------------------------------------------------------------


def reads(module, args, out):
    kept(out)


def scales(module, args, out):
    return 0.5 * out


def masks(module, args, out):
    return out * MASK


def replaces(module, args, out):
    out = out.clone()
    out[0] = 1.0
    return out


def zeros(module, args, out):
    return torch.zeros_like(out)


def ones(module, args, out):
    return torch.ones_like(out)


def joins(module, args, out):
    return torch.cat([0 * out[:1], out[1:]])


def reads_before(module, args):
    kept(*args)


def scales_before(module, args):
    return (0.5 * args[0],)


def replaces_before(module, args):
    x = args[0].clone()
    x[0] = 1.0
    return (x,)


def reads_gradients(module, inputs, outputs):
    kept(*inputs, *outputs)


def scales_gradients(module, inputs, outputs):
    return tuple(0.5 * g for g in inputs)


def scales_gradients_before(module, outputs):
    return tuple(0.5 * g for g in outputs)


AFTER = [reads, scales, masks, replaces, zeros, ones, joins]
BEFORE = [reads_before, scales_before, replaces_before]


def register(module: nn.Module, hook: Callable[..., Any]) -> Any:
    if hook in AFTER:
        return module.register_forward_hook(hook)
    if hook in BEFORE:
        return module.register_forward_pre_hook(hook)
    if hook is scales_gradients_before:
        return module.register_full_backward_pre_hook(hook)
    return module.register_full_backward_hook(hook)


ON_BRANCHES = [
    ("p.a", reads), ("q.b", scales), ("p.b", masks), ("q.a", replaces), ("q.a", zeros),
    ("q.a", ones), ("q.b", joins), ("p.a", reads_before), ("q.b", scales_before),
    ("q.a", replaces_before), ("p.a", reads_gradients), ("q.a", scales_gradients),
    ("p.b", scales_gradients_before),
]  # fmt: skip

ON_A_BLOCK: list[tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = [
    (reads, lambda X: X),
    (scales, lambda X: 0.5 * X),
    (masks, lambda X: MASK * X),
    (reads_gradients, lambda X: X),
]
"""With what each does to the streams behind block p."""


# --- truth ----------------------------------------------------------------------------------------


def recurrence(
    model: nn.Module, x: Tensor, between: Callable[[Tensor], Tensor] = lambda X: X
) -> Tensor:
    """By hand, with the model's own branches, and so with the hooks that stand on them.

    Args:
        between: what a hook on block p does to the streams `[..., n, C]` behind it.
    """
    streams = Streams(4, checks.connections(model))
    X = streams.expand(x)
    for name, branch in zip(NAMES, branches(model), strict=True):
        X = streams.connect(X, name, branch)
        X = between(X) if name == "p.b" else X
    return readout(X)


def results(model: nn.Module, call: Callable[..., Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = tokens().requires_grad_()
    model.zero_grad()
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or checks.error(a, b) < 100 * EXACT or (a - b).abs().max() < EXACT


def seen_by(run: Callable[[], Any]) -> tuple[Any, list[Tensor | None]]:
    """What a run gives, and what hooks saw in it."""
    seen.clear()
    result = run()
    return result, [t for group in seen for t in group]


def assert_as_by_hand(
    model: nn.Module,
    call: Callable[..., Tensor],
    between: Callable[[Tensor], Tensor] = lambda X: X,
) -> None:
    """Of a perturbed model: results, and what hooks on branches saw."""
    actual, shown = seen_by(lambda: results(model, call))
    expected, truly = seen_by(lambda: results(model, lambda x: recurrence(model, x, between)))
    assert_equal(actual, expected)
    if truly:
        assert_equal(shown, truly)


def made(make: Callable[[], nn.Module] = Root) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().double()
    return plain, mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))


def both(plain: nn.Module, model: nn.Module, place: str, hook: Callable[..., Any]) -> Any:
    register(plain.get_submodule(place), hook)
    return register(model.get_submodule(place), hook)


def idle(hook: Callable[..., Any]) -> Callable[[str, str], bool]:
    """An ablated branch reads nothing, and zeros are zeros however they are scaled."""
    groups = {zeros: ("pre", "post"), ones: ("pre",)}.get(hook, ())
    return lambda site, group: site == "q.a" and group.endswith(groups) if groups else False


# --- registered, changed, removed -----------------------------------------------------------------


@pytest.mark.parametrize(("place", "hook"), ON_BRANCHES)
@CHANGEABLE
def test_a_hook_on_a_branch_counts_at_the_next_call_and_so_does_removing_it(place, hook, called):
    plain, model = made()
    call = called(model)
    call(tokens())
    handle = both(plain, model, place, hook)
    _, expected = seen_by(lambda: results(plain, plain))
    _, actual = seen_by(lambda: results(model, call))
    assert_equal(actual, expected)
    checks.assert_transformed(plain, model, (tokens(),), called=call, idle=idle(hook))
    assert_as_by_hand(model, call)
    hooked = call(tokens())
    handle.remove()
    assert_as_by_hand(model, call)
    seen.clear()
    forwards = hook in (*AFTER, *BEFORE) and hook not in (reads, reads_before)
    assert (checks.error(call(tokens()), hooked) > 1e-3) == forwards
    assert not seen


@pytest.mark.parametrize(("hook", "between"), ON_A_BLOCK)
@CHANGEABLE
def test_a_hook_on_a_block_acts_on_every_stream_and_sees_one(hook, between, called):
    plain, model = made()
    call = called(model)
    call(tokens())
    handle = both(plain, model, "p", hook)
    _, expected = seen_by(lambda: results(plain, plain))
    _, actual = seen_by(lambda: results(model, call))
    assert_equal(actual, expected)
    checks.assert_transformed(plain, model, (tokens(),), called=call)
    assert_as_by_hand(model, call, between)
    _, actual = seen_by(lambda: results(model, call))
    states: list[Tensor] = []
    by_hand = recurrence(model, tokens(), lambda X: states.append(between(X)) or states[-1])
    if hook is reads:
        assert_equal(actual, [readout(states[0])])
    elif hook is reads_gradients:
        (gradient,) = torch.autograd.grad(by_hand.square().sum(), states)
        assert_equal(actual[1:], [gradient.sum(-2)])
    handle.remove()
    assert_as_by_hand(model, call)


WHEN = pytest.mark.parametrize("when", ["before transform", "before the first call"])


def with_an_early_hook(
    when: str, place: str, hook: Callable[..., Any]
) -> tuple[nn.Module, nn.Module]:
    plain = Root().double()
    if when == "before transform":
        register(plain.get_submodule(place), hook)
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    if when == "before the first call":
        both(plain, model, place, hook)
    return plain, model


@WHEN
def test_a_forward_hook_from_earlier_on_counts(when, called):
    plain, model = with_an_early_hook(when, "p.a", scales)
    call = called(model)
    checks.assert_transformed(plain, model, (tokens(),), called=call)
    assert_as_by_hand(model, call)


@WHEN
@CHANGEABLE
def test_a_backward_hook_from_earlier_on_counts(when, called):
    """Not in `torch.compile(model)`: see `test_what_torch_compile_cannot_capture_is_named`."""
    plain, model = with_an_early_hook(when, "p", reads_gradients)
    call = called(model)
    checks.assert_transformed(plain, model, (tokens(),), called=call)
    _, expected = seen_by(lambda: results(plain, plain))
    assert len(expected) == 2
    model = mhc_compile.transform(plain, example_inputs=(tokens(),))
    _, actual = seen_by(lambda: results(model, called(model)))
    assert_equal(actual, expected)


@CHANGEABLE
def test_the_hook_that_stands_there_now_counts(called):
    plain, model = made()
    call = called(model)
    for hook in (scales, masks, reads_gradients, scales_gradients):
        handle = register(model.q.a, hook)
        with checks.parameters_kept(model):
            checks.perturb(model)
            assert_as_by_hand(model, call)
        handle.remove()
    assert checks.error(call(tokens()), plain(tokens())) < EXACT


# --- what cannot be carried -----------------------------------------------------------------------


@pytest.mark.parametrize("hook", [replaces, zeros, ones, joins])
@CHANGEABLE
def test_a_hook_that_replaces_a_stream_is_named(hook, called):
    plain, model = made()
    call = called(model)
    call(tokens())
    handle = register(model.p, hook)
    line = hook.__code__.co_firstlineno
    named = rf"forward hook '{hook.__name__}' \(.*test_hooks.py:{line}\) on 'p'\."
    with pytest.raises(mhc_compile.MhcError, match=named):
        call(tokens())
    handle.remove()
    checks.assert_transformed(plain, model, (tokens(),), called=call)


def test_a_hook_that_replaces_a_stream_may_stand_there_before_transform(called):
    """One chain ends at it, another one begins."""
    plain = Root().double()
    plain.p.register_forward_hook(replaces)
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    first = {"p.a", "q.a"}
    checks.assert_transformed(
        plain,
        model,
        (tokens(),),
        called=called(model),
        idle=lambda site, group: site in first and group.endswith("res"),
    )


@pytest.mark.parametrize("called", ["compiled"], indirect=True)
def test_what_torch_compile_cannot_capture_is_named(called):
    """Around `torch.compile(model)` no setting of ours is in force."""
    _, model = made()
    model.p.a.register_full_backward_hook(reads_gradients)
    with pytest.raises(Exception, match=r"backward hook 'reads_gradients' \(.*\) on 'p.a'"):
        called(model)(tokens().requires_grad_())


@pytest.mark.parametrize("called", ["compiled"], indirect=True)
def test_a_forward_that_was_not_adopted_is_named(called):
    _, model = made()
    model.q.forward = types.MethodType(Block.forward, model.q)
    with pytest.raises(Exception, match=r"forward 'Block.forward' \(.*test_ownership.py.* on 'q'"):
        called(model)(tokens())


def test_old_backward_hooks_are_named():
    _, model = made()
    model.p.a.register_backward_hook(reads_gradients)
    with pytest.raises(mhc_compile.MhcError, match=r"old backward hook .* on 'p.a'"):
        model(tokens())


@pytest.mark.parametrize("hook", [scales_gradients_before, scales_gradients])
@CHANGEABLE
def test_a_backward_hook_that_returns_the_gradient_of_a_stream_is_named(hook, called):
    _, model = made()
    call = called(model)
    register(model.p if hook is scales_gradients_before else model.q, hook)
    out = call(tokens())
    named = rf"'{hook.__name__}' \(.*test_hooks.py:\d+\) on a Block"
    with pytest.raises(mhc_compile.MhcError, match=named):
        out.sum().backward()


# --- backward hooks, as torch calls them ----------------------------------------------------------


class Twice(Root):
    """One module in two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.p.b = self.p.a


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor, double: bool = False) -> tuple[Tensor, Tensor]:
        return self.linear(x) * scale, x.mean() * (2 if double else 1)


class Arguments(nn.Module):
    """Branches with several arguments, by position and by name, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = Scaled(), Scaled(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x, self.scale, True)[0]
        y, mean = self.b(x=x, scale=self.scale)
        return x + mean * y


class Checkpointed(Root):
    def forward(self, x: Tensor) -> Tensor:
        return self.q(checkpoint(self.p, x, use_reentrant=False))


@pytest.mark.parametrize(
    ("make", "places", "trained"),
    [
        (Root, ["p", "p.a", "q", "q.b"], True),
        (Root, ["p", "p.a"], False),  # no argument has a gradient
        (Twice, ["p.a"], True),
        (Arguments, ["a"], True),
        (Arguments, ["b"], True),
        (Checkpointed, ["p", "p.a"], True),
    ],
)
@CHANGEABLE
def test_backward_hooks_see_what_they_see_in_the_plain_model(make, places, trained, called):
    plain, model = made(make)
    call = called(model)
    for place in places:
        both(plain, model, place, reads_gradients)

    def run(function: Callable[..., Tensor]) -> None:
        function(tokens().requires_grad_(trained)).square().sum().backward()

    _, expected = seen_by(lambda: run(plain))
    _, actual = seen_by(lambda: run(call))
    assert expected and any(t is not None and t.any() for t in expected)
    assert_equal(actual, expected)
    assert not backward_hooks._waiting
    checks.assert_moves(model, (tokens(),), called=call)


def test_hooks_for_all_modules():
    plain, model = made()
    with register_module_full_backward_hook(reads_gradients):
        _, expected = seen_by(lambda: results(plain, plain))
        _, actual = seen_by(lambda: results(model, model))
    assert len(expected) == 2 * 7
    assert_equal(actual, expected)
    checks.assert_moves(model, (tokens(),))


# Of a compiled graph torch allows no second backward otherwise, hooks or none.
@torch._functorch.config.patch(donated_buffer=False)
@CHANGEABLE
def test_calls_whose_backward_comes_late_or_twice_or_in_part(called):
    _, model = made()
    call = called(model)
    register(model.p.a, reads_gradients)
    x = tokens().requires_grad_()
    _, once = seen_by(lambda: call(x).sum().backward())
    loss = call(x).sum() + 2 * call(x).sum()
    _, first = seen_by(lambda: loss.backward(retain_graph=True))
    _, again = seen_by(loss.backward)
    assert_equal(first, again)
    assert len(first) == 2 * len(once)
    assert_equal(first, [*(2 * t for t in once), *once])
    torch.autograd.grad(call(x).sum(), [model.p.a.weight])  # past the hook's second half
    assert not backward_hooks._waiting
    checks.assert_moves(model, (tokens(),), called=call)


def test_a_hook_removed_between_forward_and_backward_is_an_error():
    _, model = made()
    handle = register(model.p.a, reads_gradients)
    out = model(tokens())
    handle.remove()
    with pytest.raises(mhc_compile.MhcError, match="Remove it behind the backward"):
        out.sum().backward()


def test_dynamo_is_left_as_it_was():
    _, model = made()
    register(model.p.a, reads_gradients)
    model(tokens()).sum().backward()
    assert torch.nn.modules.module.BackwardHook is torch.utils.hooks.BackwardHook


# --- a state that is written into -----------------------------------------------------------------


class Writes(Root):
    """As pre-hooks do, and models with class tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[0] = 1.0
        return self.q(self.p(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_streams_begin_behind_the_write(gradients):
    plain, model = made(Writes)
    checks.assert_transformed(plain, model, (tokens(),))
    x = tokens()
    x[0] = 1.0
    with torch.set_grad_enabled(gradients):
        assert checks.error(model(tokens()), recurrence(model, x)) < EXACT


@CHANGEABLE
def test_a_pre_hook_may_replace_the_first_state(called):
    plain, model = made()
    call = called(model)
    call(tokens())
    both(plain, model, "p", replaces_before)
    checks.assert_transformed(plain, model, (tokens(),), called=call)
    x = tokens()
    x[0] = 1.0
    assert checks.error(call(tokens()), recurrence(model, x)) < EXACT


# --- a state that is to require a gradient --------------------------------------------------------


class Normed(Root):
    """What comes first is no graph input, and a leaf where nothing is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


def is_recorded(module, args, out):
    out.requires_grad_(True)


@CHANGEABLE
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("place", ["first", "p", "p.a"])
def test_a_hook_may_require_gradients_where_none_are_recorded(place, frozen, called):
    """`enable_input_require_grads` of transformers registers such a hook on the embedding."""
    plain, model = made(Normed)
    call = called(model)
    call(tokens())
    for m in (plain, model):
        m.first.requires_grad_(not frozen)
        m.get_submodule(place).register_forward_hook(is_recorded)
    try:
        checks.assert_transformed(plain, model, (tokens(),), called=call)
        expected = recurrence(model, model.first(tokens())).detach()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert checks.error(call(tokens()), expected) < EXACT
    except ChainBrokenError as error:  # older Dynamos do not trace such a hook
        assert torch.__version__ < "2.13" and "requires_grad_() call" in str(error)


# --- names ----------------------------------------------------------------------------------------


class Hook:
    def method(self, module, args, out):
        return None

    def __call__(self, module, args, out):
        return None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (reads, "'reads'"),
        (functools.partial(reads, None), "'reads'"),
        (Hook().method, "'Hook.method'"),
        (Hook(), "'Hook'"),
        (functools.wraps(reads)(lambda *args: None), "'reads'"),
    ],
)
def test_a_hook_is_described_by_name_and_place(function, name):
    assert hooks.described(function).startswith(f"{name} ({__file__}:")


def test_hooks_near_the_trouble_are_named_first_and_not_all():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    for linear in model:
        linear.register_forward_hook(reads)
    text = hooks.standing_on([model], "the add in module '6'")
    assert text.index("on '6'") < text.index("on '0'")
    assert "and 4 more" in text
    assert hooks.standing_on([nn.Linear(2, 2)]) == ""


@CHANGEABLE
def test_forward_hooks_for_all_modules_count_at_the_next_call(called):
    """Dynamo guards none of them."""
    plain = Root().double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    call = called(model)
    before = call(tokens())

    def doubles(module, args, out):
        return 2 * out if isinstance(module, torch.nn.Linear) else None

    handle = register_module_forward_hook(doubles)
    try:
        assert checks.error(call(tokens()), before) > 1e-2
        checks.assert_transformed(plain, model, (tokens(),), called=call)
    finally:
        handle.remove()
    with checks.parameters_kept(model):
        checks.assert_moves(model, (tokens(),), called=call)

"""canonicalize: one spelling of adds and norms, and the same function as before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mhc_compile.passes.sites.canonicalize import canonicalize

from ..graphs import WIDTH, Program, captured, operations, stream


def add_(m, x):
    z = m.a(x)
    z += x
    z.add_(m.b(z))
    return z


SPELLINGS = {
    "operator": lambda m, x: x + m.a(x),
    "method": lambda m, x: x.add(m.a(x)),
    "function": lambda m, x: torch.add(x, m.a(x)),
    "alpha": lambda m, x: torch.add(x, m.a(x), alpha=0.5),
    "dunder": lambda m, x: x.__add__(m.a(x)),
    "sum": lambda m, x: sum([x, m.a(x)]),
    "addcmul": lambda m, x: torch.addcmul(x, m.a(x), m.b(x), value=2.0),
    "baddbmm": lambda m, x: torch.baddbmm(x, m.a(x), torch.ones(2, WIDTH, WIDTH).to(x), beta=0.5),
    "in place": add_,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_add_becomes_one(name: str) -> None:
    function = SPELLINGS[name]
    gm, context = captured(function)
    canonicalize(gm, context)
    adds = [n for n in gm.graph.nodes if n.target is torch.ops.aten.add or "add" in str(n.target)]
    assert adds and all(n.target.__name__ == "add" and len(n.args) == 2 for n in adds)
    assert not any(n.kwargs for n in adds)


def both(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a program computes, and what its canonicalized graph computes on the same values."""
    program = Program(function).double()
    graphs = []

    def backend(gm, inputs):
        from mhc_compile.capture import copy_graph
        from mhc_compile.passes.context import Context

        work = copy_graph(gm)
        canonicalize(work, Context(options=None))  # type: ignore[arg-type]
        work.recompile()
        graphs.append(work)
        return work.forward

    expected = program(x.clone())
    torch.compiler.reset()
    actual = torch.compile(program, backend=backend, fullgraph=True)(x.clone())
    assert len(graphs) == 1
    return actual, expected


def aliased(m, x):
    """A view made before the write sees it: the write must stay a write."""
    z = m.a(x)
    first = z[:, 0]
    z += x
    return z.sum(-1), first


def old_value(m, x):
    z = m.a(x)
    kept = z * 2
    z += x
    return kept + z, F.relu(z, inplace=True) + z


def written_input(m, x):
    x += 1
    return x + m.a(x), x


def rms(m, x):
    h = x.to(torch.float64)
    return m.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


PROGRAMS = {
    **SPELLINGS,
    "aliased": aliased,
    "old value": old_value,
    "written input": written_input,
    "rms": rms,
    "rms by division": lambda m, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5),
    "rms by reciprocal": lambda m, x: x * (1 / (x.square().mean(2, True) + 1e-5).sqrt()),
    "rms by power": lambda m, x: (torch.mean(x**2, dim=-1, keepdim=True) + 1e-5) ** -0.5 * x,
    "variance of another": lambda m, x: x * torch.rsqrt((2 * x).pow(2).mean(-1, True) + 1e-5),
    "mean over tokens": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-5),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_function_stays_the_same(name: str) -> None:
    actual, expected = both(PROGRAMS[name], stream().double())
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["rms", "rms by division", "rms by reciprocal", "rms by power"])
def test_rms_norm_written_out_is_joined(name: str) -> None:
    gm, context = captured(PROGRAMS[name])
    canonicalize(gm, context)
    assert operations(gm).count("rms_norm") == 1 and "rsqrt" not in operations(gm)


@pytest.mark.parametrize("name", ["variance of another", "mean over tokens"])
def test_what_only_looks_like_rms_norm_is_left(name: str) -> None:
    gm, context = captured(PROGRAMS[name])
    canonicalize(gm, context)
    assert "rms_norm" not in operations(gm)


def test_a_write_that_a_view_can_see_is_left() -> None:
    gm, context = captured(aliased)
    canonicalize(gm, context)
    assert "iadd" in operations(gm)


def test_a_checkpointed_body_is_inlined_and_tagged() -> None:
    def block(m, x):
        return x + m.b(torch.relu(m.a(x)))

    gm, context = captured(lambda m, x: checkpoint(block, m, x, use_reentrant=False))
    assert "tag_activation_checkpoint" in operations(gm)
    canonicalize(gm, context)
    assert operations(gm) == ["linear", "relu", "linear", "add"]
    tagged = [n for n in gm.graph.nodes if "recompute" in n.meta]
    assert len(tagged) == 4 and {n.meta["ac_graph_id"] for n in tagged} == {0}


def test_a_graph_that_needs_nothing_is_reported_unchanged() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    assert not canonicalize(gm, context).changed


def test_dropout_that_nobody_reads_still_draws_its_numbers() -> None:
    """The plain model draws them, and what is drawn later depends on it."""

    def function(m, x):
        x.add(F.dropout(m.a(x), 0.5))  # respelled, and read by nobody
        return F.dropout(m.b(x), 0.5)

    gm, context = captured(function)
    canonicalize(gm, context)
    assert operations(gm).count("dropout") == 2

"""Random residual programs: sites are the oracle's, outputs and gradients the plain program's.

`make fuzz` runs new ones for some minutes (`MINUTES=60`), or so many of them (`N=20000`), from a
seed that it prints; `SEED=…` runs those of that seed. A failure is shrunk and printed as Python,
which can be pasted into a file and run, and with the command that finds it again.

Note: What float64 resolves
    Some programs have a step in float32. How much that blurs is measured, by the same program with
    float64 in its place: nothing may be further from that truth than FACTOR times what the original
    is, and a perturbed program has to move by ten times as much. A fixed bound would be too loose
    for a program whose later steps forget the float32 step, and asks it to move more than it can.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile import Config
from mhc_compile.capture import copy_graph
from mhc_compile.compiler.context import context_of
from mhc_compile.errors import NoSitesError
from mhc_compile.model import callbacks
from mhc_compile.model.connection import StreamParameters
from mhc_compile.passes.graph import writer
from mhc_compile.passes.sites import find as detector
from mhc_compile.passes.sites.canonicalize import canonicalize
from mhc_compile.passes.sites.detect import detect
from tests import checks
from tests.zoo.rewritten import Captured

from .capture import captured
from .oracle import residual_adds
from .programs import FEATURES, Around, Branch, Call, Program, Relayout, Site, programs

CHUNKS = 4  # each a test of its own, for pytest-xdist, with programs of its own seed
SEED = int(os.environ.get("MHC_FUZZ_SEED", "0"))
EXAMPLES = int(os.environ.get("MHC_FUZZ_EXAMPLES", "320"))  # a fifth of them are repetitions
MINUTES = float(os.environ.get("MHC_FUZZ_MINUTES", "0"))  # round after round, each of a new seed
ROUND = 80  # programs of a seed where time is what ends it

THOROUGH = EXAMPLES > 1000 or MINUTES > 0
EVERY = 1 if THOROUGH else 8  # programs whose passes are also left out one by one

ROUNDING = 1e-11  # of outputs in float64; gradients are allowed a hundred times as much
FACTOR = 4  # times the error of the original's float32 steps

OPEN = ("recognize", "defer_norm", "fuse_coefficients")
"""Without these a graph has the open form that `widen` writes: the meaning of the rest."""
SELECTIONS: list[dict[str, Any]] = [
    *({"disabled": (name,)} for name in OPEN),
    *({"disabled": OPEN[count:]} for count in (1, 2)),
    {"defer_norms": True},
]

Sites = list[tuple[str, int]]  # name of the add, number of its chain


def each_program(
    number: int, examples: int, check: Callable[[Program], None], *, shrink: bool = True
) -> None:
    """Checks different random programs, the same ones for a number; prints the smallest failure."""
    seen: dict[str, bool] = {}

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(programs())
    def run(program: Program) -> None:
        text = repr(program)
        if seen.get(text):
            return
        seen[text] = False
        check(program)
        seen[text] = True

    run()


# -- sites -----------------------------------------------------------------------------------------


def numbered(sites: list[tuple[str, Any]]) -> Sites:
    """Sites with their chains numbered in order of appearance."""
    numbers: dict[Any, int] = {}
    return [(name, numbers.setdefault(chain, len(numbers))) for name, chain in sites]


def sites_of_oracle(graph: fx.Graph) -> Sites:
    """What the oracle takes, in the order of the graph."""
    return numbered([(f.add.name, f.chain) for f in residual_adds(graph) if f.verdict == "site"])


def sites_of_detector(gm: fx.GraphModule, model: nn.Module) -> Sites:
    """What the detector takes, under the names that the adds had before canonicalization."""
    gm = copy_graph(gm)
    for node in gm.graph.nodes:
        node.meta["captured_as"] = node.name
    inputs = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    context = context_of(gm, inputs, model, config=Config())
    inherited = (*writer._INHERITED, "captured_as")
    with patch.object(writer, "_INHERITED", inherited):
        canonicalize(gm, context)
    detect(gm, context)
    assert context.detection is not None
    return numbered([(s.node.meta["captured_as"], s.chain) for s in context.detection.sites])


def check_sites(program: Program) -> Sites:
    """The detector takes what the oracle takes, in the same chains."""
    model = program.build()
    gm = captured(model, *program.inputs())
    expected = sites_of_oracle(gm.graph)
    assert sites_of_detector(gm, model) == expected
    return expected


# -- values ----------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> checks.Run:
    """Outputs and gradients, from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = checks.tensors(model(*inputs))
    loss = checks.loss_of(outputs)
    if loss.requires_grad:  # a program without weights has nothing to differentiate
        loss.backward()
    gradients = checks.gradients_of(model.named_parameters())
    return checks.Run([o.detach().clone() for o in outputs], gradients, {})


def check_program(program: Program, *, thorough: bool = False) -> None:
    """Sites are the oracle's; at init nothing changes; perturbed, all passes compute the same.

    Args:
        thorough: passes are left out, whether or not this program is one of EVERY.
    """
    sites = check_sites(program)
    model, inputs = program.build(), program.inputs()
    plain = run(model, inputs)
    if not sites:
        with pytest.raises(NoSitesError):
            mhc_compile.transform(model, n=program.n, example_inputs=inputs)
        return

    exact = plain if program.exact else run(program.build(exact=True), inputs)
    equal, calls = run_transformed(program, model, perturbed=False)
    assert len(list(mhc_compile.parameters(model))) == 3 * len(sites)
    assert_as_exact(equal, plain, exact)

    blur = checks.output_error(plain.outputs, exact.outputs)
    moves = 10 * (ROUNDING + FACTOR * blur)
    checks.perturb(model)  # not `assert_moves`: a random program has groups that nothing reads
    other = run(model, inputs)
    assert checks.output_error(other.outputs, plain.outputs) > moves
    assert all(any(g.any() for g in site.values()) for site in gradients_of_sites(model))
    assert all(o.isfinite().all() for o in other.outputs)
    assert all(g.isfinite().all() for g in other.gradients.values())
    number = sum(repr(program).encode())
    if thorough or number % EVERY == 0:
        check_passes(program, calls, number // EVERY)


def gradients_of_sites(model: nn.Module) -> list[dict[str, Tensor]]:
    """The gradients of each site, by parameter."""
    found = (m for m in model.modules() if isinstance(m, StreamParameters))
    return [checks.gradients_of(m.named_parameters()) for m in found]


def run_transformed(
    program: Program, model: nn.Module, *, perturbed: bool
) -> tuple[checks.Run, Captured]:
    """Transform a program's model and call it."""
    inputs = program.inputs()
    mhc_compile.transform(model, n=program.n, example_inputs=inputs)
    if perturbed:
        checks.perturb(model)
    calls = Captured(model)
    with patch.object(callbacks, "eager", calls.backend):
        return run(model, inputs), calls


def check_passes(program: Program, calls: Captured, number: int) -> None:
    """All passes, and one of the other selections, compute what the open form computes.

    Partitioned, a program goes through `fuse_seams` as well.
    """
    open_form = exact = calls.run(calls.eagerly(disabled=OPEN))
    if not program.exact:
        _, in_float64 = run_transformed(program, program.build(exact=True), perturbed=True)
        exact = in_float64.run(in_float64.eagerly(disabled=OPEN))
    other = SELECTIONS[number % len(SELECTIONS)]
    for rewritten in (calls.eagerly(), calls.eagerly(**other), calls.partitioned()):
        assert_as_exact(calls.run(rewritten), open_form, exact)


def assert_as_exact(actual: checks.Run, original: checks.Run, exact: checks.Run) -> None:
    """No further from the exact result than FACTOR times what the original is, and rounding."""
    blur = checks.output_error(original.outputs, exact.outputs)
    assert checks.output_error(actual.outputs, exact.outputs) <= ROUNDING + FACTOR * blur
    blur = checks.gradient_error(original.gradients, exact.gradients)
    error = checks.gradient_error(actual.gradients, exact.gradients)
    assert error <= 100 * ROUNDING + FACTOR * blur


@pytest.mark.timeout(0 if THOROUGH else 1200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk: int) -> None:
    if not MINUTES:
        with told_how_again(f"SEED={SEED} N={EXAMPLES}"):
            each_program(SEED + chunk, EXAMPLES // CHUNKS, check_program)
        return
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    check = Until(time.monotonic() + 60 * MINUTES * min(processes, CHUNKS) / CHUNKS, check_program)
    for number in count(SEED + chunk, CHUNKS):
        with told_how_again(f"SEED={number}"):
            each_program(number, ROUND, check)
        if time.monotonic() > check.end:
            return


class Until:
    """A check that passes whatever comes after the end; a failure is still shrunk."""

    def __init__(self, end: float, check: Callable[[Program], None]) -> None:
        self.end, self.check, self.failed = end, check, False

    def __call__(self, program: Program) -> None:
        if time.monotonic() > self.end and not self.failed:
            return
        try:
            self.check(program)
        except BaseException:
            self.failed = True
            raise


@contextmanager
def told_how_again(options: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"The same programs again: make fuzz {options}")
        raise


PERMUTED = Program(
    steps=(
        Site((Branch("sdpa"),), (1, 0), (2,), ("add__branch",), skip="dropout"),
        Relayout("bct"),
        Call(
            (
                Around(
                    "outer",
                    (
                        Site(
                            (Branch("mlp", "layer_norm", after="layer_norm", scale="learned"),),
                            (0, 1),
                            (2,),
                            ("method_add",),
                            skip="layer_norm",
                        ),
                    ),
                    Branch("token_mix", after="layer_norm", scale="learned"),
                ),
            ),
            times=2,
        ),
    ),
    tokens=5,
)
"""The backward of a norm of a permuted stream makes other strides than its fake says."""


def test_results_in_other_strides_than_those_of_their_fakes() -> None:
    check_program(PERMUTED, thorough=True)


def test_every_feature_occurs_twenty_times() -> None:
    seen: Counter[str] = Counter()
    for chunk in range(CHUNKS):
        each_program(chunk, EXAMPLES // CHUNKS, lambda program: seen.update(program.features))
    assert set(seen) == FEATURES
    assert {feature: n for feature, n in seen.items() if n < 20} == {}


# -- seeded bugs -----------------------------------------------------------------------------------


def forget_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain ends at a norm, as if LayerNorm were not stream-wise."""
    right = detector.streamwise_operands
    wrong = lambda node: [] if detector.op_of(node).name == "layer_norm" else right(node)  # noqa: E731
    monkeypatch.setattr(detector, "streamwise_operands", wrong)


def never_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel branches are not gathered into one sum."""
    monkeypatch.setattr(detector.Finder, "_merges", lambda self, inner, sibling: False)


def take_recurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that starts at a constant, and on which no weight acts, counts as a stream."""
    monkeypatch.setattr(detector.Finder, "_is_learned", lambda self, x, terms: True)


def take_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of two states of one stream counts as a site."""
    monkeypatch.setattr(detector.Finder, "_is_later_state", lambda self, node, x: False)


@pytest.mark.parametrize("bug", [forget_norms, never_merge, take_recurrences, take_states])
def test_seeded_bug_is_caught(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Program] = []

    def check(program: Program) -> None:
        try:
            check_sites(program)
        except AssertionError:
            caught.append(program)
            raise

    bug(monkeypatch)
    with pytest.raises(AssertionError):
        each_program(0, EXAMPLES // CHUNKS, check, shrink=False)
    monkeypatch.undo()
    check_sites(caught[0])  # the bug, and nothing else, is what was caught

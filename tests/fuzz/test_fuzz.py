"""Random residual programs: sites are the oracle's, outputs and gradients the plain program's.

`MHC_FUZZ_EXAMPLES=20000` (`make fuzz N=20000`) runs more of them. A failure is shrunk and printed
as Python, which can be pasted into a file and run.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile import Config, backend
from mhc_compile.capture import copy_graph
from mhc_compile.passes import detect as detector
from mhc_compile.passes.canonicalize import canonicalize
from mhc_compile.passes.detect import detect
from mhc_compile.passes.errors import NoSitesError
from mhc_compile.transform import context_of
from tests import checks
from tests.zoo.rewritten import Captured

from .capture import captured
from .oracle import residual_adds
from .programs import FEATURES, Program, programs

CHUNKS = 4  # each a test of its own, for pytest-xdist; and the seed of its programs
EXAMPLES = int(os.environ.get("MHC_FUZZ_EXAMPLES", "320"))  # a fifth of them are repetitions

EVERY = 1 if EXAMPLES > 1000 else 8  # programs whose passes are also left out one by one

OPEN = ("recognize", "defer_norm", "fuse_coefficients")
"""Without these a graph has the open form that `widen` writes: the meaning of the rest."""
SELECTIONS: list[dict[str, Any]] = [
    *({"disabled": (name,)} for name in OPEN),
    *({"disabled": OPEN[count:]} for count in (1, 2)),
    {"defer_norms": True},
]

Sites = list[tuple[str, int]]  # name of the add, number of its chain


def each_program(
    chunk: int, examples: int, check: Callable[[Program], None], *, shrink: bool = True
) -> None:
    """Checks different random programs, the same ones in every run; prints the smallest failure."""
    seen: dict[str, bool] = {}

    @seed(chunk)
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
    context = context_of(gm, inputs, model, Config())
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


def check_program(program: Program) -> None:
    """Sites are the oracle's; at init nothing changes; perturbed, all passes compute the same."""
    sites = check_sites(program)
    model, inputs = program.build(), program.inputs()
    tolerance = 1e-11 if program.exact else 1e-5  # float32 on the way rounds differently
    plain = run(model, inputs)
    if not sites:
        with pytest.raises(NoSitesError):
            mhc_compile.transform(model, n=program.n, example_inputs=inputs)
        return

    mhc_compile.transform(model, n=program.n, example_inputs=inputs)
    assert len(list(mhc_compile.parameters(model))) == 3 * len(sites)
    calls = Captured(model)
    with patch.object(backend, "eager", calls.backend):
        equal = run(model, inputs)
    assert_equal(equal, plain, tolerance)

    other = checks.assert_moves(model, inputs, plain, moves=10 * tolerance)
    assert all(o.isfinite().all() for o in other.outputs)
    assert all(g.isfinite().all() for g in other.gradients.values())
    number = sum(repr(program).encode())
    if number % EVERY == 0:
        check_passes(calls, number // EVERY, tolerance)


def check_passes(calls: Captured, number: int, tolerance: float) -> None:
    """All passes, and one of the other selections, compute what the open form computes.

    Partitioned, a program goes through `fuse_seams` as well.
    """
    truth = calls.run(calls.eagerly(disabled=OPEN))
    other = SELECTIONS[number % len(SELECTIONS)]
    for rewritten in (calls.eagerly(), calls.eagerly(**other), calls.partitioned()):
        assert_equal(calls.run(rewritten), truth, tolerance)


def assert_equal(actual: checks.Run, expected: checks.Run, tolerance: float) -> None:
    assert checks.output_error(actual.outputs, expected.outputs) < tolerance
    assert checks.gradient_error(actual.gradients, expected.gradients) < 100 * tolerance


@pytest.mark.timeout(0 if EXAMPLES > 1000 else 1200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk: int) -> None:
    each_program(chunk, EXAMPLES // CHUNKS, check_program)


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
    wrong = lambda node: [] if detector.op_name(node) == "layer_norm" else right(node)  # noqa: E731
    monkeypatch.setattr(detector, "streamwise_operands", wrong)


def never_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel branches are not gathered into one sum."""
    monkeypatch.setattr(detector._Detector, "_merges", lambda self, inner, sibling: False)


def take_recurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that starts at a constant, and on which no weight acts, counts as a stream."""
    monkeypatch.setattr(detector._Detector, "_is_learned", lambda self, x, terms: True)


def take_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of two states of one stream counts as a site."""
    monkeypatch.setattr(detector._Detector, "_is_later_state", lambda self, node, x: False)


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

"""Every model of tests/zoo under `backend="mhc"` with Inductor.

    python -m benchmarks.zoo               all models, about a minute each on one core
    python -m benchmarks.zoo llama t5      only these

The rows measured replace those of benchmarks/results/zoo.json; docs/zoo.md is written from it.

All figures are of training mode in float32: forward and backward, dropout and stochastic depth on,
the same random state in both runs. Errors are norms of differences over norms, the worst of a
model's outputs or gradients. Where one exceeds `TOLERANCE`, the plain model is compiled by Inductor
too: if its error is the same, the defect is Inductor's, otherwise the command fails.
"""

import copy
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mhc_compile
from benchmarks import harness
from tests import checks
from tests.zoo.models import BY_NAME, Model

TOLERANCE = 1e-3
# Inductor has random numbers of its own, which no eager run can repeat: use PyTorch's.
OPTIONS = {"fallback_random": True}
HEADER = """\
# The zoo under Inductor

`make zoo`, n = 4, float32, training mode, measured on {processor}, {cores} cores, torch {torch}.
The compiled transformed model is compared twice. At initialisation: with the plain eager one
(outputs; gradients of all original parameters). With all mHC parameters perturbed (σ = 0.5): with
the transformed one run eagerly (outputs; gradients of all parameters). Errors are norms of
differences over norms, the worst of a model's outputs or gradients. Seconds are those
of the first forward and backward, compilation included, on a machine that did other work too.
Operators are those of the compiled forward graph; none where Inductor took it from its cache,
because it is the graph of the model above.

| model | sites | chains | output | gradient | perturbed output | perturbed gradient | seconds \
| operators |
|---|---:|---:|---:|---:|---:|---:|---:|---|
"""
FOOTNOTE = """
\\* Inductor's own: the plain model of {name}, compiled by Inductor and compared with its eager run,
has an output error of {plain_output:.1e} and a gradient error of {plain_gradient:.1e}.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; the plain errors are zero where they were not needed."""

    name: str
    sites: int
    chains: int
    output: float
    gradient: float
    perturbed_output: float
    perturbed_gradient: float
    seconds: float
    operators: str
    plain_output: float = 0.0
    plain_gradient: float = 0.0

    @property
    def marked(self) -> bool:
        """Whether Inductor miscompiles the plain model too."""
        return max(self.plain_output, self.plain_gradient) > TOLERANCE

    def markdown(self) -> str:
        errors = (self.output, self.gradient, self.perturbed_output, self.perturbed_gradient)
        cells = [self.name + " \\*" * self.marked, str(self.sites), str(self.chains)]
        cells += [f"{e:.1e}" for e in errors]
        return f"| {' | '.join(cells)} | {self.seconds:.0f} | {self.operators} |"


def measure(entry: Model) -> Row:
    """Compile one model with the mhc backend and compare it with its eager runs.

    Raises:
        AssertionError: an error exceeds the tolerance, and Inductor alone does not explain it.
    """
    torch._dynamo.reset()
    plain, inputs = entry.make(), entry.example()
    expected = checks.run(plain, inputs)
    model = mhc_compile.transform(copy.deepcopy(plain), n=4, example_inputs=inputs)
    eager = copy.deepcopy(model)

    model.compile(backend="mhc", options=OPTIONS)
    start = time.perf_counter()
    actual = checks.run(model, inputs)
    seconds = time.perf_counter() - start
    graph = mhc_compile.graphs(model)[-1]
    forward = [e.operators for e in graph.history if e.graph == "forward"][-1]
    counts = ", ".join(f"{count} {name}" for name, count in Counter(forward).items())

    checks.perturb(model)
    checks.perturb(eager)
    perturbed, reference = checks.run(model, inputs), checks.run(eager, inputs)
    assert checks.output_error(reference.outputs, expected.outputs) > 1e-3
    found = errors(actual, expected)
    row = Row(
        entry.name,
        len(graph.sites),
        len({site.chain for site in graph.sites}),
        *found,
        *errors(perturbed, reference),
        seconds,
        counts,
    )
    if max(*found, row.perturbed_output, row.perturbed_gradient) <= TOLERANCE:
        return row
    alone = errors_of_inductor(plain, inputs, expected)
    same = all(abs(a - f) <= 0.01 * f + TOLERANCE for a, f in zip(alone, found, strict=True))
    assert same, f"{row.markdown()} but under Inductor alone {alone}"
    return Row(**{**asdict(row), "plain_output": alone[0], "plain_gradient": alone[1]})


def errors(actual: checks.Run, expected: checks.Run) -> tuple[float, float]:
    """The worst errors of outputs and of gradients."""
    return (
        checks.output_error(actual.outputs, expected.outputs),
        checks.gradient_error(actual.gradients, expected.gradients),
    )


def errors_of_inductor(
    plain: nn.Module, inputs: Mapping[str, Tensor], expected: checks.Run
) -> tuple[float, float]:
    """What Inductor makes of the plain model."""
    torch._dynamo.reset()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="inductor", options=OPTIONS)
    return errors(checks.run(compiled, inputs), expected)


def document(results: dict[str, Any]) -> str:
    rows = [Row(**row) for row in results["rows"]]
    text = HEADER.format(**results["machine"]) + "".join(row.markdown() + "\n" for row in rows)
    return text + "".join(FOOTNOTE.format(**asdict(row)) for row in rows if row.marked)


def main(names: list[str]) -> None:
    known = harness.read("zoo") or {"rows": ()}
    rows = {row["name"]: row for row in known["rows"]}
    where = {**harness.machine(), "transformers": transformers.__version__}
    for name in names or BY_NAME:
        row = measure(BY_NAME[name])
        print(row.markdown(), flush=True)
        rows[name] = asdict(row)
        ordered = [rows[name] for name in BY_NAME if name in rows]
        results = {"machine": where, "rows": ordered}
        harness.write("zoo", results, zoo=document(results))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every model of tests/zoo under `backend="mhc"` with Inductor; writes docs/zoo.md.

    python benchmarks/zoo.py               all models, about a minute each on one core
    python benchmarks/zoo.py llama t5      only these, printed and not written

All figures are of training mode in float32: forward and backward, dropout and stochastic depth on,
the same random state in both runs. Errors are norms of differences over norms, the worst of a
model's outputs or gradients.
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mhc_compile  # noqa: E402
from tests.zoo import checks  # noqa: E402
from tests.zoo.models import BY_NAME, Model  # noqa: E402

HEADER = """\
# The zoo under Inductor

`python benchmarks/zoo.py`: torch {torch}, transformers {transformers}, CPU, float32, training mode,
n = 4. The compiled transformed model is compared twice. At initialisation: with the plain eager one
(outputs; gradients of all original parameters). With all mHC parameters perturbed (σ = 0.5): with
the transformed one run eagerly (outputs; gradients of all parameters). Errors are norms of
differences over norms, the worst of a model's outputs or gradients. The last column is the time of
the first forward and backward, compilation included.

| model | sites | chains | output | gradient | perturbed output | perturbed gradient | seconds |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    sites: int
    chains: int
    output: float
    gradient: float
    perturbed_output: float
    perturbed_gradient: float
    seconds: float

    def markdown(self) -> str:
        errors = (self.output, self.gradient, self.perturbed_output, self.perturbed_gradient)
        cells = [self.name, str(self.sites), str(self.chains), *(f"{e:.1e}" for e in errors)]
        return f"| {' | '.join(cells)} | {self.seconds:.0f} |"


def measure(entry: Model) -> Row:
    """Compile one model with the mhc backend and compare it with its eager runs."""
    torch._dynamo.reset()
    plain, inputs = entry.make(), entry.example()
    expected = checks.run(plain, inputs)
    model = mhc_compile.transform(copy.deepcopy(plain), n=4, example_inputs=inputs)
    eager = copy.deepcopy(model)

    model.compile(backend="mhc")
    start = time.perf_counter()
    actual = checks.run(model, inputs)
    seconds = time.perf_counter() - start
    sites = mhc_compile.graphs(model)[-1].sites

    checks.perturb(model)
    checks.perturb(eager)
    perturbed, reference = checks.run(model, inputs), checks.run(eager, inputs)
    assert checks.output_error(reference.outputs, expected.outputs) > 1e-3
    return Row(
        entry.name,
        len(sites),
        len({site.chain for site in sites}),
        checks.output_error(actual.outputs, expected.outputs),
        checks.gradient_error(actual.gradients, expected.gradients),
        checks.output_error(perturbed.outputs, reference.outputs),
        checks.gradient_error(perturbed.gradients, reference.gradients),
        seconds,
    )


def main(names: list[str]) -> None:
    import transformers

    rows = []
    # Inductor has random numbers of its own, which no eager run can repeat: use PyTorch's.
    with torch._inductor.config.patch(fallback_random=True):
        for name in names or BY_NAME:
            rows.append(measure(BY_NAME[name]).markdown())
            print(rows[-1], flush=True)
    if not names:
        header = HEADER.format(torch=torch.__version__, transformers=transformers.__version__)
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "zoo.md").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every model of tests/zoo in float64: equal to the plain one, perturbed, and the rotation test.

    python -m benchmarks.rotation               all models, some seconds each
    python -m benchmarks.rotation llama flux    only these

A row is added, or replaced, as soon as it was measured: benchmarks/results/rotation.json has them
all, docs/models.md is written from it. What a model fails at stands in its row, and then the
command fails. Models of timm and diffusers are measured where these are installed.
"""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

import mhc_compile
from benchmarks import harness
from tests import checks
from tests.zoo.models import ZOO, Model
from tests.zoo.more import DIFFUSERS, MORE, TIMM
from tests.zoo.rotation import assert_streams_take_turns

MODELS = {entry.name: entry for entry in (*ZOO, *MORE)}
ORDER = list(dict.fromkeys([*MODELS, *(entry.name for entry in (*TIMM, *DIFFUSERS))]))
HEADER = """\
# Models that are transformed

`make zoo`: {passed} of {count} models pass; n = 4, float64, training mode. Sites and chains are
as many as a reader of the source counts. *Equal*: the transformed model and the plain one, at the
start, the worst relative error of outputs, and of gradients. *Moved*: how far the outputs are once
all mHC parameters are perturbed (σ = 0.5); then every group of parameters has a gradient. *Turned*
is the second truth (`tests/zoo/rotation.py`): with one-hot H_pre and H_post and permutations as
H_res one stream after the other is the active one; how far outputs and gradients of these routes
are apart. *Not plain*: how far they are from the plain model. *Lost*: how far the output is, at
least, where a site reads another stream than the active one. Seconds are for all of it, on a
machine that did other work too.

| model | sites | chains | equal: outputs | gradients | moved | turned | not plain | lost \
| versions | seconds |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; of a model that failed, only the reason."""

    name: str
    versions: str
    seconds: float = 0.0
    sites: int = 0
    chains: int = 0
    outputs: float = 0.0
    gradients: float = 0.0
    moved: float = 0.0
    turned: float = 0.0
    plain: float = 0.0
    lost: float | None = None
    failed: str = ""

    def markdown(self) -> str:
        if self.failed:
            return f"| {self.name} | **fails** | {self.failed} | | | | | | | {self.versions} | |"
        errors = (self.outputs, self.gradients, self.moved, self.turned, self.plain, self.lost)
        cells = [self.name, str(self.sites), str(self.chains)]
        cells += ["" if e is None else f"{e:.0e}" for e in errors]
        return f"| {' | '.join(cells)} | {self.versions} | {self.seconds:.0f} |"


def measure(entry: Model) -> Row:
    """Compare one transformed model with the plain one, and its routes with each other.

    Raises:
        AssertionError: they are not what they should be.
        MhcError: the model is refused.
    """
    start = time.perf_counter()
    plain, inputs = entry.make(torch.float64), entry.example(torch.float64)
    model = mhc_compile.transform(copy.deepcopy(plain), n=4, example_inputs=inputs)
    with checks.parameters_kept(model):
        compared = checks.assert_transformed(plain, model, inputs)
    sites = checks.sites_of(model)
    chains = {site.chain for site in sites}
    assert (len(sites), len(chains)) == (entry.sites, entry.chains), [s.name for s in sites]
    turns = assert_streams_take_turns(plain, model, inputs)
    gradients = [run.gradients for run in (compared.start, compared.plain)]
    return Row(
        entry.name,
        versions_of(entry),
        time.perf_counter() - start,
        len(sites),
        len(chains),
        checks.output_error(compared.start.outputs, compared.plain.outputs),
        checks.gradient_error(*gradients),
        checks.output_error(compared.perturbed.outputs, compared.plain.outputs),
        **asdict(turns),
    )


def versions_of(entry: Model) -> str:
    """Of torch and of the library that the model is from."""
    library = next(
        (name for name, group in (("timm", TIMM), ("diffusers", DIFFUSERS)) if entry in group),
        "transformers",
    )
    return f"torch {torch.__version__}, {library} {metadata.version(library)}"


def document(results: Sequence[dict[str, Any]]) -> str:
    rows = [Row(**row) for row in results]
    passed = sum(not row.failed for row in rows)
    text = HEADER.format(passed=passed, count=len(rows))
    return text + "".join(row.markdown() + "\n" for row in rows)


def main(names: list[str]) -> bool:
    """Whether none of these models failed."""
    rows = {row["name"]: Row(**row) for row in harness.read("rotation") or ()}
    for name in names or MODELS:
        entry = MODELS[name]
        try:
            rows[name] = measure(entry)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
            rows[name] = Row(name, versions_of(entry), failed=reason)
        torch._dynamo.reset()
        print(rows[name].markdown(), flush=True)
        results = [asdict(rows[name]) for name in ORDER if name in rows]
        harness.write("rotation", results, models=document(results))
    return not any(rows[name].failed for name in names or MODELS)


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))

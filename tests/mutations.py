"""Deliberate mistakes in the optimising passes, each of which some test must notice.

    python tests/mutations.py                 all of them (`make mutants`)
    python tests/mutations.py eps sum         those with one of these words in their name

Each mistake is one replacement in a copy of the repository; then the tests of that pass run there
until the first failure. A mistake that no test notices survives: the exit status is then 1, and a
test is missing. The working tree is not touched.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_COPIED = (
    ".git",
    ".venv",
    ".versions",
    "build",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: what goes wrong, in words.
        file: a module of the passes.
        old, new: the text, which stands there exactly once, and what it becomes.
        tests: the file that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def is_applicable(self) -> bool:
        """Whether the text stands in the sources exactly once."""
        return (ROOT / "passes" / self.file).read_text().count(self.old) == 1

    def apply(self, root: Path) -> None:
        path = root / "passes" / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def _of(tests: str, file: str, *mistakes: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, f"tests/passes/{tests}") for name, old, new in mistakes]


MUTATIONS = [
    *_of(
        "open_form/test_defer_norm.py",
        "open_form/defer_norm.py",
        (
            "a deferred norm loses its eps",
            "write.call(operator.add, mean, norm.eps)",
            "write.call(operator.add, mean, 0.0)",
        ),
        (
            "a deferred norm loses its weight",
            "() if norm.weight is None else (norm.weight,)",
            "()",
        ),
        ("of two factors one is lost", "(*scales, scale)", "(scale,)"),
        (
            "a bias is divided by r",
            """\
    result = write.call(operator.mul, y, inv_r)
    if isinstance(bias, fx.Node):
        result = write.call(operator.add, result, bias)
""",
            """\
    result = y
    if isinstance(bias, fx.Node):
        result = write.call(operator.add, result, bias)
    result = write.call(operator.mul, result, inv_r)
""",
        ),
        (
            "a quotient keeps the dtype of r",
            "node.replace_all_uses_with(write.cast(result, dtype))",
            "node.replace_all_uses_with(result)",
        ),
        (
            "a norm with other readers is deferred",
            "if len(found) < len(products):",
            "if not found:",
        ),
        (
            "a norm of what is written in place is deferred",
            "if not overwritten.isdisjoint(",
            "if False and not overwritten.isdisjoint(",
        ),
        (
            "products that autocast rounds are deferred",
            "if any(before != after for before, after in dtypes):",
            "if False:",
        ),
        (
            "float16 products are deferred",
            "narrow = {torch.float16}",
            "narrow: set[torch.dtype] = set()",
        ),
        (
            "products narrower than a float64 stream are deferred",
            "narrow |= {torch.bfloat16, torch.float32}",
            "pass",
        ),
        (
            "the user's norms are deferred unasked",
            "if not (mapping or context.options.defer_norms):",
            "if False:",
        ),
        (
            "the stream of each token is divided by the r of all",
            'write.call("mean", square, -1, True)',
            'write.call("mean", square)',
        ),
    ),
    *_of(
        "open_form/test_defer_norm.py",
        "graph/norms.py",
        (
            "the default eps is that of bfloat16",
            "computed_in = torch.promote_types(value.dtype, torch.float32)",
            "computed_in = value.dtype",
        ),
    ),
    *_of(
        "fusion/test_fuse_coefficients.py",
        "fusion/fuse_coefficients.py",
        (
            "H_res takes the place of its transpose",
            """\
        if flipped:
            new = write.call("transpose", new, -1, -2)
""",
            "",
        ),
        ("H_res is applied transposed", "if form == 1:", "if form == 0:"),
        (
            "coefficients lose the eps of the norm",
            "variant.text, reading.eps, name=",
            "variant.text, 0.0, name=",
        ),
        (
            "coefficients lose the weight of the norm",
            "if m.weight is not None:",
            "if False:",
        ),
        (
            "the gates α are in reverse order",
            "alpha = given.write_alpha(write, phi, dtype)",
            'alpha = write.call("flip", given.write_alpha(write, phi, dtype), (0,))',
        ),
        (
            "h has the dtype of the streams",
            "H_pre_node, X_node, dtype, name=",
            "H_pre_node, X_node, dtype_of(X_node), name=",
        ),
        (
            "wider results are rounded to the dtype of the streams",
            "if dtype != dtype_of(X_node):",
            "if False:",
        ),
        (
            "streams written in place count as unchanged",
            "if region.written:",
            "if False:",
        ),
    ),
    *_of(
        "fusion/test_fuse_coefficients.py",
        "recognition/mapping.py",
        (
            "coefficients written in place count as unchanged",
            "if region.written:",
            "if False:",
        ),
        (
            "rounding between coefficients is ignored",
            "if isinstance(value, Tensor) and value.dtype != dtype:",
            "if False:",
        ),
        (
            "1 / r is taken for r",
            "inv_r if rms[2] else 1 / inv_r",
            "inv_r",
        ),
        (
            "a norm of other streams divides",
            "if rms is None or strip_casts(rms[0]) is not strip_casts(self.mapping.flat):",
            "if rms is None:",
        ),
        (
            "parts of different checkpoints are joined",
            "require_one_tag(used)",
            "pass",
        ),
    ),
    *_of(
        "fusion/test_fuse_coefficients.py",
        "recognition/coefficients.py",
        (
            "rows are normalised before columns",
            "found = replace(residual, pre=pre,",
            "found = replace(residual, transposed=not residual.transposed, pre=pre,",
        ),
        (
            "the gates of H_pre and H_post change places",
            "found = replace(residual, pre=pre, post=post,",
            "found = replace(residual, pre=post, post=pre,",
        ),
    ),
    *_of(
        "fusion/test_fuse_coefficients.py",
        "recognition/evaluation.py",
        ("nearly the same is the same", "_CLOSE = 1e-12", "_CLOSE = 1e-8"),
    ),
    *_of(
        "fusion/test_fuse_coefficients.py",
        "recognition/token_rules.py",
        (
            "an iteration of Sinkhorn-Knopp is lost",
            "reference.sinkhorn_knopp(call.first.data, iterations, eps)",
            "reference.sinkhorn_knopp(call.first.data, iterations + 1, eps)",
        ),
    ),
    *_of(
        "recognition/test_recognize.py",
        "recognition/recognize.py",
        (
            "projections are joined in any order",
            "gates.sort(key=lambda p: not _meets(p, (mapping.n, mapping.width)))",
            "pass",
        ),
        (
            "streams normalised one by one count as normalised together",
            "if width in normalised and n * width not in normalised:",
            "if False:",
        ),
        (
            "any outer product that is added is a connection",
            "if _shows(X, n, width) and X in around:",
            "if _shows(X, n, width):",
        ),
    ),
    *_of(
        "recognition/test_recognize.py",
        "recognition/mapping.py",
        (
            "a transposed part of b is not transposed back",
            'write.call("transpose", bias, -1, -2) if flipped else bias',
            "bias",
        ),
        (
            "a constant in the place of α is lost",
            'write.call("new_full", like, (), number)',
            'write.call("new_full", like, (), 1.0)',
        ),
    ),
    *_of(
        "recognition/test_recognize.py",
        "fusion/fuse_coefficients.py",
        ("streams are mixed with the transpose", "if form == 1:", "if False:"),
    ),
    *_of(
        "fusion/test_fuse_seams.py",
        "fusion/fuse_seams.py",
        (
            "a seam gets H_pre for dH_post",
            "arguments = (dh, dH_post, dH_res, H_pre, X, *kept, total)",
            "arguments = (dh, H_pre, dH_res, dH_post, X, *kept, total)",
        ),
        (
            "a seam gets the streams for their gradient",
            "arguments = (dh, dH_post, dH_res, H_pre, X, *kept, total)",
            "arguments = (dh, dH_post, dH_res, H_pre, X, *kept, X if total else None)",
        ),
        (
            "h is read from other streams",
            "(u for u in readers if u.args[1] is X)",
            "(u for u in readers)",
        ),
        (
            "the gradient of h goes to other streams",
            "if pre is None or pre.args[2] is not X:",
            "if pre is None:",
        ),
        (
            "a branch wider than its streams is fused",
            "if torch.promote_types(dtype_of(X), dtype) is not dtype_of(X):",
            "if False:",
        ),
    ),
    *_of(
        "fusion/test_fuse_seams.py",
        "fusion/replace.py",
        (
            "the other gradients of X are dropped",
            "return left[self.root]",
            "return None",
        ),
        (
            "one gradient of X is dropped",
            "left[addition] = present[0] if present else None",
            "left[addition] = None",
        ),
        (
            "a gradient is counted once that was added twice",
            "or len(node.all_input_nodes) != 2:",
            "or not node.all_input_nodes:",
        ),
        (
            "the factor of an addition is dropped",
            "if node.target is not _ADD or node.kwargs or",
            "if node.target is not _ADD or",
        ),
        (
            "a broadcast addition is a sum of gradients",
            "return len(dtypes) == 1 and all(",
            "return len(dtypes) == 1 or all(",
        ),
        (
            "a sum with a further reader is folded",
            "while len(node.users) == 1:",
            "while node.users:",
        ),
        (
            "dependents stay in front of the operator",
            """\
        for node in between:
            insert.move(node)
""",
            "",
        ),
        (
            "an operator is computed from its own results",
            "next((n for n in between if n in needed), None)",
            "next((n for n in between if n not in between), None)",
        ),
        (
            "random numbers are drawn in another order",
            "next((n for n in between if n.is_impure()), None)",
            "next((n for n in between if n not in between), None)",
        ),
        (
            "a value that is still read is not computed",
            "if reader is not None and (node, index) not in returned:",
            "if False:",
        ),
    ),
    *_of(
        "fusion/test_hoist_views.py",
        "fusion/hoist_views.py",
        ("others that read the streams lose them", "len(source.users) == 1", "True"),
        ("what is overwritten is read too late", "and not touched", ""),
        ("channels and streams may change places", "same_sizes(shape[-2:], rows)", "True"),
        ("streams may be flattened with tokens", "0 <= d < axes", "0 <= d"),
    ),
    *_of(
        "graph/test_modes.py",
        "graph/modes.py",
        (
            "the end of an autocast region is not seen",
            "return replace(mode, autocast=before.autocast)",
            "return mode",
        ),
        (
            "what is computed under no_grad counts as recorded",
            "return replace(mode, grad=bool(entered))",
            "return mode",
        ),
    ),
    *(
        mutation
        for file, what in (
            ("sites/canonicalize.py", "an RMSNorm"),
            ("recognition/recognize.py", "projections"),
            ("open_form/defer_norm.py", "a norm and its products"),
            ("fusion/fuse_coefficients.py", "a connection"),
            ("fusion/hoist_views.py", "a view and a connection"),
        )
        for mutation in _of(
            "graph/test_modes.py",
            file,
            (
                f"{what} may stand in two modes",
                "with kept_apart(gm.graph, context.grad_enabled):",
                "if True:",
            ),
        )
    ),
    *_of(
        "graph/test_modes.py",
        "sites/detect.py",
        ("a sum in two modes is a site", "if not self._in_one_mode(x, adds):", "if False:"),
    ),
    *_of(
        "graph/test_modes.py",
        "open_form/widen.py",
        (
            "coefficients behind a branch under no_grad get no gradient",
            "if recorded and not self.modes.of(mark).grad:",
            "if False:",
        ),
        (
            "the coefficients of a site are computed in the mode of x",
            "if self.modes.of(site.x) == mode or self.modes.of(first).others != mode.others:",
            "if True:",
        ),
        (
            "gradients stay on behind coefficients",
            "self.graph.call_function(self.modes.set_grad, (False,))",
            "pass",
        ),
    ),
]


def run_tests(root: Path, tests: Sequence[str]) -> bool:
    """Whether all tests pass in a copy of the repository.

    The process that runs them starts with what takes long to import, and with nothing of ours.
    """
    settings = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist")
    process = os.fork()
    if process == 0:
        os.chdir(root)
        sys.path[0] = str(root)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(pytest.main([*settings, *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def survives(mutation: Mutation, root: Path) -> bool:
    """Make one mistake in a copy, run the tests, and take it back."""
    path = root / "passes" / mutation.file
    right = path.read_text()
    try:
        mutation.apply(root)
        return run_tests(root, [mutation.tests])
    finally:
        path.write_text(right)


def main(words: Sequence[str]) -> int:
    """Try the mistakes; 0 if each was noticed."""
    for module in ("functorch.compile", "torch._inductor.compile_fx", "transformers.models.llama"):
        importlib.import_module(module)
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if stale := [m.name for m in chosen if not m.is_applicable]:
        sys.exit(f"not to be found exactly once in the sources: {', '.join(stale)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mhc"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        if not run_tests(root, sorted({m.tests for m in chosen})):
            sys.exit("the tests fail without a mistake")
        survivors = 0
        for mutation in chosen:
            start = time.perf_counter()
            alive = survives(mutation, root)
            survivors += alive
            seconds = time.perf_counter() - start
            verdict = "SURVIVES" if alive else "noticed"
            print(f"{verdict:8} {seconds:5.1f} s  {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes noticed")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Deliberate mistakes in the passes, each of which some test must notice.

    python -m tests.mutations                 all of them (`make mutants`)
    python -m tests.mutations eps sum         those with one of these words in their name

A mistake is made in the syntax tree of one function, in a copy of the repository: lines may move,
and the function may go to another file. Then the test that is named runs there, and if it notices
nothing the rest of its file, until the first failure. A mistake that no test notices survives: the
exit status is then 1, and a test is missing. The working tree is not touched.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("passes", "kernels", "mhc_compile")
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
        module: where the function stands, as `passes.fusion.replace`. If it is not there any more,
            it is looked for in all modules.
        function: its name, with that of its class; `""` is the whole module.
        old, new: an expression, or statements, and what it becomes. Every name that begins with ANY
            stands for any expression, in `new` for the same one. Without `old`, `new` is the whole
            body of the function.
        tests: what must notice: a file, or `file::function`.
    """

    name: str
    module: str
    function: str
    old: str
    new: str
    tests: str

    def places(self) -> list[tuple[Path, ast.Module, Place]]:
        """Where the mistake can be made: one place, if this entry fits the sources."""
        home = ROOT.joinpath(*self.module.split(".")).with_suffix(".py")
        for files in ([home] if home.exists() else [], _sources()):
            scopes = [
                (file, tree, scope)
                for file in files
                for tree in [ast.parse(file.read_text(encoding="utf-8"))]
                for scope in _named(tree, self.function)
            ]
            if scopes:
                break
        return [
            (file, tree, place)
            for file, tree, scope in scopes
            for place in _places(scope, _parsed(self.old))
        ]

    def apply(self, root: Path) -> Path:
        """Make the mistake in a copy of the repository; the file that has it."""
        ((file, tree, place),) = self.places()
        place.put(_parsed(self.new))
        path = root / file.relative_to(ROOT)
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
        return path


# --- patterns -------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a pattern stands: nodes of a list in a syntax tree, or the one node of a field."""

    parent: ast.AST
    field: str
    start: int | None
    stop: int
    found: dict[str, ast.AST]

    def put(self, new: list[Any]) -> None:
        new = [_Filled(self.found).visit(node) for node in new]
        if self.start is None:
            setattr(self.parent, self.field, new[0])
        else:
            getattr(self.parent, self.field)[self.start : self.stop] = new


class _Filled(ast.NodeTransformer):
    def __init__(self, found: dict[str, ast.AST]) -> None:
        self.found = found

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.found.get(node.id, node)


@functools.cache
def _sources() -> list[Path]:
    return sorted(
        Path(folder, name)
        for floor in FLOORS
        for folder, _, names in os.walk(ROOT / floor)  # not through the links between floors
        for name in names
        if name.endswith(".py")
    )


def _named(tree: ast.AST, function: str) -> Iterator[ast.AST]:
    """The functions of that qualified name; the tree itself for no name."""
    if not function:
        yield tree
        return
    name, _, rest = function.partition(".")
    for node in ast.walk(tree) if isinstance(tree, ast.Module) else tree.body:  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            yield from _named(node, rest)


def _parsed(text: str) -> list[Any]:
    """An expression, or statements."""
    body = ast.parse(text).body
    return [body[0].value] if len(body) == 1 and isinstance(body[0], ast.Expr) else list(body)


def _places(scope: ast.AST, pattern: list[Any]) -> Iterator[Place]:
    if not pattern:
        yield Place(scope, "body", 0, len(scope.body), {})  # type: ignore[attr-defined]
        return
    for parent in ast.walk(scope):
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for start in range(len(nodes) - len(pattern) + 1):
                found: dict[str, ast.AST] = {}
                stop = start + len(pattern)
                if _same(pattern, nodes[start:stop], found):
                    first = start if isinstance(value, list) else None
                    yield Place(parent, field, first, stop, found)


def _same(pattern: Any, node: Any, found: dict[str, ast.AST]) -> bool:
    """Whether it is the same code, wherever it stands; `found` gets what ANY stands for."""
    if isinstance(pattern, ast.Name) and pattern.id.startswith("ANY"):
        return _same(found.setdefault(pattern.id, node), node, {})
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        pairs = zip(pattern, node, strict=False)
        return len(pattern) == len(node) and all(_same(p, n, found) for p, n in pairs)
    if isinstance(pattern, ast.AST):
        fields = [
            field for field in pattern._fields if field not in ("ctx", "kind", "type_comment")
        ]
        return all(_same(getattr(pattern, f), getattr(node, f), found) for f in fields)
    return bool(pattern == node)


# --- the mistakes ---------------------------------------------------------------------------------


def _of(module: str, tests: str, *mistakes: tuple[str, str, str, str, str]) -> list[Mutation]:
    """Mistakes in one module that one file of tests notices, each by the test named last."""
    return [
        Mutation(name, module, function, old, new, f"tests/{tests}" + f"::{test}" * bool(test))
        for name, function, old, new, test in mistakes
    ]


MUTATIONS = [
    *_of(
        "passes.open_form.defer_norm",
        "passes/open_form/test_defer_norm.py",
        ("a deferred norm loses its eps", "_defer", "norm.eps", "0.0", "test_a_stream_of_zeros"),
        (
            "a deferred norm loses its weight",
            "_defer_all",
            "() if norm.weight is None else (norm.weight,)",
            "()",
            "test_every_spelling_of_a_norm_in_front_of_qkv",
        ),
        (
            "of two factors one is lost",
            "_products",
            "(*scales, scale)",
            "(scale,)",
            "test_every_spelling_of_a_norm_in_front_of_qkv",
        ),
        (
            "a bias is divided by r",
            "_divide_behind",
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
            "test_every_spelling_of_a_norm_in_front_of_qkv",
        ),
        (
            "a quotient keeps the dtype of r",
            "_divide_behind",
            "write.cast(result, dtype)",
            "result",
            "test_gate_and_up",
        ),
        (
            "a norm with other readers is deferred",
            "_obstacle",
            "len(found) < len(products)",
            "not found",
            "test_a_norm_that_is_read_otherwise_is_kept",
        ),
        (
            "a norm of what is written in place is deferred",
            "_obstacle",
            "not overwritten.isdisjoint(ANY)",
            "False",
            "test_a_norm_of_something_written_in_place_is_kept",
        ),
        (
            "products that autocast rounds are deferred",
            "_obstacle",
            "any(before != after for before, after in dtypes)",
            "False",
            "test_products_that_autocast_computes_in_another_dtype_are_kept",
        ),
        (
            "float16 products are deferred",
            "_obstacle",
            "{torch.float16}",
            "set()",
            "test_a_product_of_less_range_than_the_stream_is_kept",
        ),
        (
            "products narrower than a float64 stream are deferred",
            "_obstacle",
            "narrow |= {torch.bfloat16, torch.float32}",
            "pass",
            "test_a_product_of_less_range_than_the_stream_is_kept",
        ),
        (
            "the user's norms are deferred unasked",
            "_defer_all",
            "not (mapping or context.options.defer_norms)",
            "False",
            "test_the_users_own_norms_are_kept_by_default",
        ),
        (
            "the stream of each token is divided by the r of all",
            "_defer",
            "write.call('mean', square, -1, True)",
            "write.call('mean', square)",
            "test_gate_and_up",
        ),
    ),
    *_of(
        "passes.graph.norms",
        "passes/open_form/test_defer_norm.py",
        (
            "the default eps is that of bfloat16",
            "rms_norm_of",
            "torch.promote_types(value.dtype, torch.float32)",
            "value.dtype",
            "test_every_spelling_of_a_norm_in_front_of_qkv",
        ),
    ),
    *_of(
        "passes.fusion.fuse_coefficients",
        "passes/fusion/test_fuse_coefficients.py",
        (
            "H_res takes the place of its transpose",
            "_write",
            """\
if flipped:
    new = write.call('transpose', new, -1, -2)
""",
            "pass",
            "test_streams_mixed_with_the_transpose_are_a_site",
        ),
        (
            "H_res is applied transposed",
            "_fuse_post_res",
            "form == 1",
            "form == 0",
            "test_any_leading_dimensions",
        ),
        (
            "coefficients lose the eps of the norm",
            "_write",
            "reading.eps",
            "0.0",
            "test_eps_of_the_norm_is_the_one_in_the_graph",
        ),
        (
            "coefficients lose the weight of the norm",
            "_write",
            "m.weight is not None",
            "False",
            "test_a_site_written_by_hand",
        ),
        (
            "the gates α are in reverse order",
            "_write",
            "given.write_alpha(write, phi, dtype)",
            "write.call('flip', given.write_alpha(write, phi, dtype), (0,))",
            "test_any_leading_dimensions",
        ),
        (
            "h has the dtype of the streams",
            "_fuse_pre",
            "write.call(ANY, H_pre_node, X_node, dtype, name=ANY2)",
            "write.call(ANY, H_pre_node, X_node, dtype_of(X_node), name=ANY2)",
            "test_streams_branch_and_result_may_have_different_dtypes",
        ),
        (
            "wider results are rounded to the dtype of the streams",
            "_fuse_post_res",
            "dtype != dtype_of(X_node)",
            "False",
            "test_streams_branch_and_result_may_have_different_dtypes",
        ),
        (
            "streams written in place count as unchanged",
            "_Products._examined",
            "region.written",
            "False",
            "test_writes_in_place_behind_the_coefficients_are_left_alone",
        ),
    ),
    *_of(
        "passes.recognition.mapping",
        "passes/fusion/test_fuse_coefficients.py",
        (
            "coefficients written in place count as unchanged",
            "_Reader.read",
            "region.written",
            "False",
            "test_writes_in_place_are_left_alone",
        ),
        (
            "rounding between coefficients is ignored",
            "require_one_precision",
            "isinstance(value, Tensor) and value.dtype != dtype",
            "False",
            "test_a_near_miss_keeps_its_meaning_and_says_what_differs",
        ),
        (
            "1 / r is taken for r",
            "_Reader._bind_rms",
            "inv_r if rms[2] else 1 / inv_r",
            "inv_r",
            "test_a_site_written_by_hand",
        ),
        (
            "a norm of other streams divides",
            "_Reader._bind_rms",
            "rms is None or ANY is not strip_casts(self.mapping.flat)",
            "rms is None",
            "test_a_near_miss_keeps_its_meaning_and_says_what_differs",
        ),
        (
            "parts of different checkpoints are joined",
            "_Reader._require_uniform",
            "require_one_tag(used)",
            "None",
            "test_what_is_recomputed_in_part_is_left_open",
        ),
    ),
    *_of(
        "passes.recognition.coefficients",
        "passes/fusion/test_fuse_coefficients.py",
        (
            "rows are normalised before columns",
            "Roles.variant",
            "replace(residual, pre=pre, post=post, inner=ANY)",
            "replace(residual, transposed=not residual.transposed, pre=pre, post=post, inner=ANY)",
            "test_streams_mixed_with_the_transpose_are_a_site",
        ),
        (
            "the gates of H_pre and H_post change places",
            "Roles.variant",
            "replace(residual, pre=pre, post=post, inner=ANY)",
            "replace(residual, pre=post, post=pre, inner=ANY)",
            "test_any_leading_dimensions",
        ),
    ),
    *_of(
        "passes.recognition.evaluation",
        "passes/fusion/test_fuse_coefficients.py",
        (
            "nearly the same is the same",
            "",
            "_CLOSE = 1e-12",
            "_CLOSE = 1e-8",
            "test_a_near_miss_keeps_its_meaning_and_says_what_differs",
        ),
    ),
    *_of(
        "passes.recognition.token_rules",
        "passes/fusion/test_fuse_coefficients.py",
        (
            "an iteration of Sinkhorn-Knopp is lost",
            "_sinkhorn_knopp",
            "reference.sinkhorn_knopp(call.first.data, iterations, eps)",
            "reference.sinkhorn_knopp(call.first.data, iterations + 1, eps)",
            "test_iterations_and_eps_come_from_the_graph",
        ),
    ),
    *_of(
        "passes.recognition.recognize",
        "passes/recognition/test_recognize.py",
        (
            "projections are joined in any order",
            "_in_order",
            "gates.sort(key=lambda p: not _meets(p, (mapping.n, mapping.width)))",
            "None",
            "test_projections_are_joined_in_the_order_of_their_use",
        ),
        (
            "streams normalised one by one count as normalised together",
            "_difference",
            "width in normalised and n * width not in normalised",
            "False",
            "test_a_near_miss_is_left_as_it_is_and_says_what_differs",
        ),
        (
            "any outer product that is added is a connection",
            "_write_back",
            "_shows(X, n, width) and X in around",
            "_shows(X, n, width)",
            "test_what_resembles_a_connection",
        ),
    ),
    *_of(
        "passes.recognition.mapping",
        "passes/recognition/test_recognize.py",
        (
            "a transposed part of b is not transposed back",
            "Parameters.write_bias",
            "write.call('transpose', bias, -1, -2) if flipped else bias",
            "bias",
            "test_modules_that_follow_the_paper_are_sites",
        ),
        (
            "a constant in the place of α is lost",
            "Parameters.write_alpha",
            "write.call('new_full', like, (), number)",
            "write.call('new_full', like, (), 1.0)",
            "test_modules_that_follow_the_paper_are_sites",
        ),
    ),
    *_of(
        "passes.fusion.fuse_coefficients",
        "passes/recognition/test_recognize.py",
        (
            "streams are mixed with the transpose",
            "_fuse_post_res",
            "form == 1",
            "False",
            "test_modules_that_follow_the_paper_are_sites",
        ),
    ),
    *_of(
        "passes.fusion.fuse_seams",
        "passes/fusion/test_fuse_seams.py",
        (
            "a seam gets H_pre for dH_post",
            "_fuse_backward",
            "(dh, dH_post, dH_res, H_pre, X, *kept, total)",
            "(dh, H_pre, dH_res, dH_post, X, *kept, total)",
            "test_a_chain_is_seams",
        ),
        (
            "a seam gets the streams for their gradient",
            "_fuse_backward",
            "(dh, dH_post, dH_res, H_pre, X, *kept, total)",
            "(dh, dH_post, dH_res, H_pre, X, *kept, X if total else None)",
            "test_a_chain_is_seams",
        ),
        (
            "h is read from other streams",
            "_pair",
            "(u for u in readers if u.args[1] is X)",
            "(u for u in readers)",
            "test_h_of_other_streams",
        ),
        (
            "the gradient of h goes to other streams",
            "_fuse_backward",
            "pre is None or pre.args[2] is not X",
            "pre is None",
            "test_h_of_other_streams",
        ),
        (
            "a branch wider than its streams is fused",
            "_pair",
            "torch.promote_types(dtype_of(X), dtype) is not dtype_of(X)",
            "False",
            "test_a_branch_wider_than_its_streams",
        ),
    ),
    *_of(
        "passes.fusion.replace",
        "passes/fusion/test_fuse_seams.py",
        (
            "the other gradients of X are dropped",
            "Sum.others",
            "left[self.root]",
            "None",
            "test_a_chain_is_seams",
        ),
        (
            "one gradient of X is dropped",
            "Sum.others",
            "present[0] if present else None",
            "None",
            "test_a_state_that_is_read_out_in_the_middle",
        ),
        (
            "a gradient is counted once that was added twice",
            "_is_addition",
            "len(node.all_input_nodes) != 2",
            "not node.all_input_nodes",
            "test_an_addition_that_is_no_sum_of_gradients",
        ),
        (
            "the factor of an addition is dropped",
            "_is_addition",
            "ANY is not _ADD or node.kwargs or ANY2",
            "ANY is not _ADD or ANY2",
            "test_an_addition_that_is_no_sum_of_gradients",
        ),
        (
            "a broadcast addition is a sum of gradients",
            "_is_addition",
            "len(dtypes) == 1 and ANY",
            "len(dtypes) == 1 or ANY",
            "test_an_addition_that_is_no_sum_of_gradients",
        ),
        (
            "a sum with a further reader is folded",
            "_additions_above",
            "len(node.users) == 1",
            "node.users",
            "test_an_addition_that_is_no_sum_of_gradients",
        ),
        (
            "dependents stay in front of the operator",
            "Fusion.apply",
            """\
for node in between:
    write.move(node)
""",
            "pass",
            "test_a_state_that_is_read_out_in_the_middle",
        ),
        (
            "an operator is computed from its own results",
            "Fusion.obstacle",
            "n in needed",
            "n not in between",
            "test_parameters_that_depend_on_the_streams",
        ),
        (
            "random numbers are drawn in another order",
            "Fusion.obstacle",
            "n.is_impure()",
            "n not in between",
            "test_random_numbers_are_drawn_in_the_same_order",
        ),
        (
            "a value that is still read is not computed",
            "Fusion.obstacle",
            "reader is not None and (node, index) not in returned",
            "False",
            "test_a_gradient_of_the_streams_that_is_read_twice",
        ),
    ),
    *_of(
        "passes.fusion.hoist_views",
        "passes/fusion/test_hoist_views.py",
        (
            "others that read the streams lose them",
            "_behind_post_res",
            "len(source.users) == 1",
            "True",
            "test_anything_else_stays",
        ),
        (
            "what is overwritten is read too late",
            "_behind_post_res",
            "ANY and len(source.users) == 1 and not touched",
            "ANY and len(source.users) == 1",
            "test_what_is_overwritten_before_the_view_is_not_read_behind_it",
        ),
        (
            "channels and streams may change places",
            "_reshapes_tokens",
            "same_sizes(shape[-2:], rows)",
            "True",
            "test_anything_else_stays",
        ),
        (
            "streams may be flattened with tokens",
            "_reshapes_tokens",
            "0 <= d < axes",
            "0 <= d",
            "test_anything_else_stays",
        ),
    ),
    *_of(
        "passes.graph.modes",
        "passes/graph/test_modes.py",
        (
            "the end of an autocast region is not seen",
            "_left",
            "replace(mode, autocast=before.autocast)",
            "mode",
            "test_a_connection_in_two_modes_stays_as_it_is",
        ),
        (
            "what is computed under no_grad counts as recorded",
            "Modes._behind",
            "replace(mode, grad=bool(entered))",
            "mode",
            "test_under_no_grad",
        ),
    ),
    *_of(
        "passes.sites.find",
        "passes/graph/test_modes.py",
        (
            "a sum in two modes is a site",
            "Finder._visit_add",
            "not self._in_one_mode(x, adds)",
            "False",
            "test_a_sum_in_two_modes_is_no_site",
        ),
    ),
    *_of(
        "passes.open_form.widen",
        "passes/graph/test_modes.py",
        (
            "coefficients of a state under no_grad get no gradient",
            "_Widener._mark_branch",
            "recorded != self.modes.of(mark).grad",
            "False",
            "test_under_no_grad",
        ),
        (
            "gradients stay on behind coefficients",
            "_Widener._writing",
            "self._set_grad(not recorded, before)",
            "None",
            "test_under_no_grad",
        ),
    ),
    *_of(
        "passes.sites.in_place",
        "passes/sites/test_in_place.py",
        (
            "what shows written memory too is not looked at",
            "_Functional._is_private",
            "not any(ANY for alias in others for u in alias.users)",
            "True",
            "test_a_write_that_is_left_is_no_site",
        ),
        (
            "a write that nobody records becomes one that is recorded",
            "_Functional._is_private",
            "not self._keeps_gradients(write, memory)",
            "False",
            "test_what_is_written_where_no_gradients_are_recorded_stays_a_write",
        ),
        (
            "the caller is told of writes through views by a copy",
            "_Functional._can_be_copied",
            "ANY and ANY2 and not in_view",
            "ANY and ANY2",
            "test_the_caller_sees_what_was_written",
        ),
        (
            "a view that was made before a write is another value",
            "_Functional._add",
            "node if source is None else self.root[source]",
            "node",
            "test_a_write_that_is_left_is_no_site",
        ),
        (
            "the caller is not told what was written",
            "_Functional.run",
            "memory is not entered",
            "False",
            "test_the_caller_sees_what_was_written",
        ),
        (
            "what was read in front of a write sees it",
            "_Functional._replace",
            "[u for u in written.users if ANY > ANY2]",
            "[u for u in written.users if u is not new]",
            "test_the_caller_sees_what_was_written",
        ),
        (
            "a second write goes to no input",
            "_Functional._replace",
            "self.home[new] = self.home.pop(self.root[written])",
            "self.home.pop(self.root[written])",
            "test_the_caller_sees_what_was_written",
        ),
        (
            "arguments never share memory",
            "_Functional.__init__",
            "first.setdefault(_storage(node), node)",
            "node",
            "test_arguments_that_share_memory_are_written_as_they_stand",
        ),
        (
            "a written tensor gets a wider dtype",
            "_Functional._replace",
            "write.cast(made, dtype_of(node))",
            "made",
            "test_a_write_keeps_the_dtype_of_what_it_writes_into",
        ),
        (
            "what a sum is written into by out= is not told",
            "_remove_out",
            "write.call('copy_', out, new)",
            "new",
            "test_the_caller_sees_a_sum_written_by_out",
        ),
        (
            "what is written in part is one value in front and behind",
            "separate_versions",
            "[_version(graph, v, node, position) for v in views]",
            "views",
            "test_what_is_written_in_part_has_another_node_behind_it",
        ),
        (
            "a value behind a write is read in front of it",
            "_version",
            "[u for u in view.users if ANY > ANY2 and ANY3]",
            "[u for u in view.users if u is not write and u.op != 'output']",
            "test_the_caller_sees_what_was_written",
        ),
    ),
    *(
        Mutation(
            f"{what} may stand in two modes",
            module,
            function,
            "kept_apart(gm.graph, context.grad_enabled)",
            "__import__('contextlib').nullcontext()",
            "tests/passes/graph/test_modes.py" + killer,
        )
        for module, function, what, killer in (
            ("passes.sites.canonicalize", "canonicalize", "an RMSNorm", "::test_under_no_grad"),
            (
                "passes.recognition.recognize",
                "recognize",
                "projections",
                "::test_projections_in_different_modes_are_not_joined",
            ),
            (
                "passes.open_form.defer_norm",
                "defer_norm",
                "a norm and its products",
                "::test_under_no_grad",
            ),
            (
                "passes.fusion.fuse_coefficients",
                "fuse_coefficients",
                "a connection",
                "::test_a_connection_in_two_modes_stays_as_it_is",
            ),
            (
                "passes.fusion.hoist_views",
                "hoist_views",
                "a view and a connection",
                "::test_under_no_grad",
            ),
        )
    ),
]


def _breaks(module: str, name: str, function: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"passes.{module}", function, old, new, POSTCONDITIONS)


POSTCONDITIONS = "tests/passes/test_postconditions.py"
# For every pass a mistake that its own postcondition notices, before anything is computed.
MUTATIONS += [
    _breaks(
        *("sites.canonicalize", "adds keep their spellings", "_unify_adds"),
        *("", "return 0"),
    ),
    _breaks(
        *("sites.declared", "a declaration is left", "collect"),
        *("gm.graph.erase_node(node)", "None"),
    ),
    _breaks(
        *("sites.detect", "nothing is said of adds that are no sites", "_look"),
        *("_rejected(finder, places)", "[]"),
    ),
    _breaks(
        *("fusion.fuse_open", "the input of a branch stays open", "_fuse_site"),
        *("open_site.h in there", "False"),
    ),
    _breaks(
        *("sites.find", "a rejected sum stays a site", "Finder.forget"),
        *("self.found.pop(node)", "self.found[node]"),
    ),
    _breaks(
        *("open_form.widen", "a marker is left where a branch begins", "_Widener._open_site"),
        *("self.graph.erase_node(mark)", "None"),
    ),
    _breaks(
        *("recognition.recognize", "nothing is said of unreadable connections", "_recognize"),
        *("_noted(context, rejected)", "None"),
    ),
    _breaks(
        *("open_form.defer_norm", "a deferred norm is still read", "_divide_behind"),
        "node.replace_all_uses_with(write.cast(result, dtype))",
        "None",
    ),
    _breaks(
        *("fusion.fuse_open", "a site that was written open stays open", "fuse_open"),
        *("_fuse_site(open_site, there, report)", "None"),
    ),
    _breaks(
        *("fusion.hoist_views", "a view that counts as moved stays", "_hoist_all"),
        *("_hoist(view, post_res)", "None"),
    ),
    _breaks(
        *("fusion.report_kernels", "an operator is not reported", "report_kernels"),
        *("_counted(_ours(gm))", "_counted(list(_ours(gm))[1:])"),
    ),
    _breaks(
        *("fusion.fuse_seams", "a seam that counts as made is not", "_make"),
        *("fusion.apply()", "None"),
    ),
]


# --- running --------------------------------------------------------------------------------------


class _FirstFailure:
    """Writes down which test failed first."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding="utf-8")


def failing_test(root: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a copy of the repository; None if all pass.

    The process that runs them starts with what takes long to import, and with nothing of ours.
    """
    settings = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist")
    first = root.parent / "failure"
    first.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        os.chdir(root)
        sys.path[0] = str(root)
        del sys.modules["tests"]  # that of the working tree
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(pytest.main([*settings, *tests], [_FirstFailure(first)]))
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
        return None
    return first.read_text(encoding="utf-8") if first.exists() else "(before any test)"


def noticed_by(mutation: Mutation, root: Path) -> str | None:
    """Make one mistake in a copy, run the tests, and take it back; which test notices, if any."""
    path = mutation.apply(root)
    try:
        whole_file = mutation.tests.split("::")[0]
        attempts = dict.fromkeys((mutation.tests, whole_file))
        return next(filter(None, (failing_test(root, [tests]) for tests in attempts)), None)
    finally:
        shutil.copy(ROOT / path.relative_to(root), path)


def main(words: Sequence[str]) -> int:
    """Try the mistakes; 0 if each was noticed."""
    for module in ("functorch.compile", "torch._inductor.compile_fx", "transformers.models.llama"):
        importlib.import_module(module)
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if stale := [m.name for m in chosen if len(m.places()) != 1]:
        sys.exit(f"not to be found exactly once in the sources: {', '.join(stale)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mhc"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        if failure := failing_test(root, sorted({m.tests for m in chosen})):
            sys.exit(f"{failure} fails without a mistake")
        survivors = 0
        for mutation in chosen:
            start = time.perf_counter()
            test = noticed_by(mutation, root)
            survivors += test is None
            verdict = f"noticed by {test}" if test else "SURVIVES"
            seconds = time.perf_counter() - start
            print(f"{seconds:5.1f} s  {mutation.module}: {mutation.name}: {verdict}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes noticed")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""No test compares a transformed model only where it started: there, equality proves nothing.

At the start a transformed model computes what the plain one does, with H_res transposed, with
streams averaged behind every site, or with sites that are in no graph at all. Two such models are
equal to each other, too, wherever their parameters are. So every test that transforms a model and
compares what it computes also calls `checks.assert_moves` (or `assert_transformed`, which does):
all mHC parameters are moved far away, the output must move, and every group must have a gradient.
Or it perturbs and compares with the recurrence of the streams written by hand (`TRUTHS`).
This file reads the tests' own sources and finds those that do not.

What a test does is what stands in its function, in its fixtures and in all functions of `tests/`
that these name:

- it transforms: it names `transform`, `load` or `from_pretrained` of mhc_compile, or compiles with
  `backend="mhc"`;
- it compares: `error(...) < bound` for one of `ERRORS`, or anything with a bound below 0.1; or one
  of `EQUALITIES` is called.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ERRORS = {"relative", "error", "output_error", "gradient_error", "gradient_errors", "norm"}
EQUALITIES = {"equal", "allclose", "assert_close", "assert_allclose", "approx", "array_equal"}
TRANSFORMS = {"transform", "load", "from_pretrained"}
GOALS = {
    ("tests/checks.py", "assert_moves"),
    ("tests/zoo/rotation.py", "assert_streams_take_turns"),  # a truth of its own
}

TRUTHS = {
    ("tests/passes/recurrence.py", "assert_is_truth"),
    ("tests/passes/recurrence.py", "site"),
    ("tests/model/test_hooks.py", "recurrence"),
    ("tests/test_ownership.py", "truth"),
}
"""The n-stream model written out by hand, which is not the plain one once parameters moved."""

PERTURBS = {("tests/checks.py", "perturb"), ("tests/passes/recurrence.py", "perturb")}

ALLOWED: dict[str, str] = {}
"""Tests that need not, or whole files of them, each with what proves it there."""
ALLOWED |= dict.fromkeys(
    [
        "tests/test_recognize.py",
        "tests/zoo/test_every_pass.py",
        "tests/zoo/test_seams.py",
        "tests/zoo/test_selections.py",
    ],
    "the operators of the graph are asserted site by site, and the open form is another truth",
)
ALLOWED |= dict.fromkeys(
    [
        "tests/passes/graph/test_modes.py::test_a_connection_in_two_modes_stays_as_it_is",
        "tests/passes/graph/test_modes.py::test_a_connection_around_a_branch_in_another_mode_is_recognised",
        "tests/passes/graph/test_modes.py::test_projections_in_different_modes_are_not_joined",
    ],
    "connections that the model has itself: nothing was transformed",
)
ALLOWED |= dict.fromkeys(
    [
        "tests/test_peft.py::test_adapters_and_mhc_parameters_are_trained_and_nothing_else",
        "tests/test_peft.py::test_an_adapter_is_saved_and_loaded_with_its_mhc_parameters",
        "tests/test_peft.py::test_save_of_this_library_and_of_peft_share_a_folder",
    ],
    "the parameters have PEFT's names: `adapted` moves them, and the first asks for gradients",
)
ALLOWED["tests/passes/open_form/test_widen.py::test_perturbed_graph_agrees_with_truth"] = (
    "its table of cases is the recurrence by hand, and not the plain program"
)
ALLOWED["tests/test_ownership.py::test_a_parametrization_of_an_owner_outlives_revert"] = "reverted"
ALLOWED |= dict.fromkeys(
    ["tests/fuzz/test_fuzz.py"],
    "every program is perturbed, moves, and is compared with the open form; many have idle groups",
)
ALLOWED["tests/inspect/test_check.py::test_the_model_is_left_as_it_was"] = "no results are compared"
ALLOWED["tests/test_backend.py::test_one_stream_leaves_every_model_plain"] = "it has no site"
ALLOWED["tests/test_backend.py::test_a_first_call_trains_its_own_model"] = "it asks for gradients"
ALLOWED["tests/passes/graph/test_operators.py::test_an_add_of_the_users_own_is_no_residual_add"] = (
    "no site"
)
ALLOWED["tests/test_ownership.py::test_forwards_that_are_set_again_and_taken_away_count"] = (
    "perturbed from the first; each forward has an effect of its own"
)
ALLOWED["tests/zoo/test_zoo.py::test_h_res_is_indexed_out_in"] = "literal numbers, of streams apart"
ALLOWED["tests/test_backend.py::test_one_stream_leaves_a_plain_model_plain"] = "it has no site"
ALLOWED["tests/zoo/test_zoo.py::test_streams_part_with_the_first_optimizer_step"] = "it moves them"
ALLOWED["tests/zoo/test_rotation.py::test_a_model_without_a_whole_graph_is_refused"] = "refused"
ALLOWED["tests/zoo/test_rotation.py::test_the_same_mistakes_pass_at_the_start"] = "what it shows"

Key = tuple[str, str]
"""A function: its file, as a path from the root, and its name."""


@dataclass
class Function:
    """What one function, class or fixture of the tests says, and which others it names, where."""

    transforms: bool = False
    compares: bool = False
    names: set[Key] = field(default_factory=set)


class Suite:
    """All functions of the given sources, by file and name."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.functions: dict[Key, Function] = {}
        trees = {file: ast.parse(text) for file, text in sources.items()}
        for file, tree in trees.items():
            known = names_known_in(file, tree, set(trees))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    self.functions[file, node.name] = read(node, known)

    def reached(self, start: Key) -> set[Key]:
        """The function itself and whatever it leads to."""
        found, open_ = {start}, [start]
        while open_:
            here = self.functions.get(open_.pop(), Function())
            new = here.names - found
            found |= new
            open_ += new
        return found & self.functions.keys()

    def only_at_the_start(self) -> Iterator[str]:
        """The tests that compare a transformed model, and never one whose parameters moved."""
        for test in self.functions:
            reached = self.reached(test)
            said = [self.functions[key] for key in reached]
            transforms, compares = any(f.transforms for f in said), any(f.compares for f in said)
            proves = GOALS & reached or (TRUTHS & reached and PERTURBS & reached)
            if test[1].startswith("test_") and transforms and compares and not proves:
                yield "::".join(test)


def names_known_in(file: str, tree: ast.Module, files: set[str]) -> dict[str, Key | str]:
    """What a name in a file stands for: a function, or a whole file if it is a module."""
    found: dict[str, Key | str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            folder = Path(file).parents[node.level - 1].as_posix() + "/" if node.level else ""
            module = folder + (node.module or "").replace(".", "/")
            for alias in node.names:
                name = alias.asname or alias.name
                inside = f"{module.rstrip('/')}/{alias.name}.py"
                found[name] = inside if inside in files else (module + ".py", alias.name)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (file, node.name)
    return found


def read(definition: ast.FunctionDef | ast.ClassDef, known: dict[str, Key | str]) -> Function:
    function = Function()
    for node in ast.walk(definition):
        name = ast.Name(node.arg) if isinstance(node, ast.arg) else node  # a fixture
        if isinstance(name, ast.Name | ast.Attribute) and (key := function_named(name, known)):
            function.names.add(key)
        function.transforms |= is_transform(node)
        function.compares |= is_comparison(node)
    return function


def function_named(node: ast.Name | ast.Attribute, known: dict[str, Key | str]) -> Key | None:
    """The function of the tests that `name` or `module.name` is."""
    if isinstance(node, ast.Name):
        key = known.get(node.id)
        return key if isinstance(key, tuple) else None
    module = known.get(node.value.id) if isinstance(node.value, ast.Name) else None
    return (module, node.attr) if isinstance(module, str) else None


def is_transform(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        product = isinstance(node.value, ast.Name) and node.value.id == "mhc_compile"
        return product and node.attr in TRANSFORMS
    return (
        isinstance(node, ast.keyword)
        and node.arg == "backend"
        and isinstance(node.value, ast.Constant)
        and node.value.value == "mhc"
    )


def is_comparison(node: ast.AST) -> bool:
    """`error(...) < bound`, `anything <= 1e-5`, `a.equal(b)`, `assert_close(...)`."""
    if isinstance(node, ast.Compare):
        less = any(isinstance(op, ast.Lt | ast.LtE) for op in node.ops)
        return less and (bool(called_in(node.left) & ERRORS) or is_small(node.comparators[-1]))
    return isinstance(node, ast.Call) and called_in(node, deep=False) <= EQUALITIES


def is_small(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value < 0.1


def called_in(node: ast.AST, deep: bool = True) -> set[str]:
    """The last parts of the names that are called: `equal` in `a.b.equal(c)`."""
    calls = [n.func for n in (ast.walk(node) if deep else [node]) if isinstance(n, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}


def sources() -> dict[str, str]:
    root = TESTS.parent
    return {p.relative_to(root).as_posix(): p.read_text("utf-8") for p in TESTS.rglob("*.py")}


def test_no_test_compares_only_at_the_start() -> None:
    tests = Suite(sources())
    assert tests.functions.keys() >= GOALS | TRUTHS | PERTURBS
    found = {name: name.partition("::")[0] for name in tests.only_at_the_start()}
    assert [name for name, file in found.items() if not {name, file} & ALLOWED.keys()] == []
    needed = {*found, *found.values()}
    assert sorted(ALLOWED.keys() - needed) == [], "no longer needed here"


CHECKS = {"tests/checks.py": "def assert_moves(model): ...\ndef perturb(model): ..."}
HELPERS = """
import mhc_compile
import pytest
from tests import checks
from .checks import assert_moves

def pair():
    return mhc_compile.transform(GPT())

@pytest.fixture
def model():
    return pair()

@pytest.fixture
def moved(model):
    assert_moves(model)

def same(a, b):
    assert relative(a(x), b(x)) < 1e-5
"""


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("def test_it():\n    assert pair()(x).equal(y)", True),
        ("def test_it(model):\n    torch.testing.assert_close(model(x), y)", True),
        ("def test_it(model):\n    same(model, plain)", True),
        ("def test_it(model):\n    checks.perturb(model)\n    same(model, plain)", True),
        ('def test_it():\n    same(torch.compile(m, backend="mhc"), m)', True),
        ("class Model: ...\ndef test_it(model):\n    check(lambda: same(model, plain))", True),
        ("def test_it(model):\n    same(model, plain)\n    checks.assert_moves(model)", False),
        ("def test_it(moved):\n    same(moved, other)", False),
        ("def test_it(model):\n    assert relative(model(x), y) > 1e-3", False),
        ("def test_it():\n    same(plain, other)", False),
    ],
)
def test_the_search_finds_them(test: str, found: bool) -> None:
    tests = Suite({**CHECKS, "tests/test_file.py": f"{HELPERS}\n{test}\n"})
    assert list(tests.only_at_the_start()) == ["tests/test_file.py::test_it"] * found

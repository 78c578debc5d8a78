"""No test compares a transformed model only where it started: there, equality proves nothing.

At initialisation a transformed model computes what the plain one does, with H_res transposed, with
streams averaged behind every site, or with sites that are in no graph at all. So a test that
transforms a model and requires tensors to be equal must also move the mHC parameters far away:
`checks.assert_transformed` does both, `checks.perturb` the second. This file reads the tests' own
sources and finds those that do not.

What a test does is what its function calls, and what functions of `tests/` that it calls do:

- it transforms: it calls `mhc_compile.transform` or `load`, or compiles with `backend="mhc"`;
- it requires equality: it asserts that an error is below a bound (`error(...) < bound` for any
  function in `ERRORS`), that tensors are `.equal(...)`, or calls `assert_close`;
- it perturbs: it calls `checks.perturb`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ERRORS = {"relative", "error", "output_error", "gradient_error", "gradient_errors", "norm"}
EQUALITIES = {"equal", "allclose", "assert_close", "assert_allclose", "approx"}
TRANSFORMS = {"transform", "load", "from_pretrained"}

ALLOWED: dict[str, str] = {}
"""Tests that need no perturbation, each with the reason."""


@dataclass
class Function:
    """What one function of the tests does, and which other names it calls."""

    name: str
    transforms: bool = False
    equates: bool = False
    perturbs: bool = False
    calls: set[str] = field(default_factory=set)


def name_of(call: ast.expr) -> str:
    """The last part of the name that is called: `relative`, or `equal` in `a.b.equal(c)`."""
    if isinstance(call, ast.Attribute):
        return call.attr
    return call.id if isinstance(call, ast.Name) else ""


def names_in(node: ast.AST) -> set[str]:
    return {name_of(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}


def is_mhc_backend(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.keyword)
        and node.arg == "backend"
        and isinstance(node.value, ast.Constant)
        and node.value.value == "mhc"
    )


def is_bound_on_an_error(node: ast.AST) -> bool:
    """`error(...) < bound`, `max(error(...), ...) <= bound`."""
    if not isinstance(node, ast.Compare):
        return False
    small = any(isinstance(op, ast.Lt | ast.LtE) for op in node.ops)
    return small and bool(names_in(node.left) & ERRORS)


def function_of(definition: ast.FunctionDef) -> Function:
    found = Function(definition.name)
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            found.calls.add(node.id)  # a function that is handed on may be called
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            found.calls.add(name)
            found.transforms |= name in TRANSFORMS
            found.equates |= name in EQUALITIES
        found.transforms |= is_mhc_backend(node)
        found.equates |= is_bound_on_an_error(node)
    found.perturbs = "perturb" in found.calls
    return found

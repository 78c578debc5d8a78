"""The list of deliberate mistakes (`make mutants` makes them) fits the sources as they are."""

import ast
import functools
from dataclasses import replace
from pathlib import Path

import pytest

from mhc_compile.passes import pipeline
from tests.mutations import MUTATIONS, ROOT, Mutation


def names(file: str) -> set[str]:
    """The functions of a file of tests."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_mistake_can_still_be_made() -> None:
    """Code that is gone or stands twice needs a new entry in `tests/mutations.py`."""
    found = {m.name: len(m.places()) for m in MUTATIONS}
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert len(found) == len(MUTATIONS)
    passes = {f"passes.{step.run.__module__.partition('.passes.')[2]}" for step in pipeline.EVERY}
    assert {m.module for m in MUTATIONS} >= passes | {"passes.sites.in_place", "passes.sites.find"}


def test_every_test_that_must_notice_is_there() -> None:
    wanted = {tuple(m.tests.split("::")) for m in MUTATIONS}
    assert [w for w in wanted if not set(w[1:]) <= names(w[0])] == []


@functools.cache
def unparsed(file: Path) -> str:
    return ast.unparse(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mistake_is_one_change_of_its_file(mutation: Mutation, tmp_path) -> None:
    original = mutation.places()[0][0]
    copy = tmp_path / original.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    assert mutation.apply(tmp_path) == copy
    changed = copy.read_text(encoding="utf-8")
    compile(changed, copy, "exec")
    assert changed != unparsed(original)


def test_a_function_that_has_moved_is_found() -> None:
    mutation = next(m for m in MUTATIONS if m.function == "_Functional._replace")
    moved = replace(mutation, module="passes.elsewhere")
    assert [place[0] for place in moved.places()] == [place[0] for place in mutation.places()]


def test_neither_formatting_nor_what_any_stands_for_matters() -> None:
    mutation = next(m for m in MUTATIONS if m.name == "an iteration of Sinkhorn-Knopp is lost")
    spaced = replace(mutation, old=mutation.old.replace(", ", " ,\n   "))
    anything = replace(mutation, old="reference.sinkhorn_knopp(ANY, iterations, ANY2)")
    assert len(spaced.places()) == len(anything.places()) == 1
    assert replace(mutation, old="reference.sinkhorn_knopp(ANY, ANY, eps)").places() == []


def test_a_whole_function_can_be_replaced(tmp_path) -> None:
    mutation = Mutation("", "passes.fusion.fuse_seams", "_is", "", "return False", "")
    (tmp_path / "passes" / "fusion").mkdir(parents=True)
    tree = ast.parse(mutation.apply(tmp_path).read_text(encoding="utf-8"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_is")
    assert ast.unparse(function.body[0]) == "return False"

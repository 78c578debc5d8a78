"""The three floors: imports only go down, private torch names have one place, links hold."""

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("mhc_compile", "passes", "kernels")
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "passes": {"torch", "networkx"},
    "mhc_compile": {
        *("torch", "triton", "networkx", "numpy", "rich", "safetensors", "jinja2"),
        "transformers",
    },
}
# What a floor must not know, although torch carries it.
FORBIDDEN = {
    "kernels": ("torch.nn.modules", "torch.fx", "torch._dynamo", "torch._inductor"),
    "passes": ("torch.nn.modules", "torch._dynamo", "torch._inductor", "triton"),
    "mhc_compile": (),
}
PRIVATE_NAMES_ALLOWED = ("mhc_compile/_torch.py", "passes/graph/_torch.py")
# Private attributes of torch's objects, wherever they are read or written as text.
PRIVATE_ATTRIBUTES = {
    *("_compiled_call_impl", "compile_subgraph_reason", "_rename"),
    "experimental",
}
# The front door from the ground up: what stands on modules, what becomes of a captured graph, what
# people look at, the verbs. Rooms and the files beside them import their own row and those below.
ROWS = (
    ("versions", "errors", "config", "_torch"),
    ("model",),
    ("capture",),
    ("compiler",),
    ("inspect",),
    ("backend", "transform", "persistence", "pretrained"),
    ("__init__",),
)
# Our own modules that a function imports, and why.
IMPORTS_IN_FUNCTIONS = {
    "kernels/backends.py": "Triton is not installed everywhere",
}


def sources(floor: str) -> list[Path]:
    # Not through the links: each file once, under the folder where it lies.
    files = sorted((ROOT / floor).rglob("*.py"))
    links = [ROOT / "mhc_compile" / name for name in ("passes", "kernels")]
    return [file for file in files if not any(link in file.parents for link in links)]


def package_of(floor: str, file: Path) -> list[str]:
    """Dotted path of the package that a file belongs to, as it is imported."""
    inside = list(file.relative_to(ROOT / floor).parent.parts)
    return ["mhc_compile", *([] if floor == "mhc_compile" else [floor]), *inside]


def imports(floor: str, file: Path, nodes: Iterable[ast.AST] | None = None) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, `from a import b` as `a.b`.

    Args:
        nodes: look at these only.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(floor, file)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def absolute_imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def floor_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "mhc_compile":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("passes", "kernels") else "mhc_compile"


def all_imports() -> list[tuple[str, str, str]]:
    return [
        (floor, file.relative_to(ROOT).as_posix(), name)
        for floor in FLOORS
        for file in sources(floor)
        for name in imports(floor, file)
    ]


def test_imports_only_go_down():
    wrong = [
        (file, name)
        for floor, file, name in all_imports()
        if (target := floor_of(name)) and FLOORS.index(target) < FLOORS.index(floor)
    ]
    assert wrong == []


def own_modules() -> dict[str, tuple[str, Path]]:
    """Every module of ours by its dotted name: floor and file."""
    found: dict[str, tuple[str, Path]] = {}
    for floor in FLOORS:
        for file in sources(floor):
            package = ".".join(package_of(floor, file))
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            found[name] = (floor, file)
    return found


def import_graph() -> nx.DiGraph:
    """From each of our modules to those it imports, wherever in the file that stands."""
    modules, graph = own_modules(), nx.DiGraph()
    for name, (floor, file) in modules.items():
        for imported in imports(floor, file):
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            if imported and imported != name:
                graph.add_edge(name, imported)
    return graph


def row_of(name: str) -> int | None:
    """The row of the front door in which a module stands; None on the lower floors."""
    if floor_of(name) != "mhc_compile":
        return None
    room = name.partition(".")[2].partition(".")[0] or "__init__"
    return next(number for number, row in enumerate(ROWS) if room in row)


def test_imports_have_no_circle():
    graph = import_graph()
    assert graph.number_of_edges() > 200
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []


def test_rooms_of_the_front_door_import_only_what_stands_below():
    pairs = [(row_of(a), row_of(b), a, b) for a, b in import_graph().edges]
    wrong = [(a, b) for up, down, a, b in pairs if up is not None and (down or 0) > up]
    assert wrong == []


def test_our_modules_are_imported_at_the_top_of_a_file():
    """A circle or an arrow upwards could hide in a function."""
    found = set()
    for floor, file in own_modules().values():
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = [n for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)]
        if any(map(floor_of, imports(floor, file, inside))):
            found.add(file.relative_to(ROOT).as_posix())
    assert found == IMPORTS_IN_FUNCTIONS.keys()


def test_no_floor_is_imported_by_its_bare_name():
    """Under two names a module would run twice, and register its operators twice."""
    others = [
        (file.relative_to(ROOT).as_posix(), name)
        for folder in ("tests", "examples", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        for name in absolute_imports(file)
    ]
    inside = [(file, name) for _, file, name in all_imports()]
    wrong = [pair for pair in inside + others if pair[1].split(".")[0] in ("passes", "kernels")]
    assert wrong == []


def test_each_floor_knows_only_its_own_libraries():
    def known(floor: str, name: str) -> bool:
        top = name.split(".")[0]
        return top in sys.stdlib_module_names | THIRD_PARTY[floor] | {"mhc_compile"}

    wrong = [
        (file, name)
        for floor, file, name in all_imports()
        if not known(floor, name) or name.startswith(FORBIDDEN[floor])
    ]
    assert wrong == []


def test_every_base_dependency_is_used():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = tomllib.loads(text)["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in required}
    assert names == names & {name.split(".")[0] for _, _, name in all_imports()}


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def private_torch_names(file: Path) -> Iterator[str]:
    """Private names of torch in a file: imported, attributes of `torch`, and known words."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [f"'{node.value}'"]
        for name in names:
            parts = name.strip("'").split(".")
            private = parts[0] == "torch" and any(map(is_private, parts)) and name[0] != "'"
            if private or parts[-1] in PRIVATE_ATTRIBUTES:
                yield f"{file.relative_to(ROOT).as_posix()}:{node.lineno}: {name}"


def test_private_torch_names_have_one_place():
    files = [file for floor in FLOORS for file in sources(floor)]
    files += (ROOT / "examples").rglob("*.py")
    found = [
        name
        for file in files
        if file.relative_to(ROOT).as_posix() not in PRIVATE_NAMES_ALLOWED
        for name in private_torch_names(file)
    ]
    assert not found, "\n".join(found)


@pytest.mark.skipif(not (ROOT / "passes").exists(), reason="a source distribution has no links")
@pytest.mark.parametrize("floor", ["passes", "kernels"])
def test_the_lower_floors_are_linked_namespace_folders(floor):
    link = ROOT / "mhc_compile" / floor
    assert link.is_symlink()
    assert os.readlink(link) == f"../{floor}"
    assert not (ROOT / floor / "__init__.py").exists(), (
        f"{floor}/__init__.py would make the folder shadow an installed package of that name"
    )


def test_the_repository_stands_alone():
    """No file refers to the folder that happens to lie beside the author's checkout."""
    neighbour = "../" + "shared"
    skipped = {
        ".git",
        ".venv",
        ".versions",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        "__pycache__",
    }
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".in", ""}
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped]
        for path in (Path(folder, name) for name in names):
            if path.suffix in suffixes and neighbour in path.read_text("utf-8", errors="ignore"):
                found.append(path.relative_to(ROOT).as_posix())
    assert found == []

"""Wheel, source distribution and editable install ship the same package, and nothing besides it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = (
    ".git",
    ".venv",
    ".versions",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)
MODULES = [
    "mhc_compile",
    "mhc_compile.config",
    "mhc_compile.model.connection",
    "mhc_compile.kernels.variants",
    "mhc_compile.kernels.reference",
    "mhc_compile.passes.runner",
    "mhc_compile.passes.pipeline",
]

# Runs without site-packages, so that no other install of this package (an editable one, say) can
# answer for the one under test; the dependencies are then added behind it.
PROBE = """
import importlib, importlib.metadata, importlib.util, json, site, sys
target, dependencies, modules = sys.argv[1], sys.argv[2].split(";"), sys.argv[3].split(",")
site.addsitedir(target)
sys.path += dependencies
found = {}
for name in modules:
    found[name] = importlib.import_module(name).__file__
(distribution,) = importlib.metadata.distributions(name="mhc-compile", path=[target])
entry_points = distribution.entry_points.select(group="torch_dynamo_backends")
import torch
backends = torch.compiler.list_backends()
print(json.dumps({
    "modules": found,
    "entry_points": {point.name: point.value for point in entry_points},
    "callable": all(callable(point.load()) for point in entry_points),
    "bare": [n for n in ("passes", "kernels") if importlib.util.find_spec(n) is not None],
    "backends": backends,
}))
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository with its links, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("checkout") / "mhc_compile_source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return copy


def install(kind: str, checkout: Path, folder: Path) -> Path:
    """Install into an empty folder and return it. Offline: build tools are those of this Python."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    target = folder / "target"
    if kind == "sdist":
        dist = folder / "dist"
        build = (sys.executable, "-m", "build", "--sdist", "--no-isolation")
        run(*build, "--outdir", str(dist), cwd=checkout)
        (archive,) = dist.glob("*.tar.gz")
        what = [str(archive)]
    else:
        what = ["--editable", str(checkout)] if kind == "editable" else [str(checkout)]
    run(*pip, "--no-build-isolation", "--target", str(target), *what, cwd=folder)
    return target


def sources(package: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(folder, file), package)
        for folder, _, files in os.walk(package, followlinks=True)
        for file in files
        if file.endswith((".py", ".h"))
    }


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_install_has_the_package_and_no_bare_floors(kind, checkout, tmp_path):
    target = install(kind, checkout, tmp_path)
    dependencies = ";".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    probe = (sys.executable, "-I", "-S", "-c", PROBE, str(target), dependencies, ",".join(MODULES))
    answer = json.loads(run(*probe, cwd=tmp_path).splitlines()[-1])

    home = checkout if kind == "editable" else target
    assert sources(home / "mhc_compile") == sources(checkout / "mhc_compile")
    assert "kernels/cpu/vec.h" in sources(home / "mhc_compile")  # read when kernels are built
    assert (home / "mhc_compile" / "py.typed").exists()
    for name, file in answer["modules"].items():
        assert Path(file).is_relative_to(home / "mhc_compile"), f"{name} came from {file}"
    assert answer["entry_points"] == {"mhc": "mhc_compile.backend:mhc"}
    assert answer["callable"]
    assert "mhc" in answer["backends"]
    assert answer["bare"] == []


def test_no_module_is_loaded_under_two_names():
    """From the repository root, where both names of each floor are within reach of Python."""
    probe = textwrap.dedent("""
        import importlib, json, os, sys
        for folder, _, files in os.walk("mhc_compile", followlinks=True):
            for file in files:
                if file.endswith(".py") and file != "__main__.py":
                    name = os.path.join(folder, file)[:-3].replace(os.sep, ".")
                    importlib.import_module(name.removesuffix(".__init__"))
        floors = tuple(os.path.realpath(f) + os.sep for f in ("mhc_compile", "passes", "kernels"))
        names = {}
        for name, module in list(sys.modules.items()):
            file = os.path.realpath(getattr(module, "__file__", None) or "/")
            if file.startswith(floors):
                names.setdefault(file, []).append(name)
        print(json.dumps(names))
    """)
    output = run(sys.executable, "-c", probe, cwd=ROOT, PYTHONPATH=str(ROOT))
    names = json.loads(output.splitlines()[-1])
    assert len(names) > 5
    assert {file: loaded for file, loaded in names.items() if len(loaded) > 1} == {}
    assert all(loaded[0].split(".")[0] == "mhc_compile" for loaded in names.values())


def test_the_repository_root_does_not_shadow_an_installed_kernels(tmp_path):
    """transformers imports a distribution called `kernels`: ours must lose against it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'theirs'\n")
    probe = "import mhc_compile, kernels; print(kernels.__version__)"
    output = run(sys.executable, "-c", probe, cwd=ROOT, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert output.split()[-1] == "theirs"


def test_transformers_finds_no_kernels_in_the_repository_root(tmp_path):
    pytest.importorskip("transformers")
    probe = "from transformers.utils import is_kernels_available as f; print(f())"
    answers = {
        where: run(sys.executable, "-c", probe, cwd=where).split()[-1] for where in (ROOT, tmp_path)
    }
    assert answers[ROOT] == answers[tmp_path]

"""The tested versions: a newer torch warns once, and what else names them agrees."""

import argparse
import itertools
import math
import random
import re
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from benchmarks import versions as script
from mhc_compile import versions

from .conftest import CORE, NOT_CORE, is_core, some

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def warnings_of(version: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_of_untested(version)
    return [str(w.message) for w in caught]


def test_a_newer_torch_warns_once_at_import():
    """And the warning stands at the line of the user's import, whatever fails behind it."""
    major, minor = map(int, versions.TORCH[-1].split(".")[:2])
    program = f"import torch; torch.__version__ = '{major}.{minor + 1}.0'\nimport mhc_compile\n"
    command = [sys.executable, "-c", program + "import mhc_compile.transform"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert f"<string>:2: UserWarning: mhc_compile is tested with torch {versions.TORCH[0]} to" in (
        done.stderr
    )


@pytest.mark.parametrize("version", [*versions.TORCH, "2.12.9", "2.13.0+cpu", "2.14.0a0+gitabc"])
def test_a_tested_torch_does_not_warn(version):
    assert warnings_of(version) == []


@pytest.mark.parametrize("version", ["2.15.0", "2.100.0", "3.0.1", "2.15.0.dev20261201+cu130"])
def test_what_is_newer_is_told_by_numbers(version):
    (message,) = warnings_of(version)
    assert f"this is torch {version}" in message


def lower_bound(requirements: list[str], name: str) -> str:
    (found,) = (r for r in map(Requirement, requirements) if r.name == name)
    (specifier,) = found.specifier
    assert specifier.operator == ">="
    return specifier.version


def test_the_bounds_of_the_project_are_the_oldest_versions():
    assert versions.TORCH[0].startswith(lower_bound(PROJECT["dependencies"], "torch"))
    extras = PROJECT["optional-dependencies"]["hf"]
    assert versions.TRANSFORMERS[0].startswith(lower_bound(extras, "transformers"))
    assert PROJECT["requires-python"] == f">={versions.PYTHON[0]}"
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tuple(named) == versions.PYTHON


def test_the_pinned_versions_are_among_them():
    assert script.PINS["torch"] in versions.TORCH
    assert script.PINS["transformers"] in versions.TRANSFORMERS


def test_the_core_is_all_but_what_is_named():
    tests = ROOT / "tests"
    assert [name for name in (*CORE, *NOT_CORE) if not (tests / name).exists()] == []
    assert all(is_core(tests / name) for name in ("test_torch.py", "test_of_tomorrow.py", *CORE))
    assert not any(is_core(tests / name) for name in ("zoo/test_zoo.py", "kernels/test_cpu.py"))


def test_of_each_test_some_cases_are_chosen():
    names = [f"a.py::{test}[{case}]" for test in ("few", "many") for case in range(9)] + [
        "b.py::one"
    ]
    items = [SimpleNamespace(nodeid=name) for name in random.sample(names, len(names))]
    chosen = [item.nodeid.split("[")[0] for item in some(items, 4)]
    assert Counter(chosen) == {"a.py::few": 3, "a.py::many": 3, "b.py::one": 1}
    assert list(some(items, 1)) == items


# -------------------------------------------------------------------------------- make versions


def test_the_whole_suite_runs_on_the_pinned_and_on_the_newest_versions():
    whole = [wanted for wanted in script.matrix() if wanted.tests == "all"]
    newest = script.Versions(versions.TORCH[-1], versions.PYTHON[0], versions.TRANSFORMERS[-1])
    assert newest in whole
    assert any(wanted.is_pinned for wanted in whole)
    assert len(whole) == 2
    assert set(whole) < set(script.matrix(every=False))


def test_every_two_versions_meet():
    kinds = (versions.TORCH, versions.PYTHON, versions.TRANSFORMERS)
    assert len(list(script.matrix())) == math.prod(map(len, kinds))
    chosen = [(v.torch, v.python, v.transformers) for v in script.matrix(every=False)]
    assert len(chosen) == 12
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = {(row[i], row[j]) for row in chosen}
        assert pairs == set(itertools.product(kinds[i], kinds[j]))


def test_conditions_choose_rows():
    chosen = [v for v in script.matrix() if v.fits(["torch==2.11.0", "python==3.11"])]
    assert len(chosen) == len(versions.TRANSFORMERS)
    assert {v.torch for v in chosen} == {"2.11.0"}


def test_a_report_of_pytest_is_counted(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_without_its_fixture(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(file)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    failures = ["test_it::test_bad", "test_it::test_without_its_fixture"]
    assert script.read_report(report) == (1, 2, 1, failures)
    assert script.read_report(tmp_path / "none.xml") == (0, 1, 0, ["pytest ran no test"])


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """Each row is written when it is there, and is not measured again while the sources are it."""
    monkeypatch.setattr(script, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(script, "TABLE", tmp_path / "versions.md")
    monkeypatch.setattr(script, "interpreter", lambda python: "python" * (python == "3.11"))
    monkeypatch.setattr(script, "require_disk", lambda folder: None)
    made: list[str] = []
    measured: list[script.Versions] = []

    class Nothing:
        def __init__(self, folder, python):
            self.folder = folder
            made.append(folder.name)

        def remove(self):
            made.append(f"no {self.folder.name}")

    def measure(wanted, environment, processes):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(wanted)
        where = (wanted.torch, wanted.python, wanted.transformers)
        return script.Row(*where, wanted.tests, script.fingerprint(), "2026-01-01", passed=7)

    monkeypatch.setattr(script, "Environment", Nothing)
    monkeypatch.setattr(script, "measure", measure)
    only = ["torch==2.11.0", "python==3.11"]
    given = argparse.Namespace(only=only, folder=tmp_path, processes=1, keep=False, again=False)
    given.every = True
    with pytest.raises(KeyboardInterrupt):
        script.run_matrix(given)
    assert list(script.known_rows()) == measured
    assert script.TABLE.read_text().count("| 2.11.0 | 3.11 |") == 2

    done = list(measured)
    measured.clear()
    made.clear()
    assert script.run_matrix(given)
    assert len(measured) == 1
    assert measured[0] not in done
    assert made == ["torch-2.11.0-python-3.11", "no torch-2.11.0-python-3.11"]
    assert len(script.known_rows()) == len(versions.TRANSFORMERS)


def test_the_newest_is_left_out_only_where_it_says_so(tmp_path, monkeypatch, capsys):
    """Want of disk, or of a newest torch; whatever fails behind them is a failure."""
    failing: list[str] = []

    class Environment:
        def __init__(self, folder, python):
            pass

        def install(self, *requirements):
            if requirements[-1] in failing:
                raise script.InstallError("no such thing")

        def version(self, name):
            return "1"

        def test(self, tests, processes, order, share=1):
            return 5, len(failing), 0, list(failing)

        def remove(self):
            pass

    monkeypatch.setattr(script, "Environment", Environment)

    def outcome(*names: str, disk: int = script.DISK) -> tuple[bool, str]:
        failing[:] = names
        monkeypatch.setattr(script, "free_disk", lambda folder: disk)
        return script.run_newest(tmp_path, 1, keep=False), capsys.readouterr().out

    fine, said = outcome(disk=script.DISK - 1)
    assert fine
    assert said == "The newest torch is not tested: fewer than 12 GB of disk are free.\n"
    fine, said = outcome("torch")
    assert fine
    assert said == "The newest torch is not tested, it cannot be had: no such thing\n"
    fine, said = outcome(script.MODELS[-1])
    assert not fine
    assert "cannot be installed together: no such thing" in said
    fine, said = outcome("test_of_something")
    assert not fine
    assert "5 passed, 1 failed" in said
    fine, said = outcome()
    assert fine
    assert "5 passed, 0 failed" in said

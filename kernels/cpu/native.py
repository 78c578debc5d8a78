"""C++ built by the machine's own compiler on first use, loaded through ctypes.

    library = native.load(source)      # None where nothing can be compiled, with one warning

A library is built once per machine and kept in a folder of its own: `$MHC_COMPILE_CACHE`, else
`$XDG_CACHE_HOME/mhc_compile`, else `~/.cache/mhc_compile`. Its name is a hash of everything that
decides what is in it: the source, the headers in kernels/cpu, the flags, the instruction set and
the version of the compiler. The compiler is `$CXX`, else c++, g++ or clang++.

Note: Builds and processes
    Several processes may want one library at once, and any of them may be killed. A builder holds a
    `flock` on a file beside the library, which the system releases when its holder dies, however it
    dies; it compiles into a folder of its own and moves the result into place in one step. So a
    library that is there is whole, and nobody waits for a dead process.

Note: OpenMP
    The libraries run on torch's own OpenMP threads: torch loads its libgomp for everybody to see,
    and theirs is then the one that the functions of the library are bound to. The number of threads
    is an argument of every function.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401  (loads libgomp, see above)

_HEADERS = Path(__file__).resolve().parent

# Contraction would fuse a · b + c here and not there; vectors and fused operations are explicit.
_FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fPIC -shared".split()
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none

_NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
"""How compilers are asked for the instruction set of this machine; the first that is understood."""

_TIMEOUT = 600
"""Seconds after which a build is given up: a compiler that hangs must not hold up everybody."""

_lock = threading.Lock()
_warned = False


class BuildError(RuntimeError):
    """A library could not be built."""


def load(source: str) -> ctypes.CDLL | None:
    """The library of a C++ source that may include the headers of kernels/cpu.

    Returns:
        The library, one object per source and process; None if there is no compiler or it fails.
        The first None of a process comes with a RuntimeWarning that says why.
    """
    with _lock:
        return _load(source)


@functools.cache
def _load(source: str) -> ctypes.CDLL | None:
    try:
        return _library(source)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        _warn(str(error))
        return None


def _warn(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "mhc_compile: no C++ kernels, PyTorch's operators are used instead, which is several "
            "times slower on CPU. Install a C++ compiler, or name one in $CXX. Reason: " + reason,
            RuntimeWarning,
            stacklevel=4,
        )


def _library(source: str) -> ctypes.CDLL:
    command, macros = _compiler()
    key = _key(source, command, macros)
    folder = _folder()
    path = folder / f"{key}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # damaged from outside: build it again
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    with _locked(folder / f"{key}.lock"):
        if not path.exists():
            _build(source, command, path)
    return ctypes.CDLL(str(path))


@functools.cache
def _compiler() -> tuple[list[str], str]:
    """The compiler with all flags but files, and what it predefines: its version, the machine's
    instruction set."""
    wanted = os.environ.get("CXX")
    names = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    found = [name for name in names if name and shutil.which(name[0])]
    if not found:
        raise BuildError(f"found no C++ compiler: tried {', '.join(n[0] for n in names if n)}")
    for flags in _NATIVE:
        ask = [*found[0], *flags, "-dM", "-E", "-x", "c++", os.devnull]
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=_TIMEOUT)
        if answer.returncode == 0:
            return [*found[0], *_FLAGS, *_OPENMP, *flags], answer.stdout
    raise BuildError(f"{shlex.join(ask)} failed: {answer.stderr.strip()[-500:]}")


def _key(source: str, command: list[str], macros: str) -> str:
    headers = [f"{path.name}\n{path.read_text()}" for path in sorted(_HEADERS.glob("*.h"))]
    parts = [source, *headers, shlex.join(command), macros]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(b"%d\n" % len(data) + data)
    return digest.hexdigest()


def _folder() -> Path:
    """The folder of libraries; a temporary one where no private folder can be made.

    What lies there is executed: nobody else may write to it.
    """
    given = os.environ.get("MHC_COMPILE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given if given else os.path.join(base, "mhc_compile")).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if private and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="mhc_compile_")
    _holders.append(holder)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []  # deleted at exit


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where no compiler above is found

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children forked meanwhile


def _build(source: str, command: list[str], path: Path) -> None:
    """Compile into `path`; the caller holds its lock."""
    for left in path.parent.glob(f"{path.stem}.build-*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}.build-", dir=path.parent) as folder:
        text, result = Path(folder, "source.cpp"), Path(folder, "library.so")
        text.write_text(source)
        build = [*command, f"-I{_HEADERS}", str(text), "-o", str(result)]
        done = subprocess.run(build, capture_output=True, text=True, timeout=_TIMEOUT)
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(build)} failed: {done.stderr.strip()[-1000:]}")
        os.replace(result, path)

"""Generated Python modules on disk: named after their content, readable, imported from there.

Triton reads the source of a kernel with `inspect`, so generated text must lie in a file. The file
belongs to the user alone, and it is renamed into place, so that processes that write the same text
at once do not disturb each other.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FOLDER_VARIABLE = "MHC_COMPILE_CACHE"
"""Environment variable with the folder of generated files, which is otherwise `mhc_compile` in
`$XDG_CACHE_HOME`, or in `~/.cache`."""


def folder() -> Path:
    """Where generated files lie; made, for the user alone, if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    wanted = os.environ.get(FOLDER_VARIABLE) or os.path.join(base, "mhc_compile")
    try:
        return _private(Path(wanted).expanduser())
    except OSError:  # no home, or a read-only one
        return _private(Path(tempfile.gettempdir()) / f"mhc_compile-{os.getuid()}")


def load(kind: str, text: str) -> ModuleType:
    """The module with this text, from the file `kind_<hash>.py`, which is written if missing."""
    name = f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    path = folder() / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _write(path, text)
    spec = importlib.util.spec_from_file_location(f"mhc_compile_generated.{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where `inspect` looks for the module of a function
    spec.loader.exec_module(module)
    return module


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Code is run from here: nobody else may own it or write to it.
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.access(path, os.W_OK):
        raise PermissionError(f"{path} must belong to and be writable by the user alone")
    return path

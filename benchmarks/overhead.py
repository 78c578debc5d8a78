"""What mHC costs a whole model: training step, compile time, bytes kept for backward.

    python -m benchmarks.overhead                   writes results/overhead.json, docs/overhead.md
    python -m benchmarks.overhead --only gpt-n4     one setting; printed and not written
    python -m benchmarks.overhead --work FOLDER     keeps settings there: an ended run can go on

The 6-layer GPT of `gpt.py` and a Hugging Face Llama of the same size, float32, 1024 tokens, plain
and with n streams: by this library with all passes, with each pass off in turn, and by the
hand-written connections of transformers' DeepSeek-V4 and of lucidrains. Everything is compiled.

A step is forward and backward. All contestants of a setting live in one process and take turns;
the ratio is the median of the ratios to the plain step of the same turn. Compile time is the first
step's in a process of its own, with an empty cache, after a small model has been compiled to load
the compiler. For plain and this library it is the median of three times, in turn, after one more
that brings files into memory and builds our C++ operators, once for a machine (given apart). Bytes
kept for backward are those of distinct storages that autograd saves, without parameters.
Recomputation is off. Parameters of mappings are drawn at random (σ = 0.02 around their start), so
that nothing is zero. Large tensors come from the heap (`MALLOC_MMAP_MAX_=0`), as in `kernels.py`.
On two cores a run takes about half an hour, most of it for compiling.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from benchmarks import harness
from benchmarks.gpt import GPT, V4GPT, VOCAB, WIDTH, LucidrainsGPT, llama
from mhc_compile.kernels.traffic import OPERATORS, traffic

PASSES = ("defer_norm", "fuse_coefficients", "fuse_seams")
TOKENS = 1024
COMPILATIONS = 3
SETTINGS = {
    "gpt-n4": ("gpt", 4),
    "gpt-n2": ("gpt", 2),
    "gpt-n8": ("gpt", 8),
    "llama-n4": ("llama", 4),
}
PLAIN, OURS = "plain", "mhc_compile"


def contestants(model: str, n: int) -> dict[str, Callable[[], nn.Module]]:
    """Makers of compiled modules from ids to a loss."""
    base = {"gpt": GPT, "llama": llama}[model]
    makers: dict[str, Callable[[], nn.Module]] = {
        PLAIN: lambda: _compiled(base(), "inductor"),
        OURS: lambda: _transformed(base(), n),
    }
    if n == 4:
        for name in PASSES:
            makers[f"{OURS} without {name}"] = lambda name=name: _transformed(base(), n, name)
    if model == "gpt" and n == 4:
        makers["transformers V4 modules"] = lambda: _compiled(V4GPT(n), "inductor")
        makers["lucidrains mHC"] = lambda: _compiled(LucidrainsGPT(n), "inductor")
    return makers


def _compiled(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def _transformed(model: nn.Module, n: int, *disabled: str) -> nn.Module:
    config = mhc_compile.Config(n=n, disabled=disabled)
    mhc_compile.transform(model, config=config, example_inputs=(_ids(),))
    for parameter in mhc_compile.parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return _compiled(model, "mhc")


def _ids() -> Tensor:
    return torch.randint(VOCAB, (1, TOKENS))


def measure(setting: str, repeats: int) -> dict[str, Any]:
    """Every contestant of one setting; a peer that does not compile is a result."""
    ids, rows, steps = _ids(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MHC_COMPILE_CACHE"] = f"{folder}/operators"
        compilations = _compilations(setting, folder)
        for name, make in contestants(*SETTINGS[setting]).items():
            compiled = compilations[name]
            rows[name] = compiled
            if "error" in compiled:
                continue
            torch.manual_seed(0)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.pop("cache")
            module = make()
            steps[name] = _step(module, ids)
            steps[name]()  # from the cache that the process has left
            rows[name] |= {"kept_MiB": _kept(module, ids) / 2**20}
            moved = _streams(compiled, SETTINGS[setting][1])
            rows[name] |= {"streams_MiB": moved and moved / 2**20}
        seconds = harness.in_turn(steps, repeats, harness.second_run)
    for name, times in seconds.items():
        ratios = harness.ratios(times, seconds[PLAIN])
        rows[name] |= {
            "step_ms": 1e3 * statistics.median(times),
            "step_ratio": statistics.median(ratios),
            "step_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return rows


def _compilations(setting: str, folder: str) -> dict[str, dict[str, Any]]:
    """What `compile_alone` says of every contestant, each time with an empty cache."""
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(1 + COMPILATIONS):
        for number, name in enumerate(contestants(*SETTINGS[setting])):
            if turn > 0 and name not in (PLAIN, OURS):
                continue
            cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{number}-{turn}"
            compiled = _measured("--setting", setting, "--compile", name)
            found.setdefault(name, []).append({**compiled, "cache": cache})
    return {name: _median_compilation(rows) for name, rows in found.items()}


def _median_compilation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rows) == 1:
        return rows[0]
    seconds = [row["compile_s"] for row in rows]
    return rows[-1] | {
        "first_compile_s": seconds[0],
        "compile_s": statistics.median(seconds[1:]),
        "compilations_s": seconds[1:],
    }


def compile_alone(setting: str, name: str) -> dict[str, Any]:
    """Seconds of the first step, and the operators in what was compiled."""
    _step(_compiled(nn.Sequential(nn.Linear(8, 8)), "inductor"), torch.randn(8, 8))()
    torch.manual_seed(0)
    try:
        module = contestants(*SETTINGS[setting])[name]()
        seconds = harness.elapsed(_step(module, _ids()))
    except Exception as error:
        if name.startswith((PLAIN, OURS)):
            raise
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"compile_s": seconds, **_operators(name, module)}


def _step(module: nn.Module, ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        module(ids).sum().backward()
        module.zero_grad()

    return step


def _kept(module: nn.Module, ids: Tensor) -> int:
    """Bytes of distinct storages that autograd saves, without those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(ids)
    kept = sum(size for pointer, size in sizes.items() if pointer not in own)
    del loss
    return kept


def _operators(name: str, module: nn.Module) -> dict[str, Any]:
    """The operators of this library in the compiled forward and backward graph."""
    if not name.startswith(OURS):
        return {}
    history = mhc_compile.graphs(module)[-1].history
    last = {entry.graph: entry.operators for entry in history}
    return {kind: Counter(last.get(kind, [])) for kind in ("forward", "backward")}


def _streams(row: dict[str, Any], n: int) -> int | None:
    """Bytes of streams that a step's operators have to move: the floor in `kernels/traffic.py`."""
    counts = Counter(row.get("forward", {})) + Counter(row.get("backward", {}))
    if not counts or not set(counts) <= set(OPERATORS):
        return None  # the open form: Inductor decides
    shape = {"T": TOKENS, "n": n, "C": WIDTH, "dtype": torch.float32}
    return sum(count * traffic(name, **shape).floor for name, count in counts.items())


# --- the report -----------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    where = results["machine"]
    lines = [
        "# What mHC costs a whole model",
        "",
        "`python -m benchmarks.overhead`: 6 layers (12 sites), C 512, 1024 tokens, float32, every "
        "contestant",
        "compiled; a step is forward and backward; medians (and quartiles) of "
        f"{results['repeats']} turns, the ratio",
        "taken in each turn.",
        "Recomputation is off. Compile time is that of the first step, with empty caches; of plain "
        "and mhc_compile",
        f"the median of {COMPILATIONS} times in turn. Streams: bytes of streams that the operators "
        "of a step have to read and",
        "write, each tensor once, where these are ours.",
        f"Measured on {where['processor']} ({where['instructions']}), {where['cores']} cores, "
        f"torch {where['torch']}, Python {where['python']}.",
    ]
    for setting, rows in results["settings"].items():
        model, n = SETTINGS[setting]
        lines += ["", f"## {model.capitalize() if model == 'llama' else 'GPT'}, n = {n}", ""]
        heads = ("step (ms)", "against plain", "compile (s)", "against plain", "kept (MiB)")
        cells = [_row(name, row, rows[PLAIN]) for name, row in rows.items()]
        lines += harness.table(["", *heads, "streams (MiB)"], cells)
        lines += ["", *_operator_lines(rows[OURS])]
    return "\n".join([*lines, ""])


def _row(name: str, row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [name, row["error"], "", "", "", "", ""]
    return [
        name,
        f"{row['step_ms']:.1f}",
        f"{row['step_ratio']:.2f} ({' to '.join(f'{q:.2f}' for q in row['step_ratio_quartiles'])})",
        f"{row['compile_s']:.1f}",
        f"{row['compile_s'] / plain['compile_s']:.2f}",
        f"{row['kept_MiB']:.0f}",
        f"{row['streams_MiB']:.0f}" if row["streams_MiB"] else "",
    ]


def _operator_lines(row: dict[str, Any]) -> list[str]:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))

    return [
        *(
            f"Operators of all 12 sites, {kind}: {listed(row[kind])}."
            for kind in ("forward", "backward")
        ),
        f"With the C++ operators, built once for a machine, the first compilation took "
        f"{row['first_compile_s']:.1f} s.",
    ]


def main(only: str, repeats: int, work: str | None) -> None:
    settings = {}
    for name in SETTINGS:
        if only in name:
            command = ("--setting", name, "--repeats", str(repeats))
            file = Path(work, f"{name}.json") if work else None
            settings[name] = harness.kept(file, partial(_measured, *command))
    results = {"machine": harness.machine(), "repeats": repeats, "settings": settings}
    print(document(results))
    if not only:
        harness.write("overhead", results, overhead=document(results))


def _measured(*arguments: str) -> Any:
    return harness.run_self(*arguments, **harness.ALLOCATORS["raised"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--work", help="a folder that exists")
    parser.add_argument("--setting", help="measure this setting in this process and print it")
    parser.add_argument("--compile", help="of that setting, compile this contestant only")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    if arguments.compile:
        harness.show(compile_alone(arguments.setting, arguments.compile))
    elif arguments.setting:
        harness.show(measure(arguments.setting, arguments.repeats))
    else:
        main(arguments.only, arguments.repeats, arguments.work)

"""What a model with hyper-connections of its own gains: DeepSeek-V4 under Inductor and under mhc.

    python -m benchmarks.recognize                  writes results/recognize.json, docs/recognize.md
    python -m benchmarks.recognize --work FOLDER    keeps caches and parts of the result there, so
                                                    that a run that was ended can go on

`deepseek_v4` of Hugging Face transformers with random weights, 3 layers (6 connections, n = 4,
20 iterations), C 512, 1024 tokens, float32: compiled by Inductor alone and by `backend="mhc"`,
which adds nothing and replaces the connections by operators. A third model, with its connections
taken out (streams are averaged and added to, nothing is learned), is compiled by Inductor: what no
treatment of connections can save.

A step is forward and backward. All models live in one process and take turns; the ratio is that of
the medians. Compile time is that of the first step in a process of its own with an empty cache, in
seconds of one processor (compilers that it starts included), after a small model has loaded the
compiler; once more where our C++ operators, built once for a machine, are on disk. Errors are those
against the eager model, in float32, relative. Large tensors come from the heap
(`MALLOC_MMAP_MAX_=0`), as in `kernels.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import mhc_compile
from benchmarks import harness

LAYERS, WIDTH, TOKENS, VOCAB = 3, 512, 1024, 1024
CONTESTANTS = {"Inductor alone": "inductor", "mhc_compile": "mhc"}
AGAIN, REST = "mhc_compile, operators built", "Inductor, connections taken out"
COMPILED = {**CONTESTANTS, AGAIN: "mhc", REST: "inductor"}


class Nothing(nn.Module):
    """In the place of a connection: `[B, S, n, C]` to the mean of the streams, nothing mixed."""

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixing = torch.eye(X.shape[2]).expand(*X.shape[:2], -1, -1)
        return torch.ones_like(X[..., 0]), mixing, X.mean(2)


def model() -> nn.Module:
    """DeepSeek-V4 with φ, α and b far from where connections are trivial."""
    torch.manual_seed(0)
    config = hf.DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        moe_intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2 * TOKENS,
        use_cache=False,
    )
    made = hf.DeepseekV4ForCausalLM(config)
    for name, parameter in made.named_parameters():
        if name.endswith(("_hc.fn", "_hc.base", "_hc.scale")):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def step(module: nn.Module) -> Tensor:
    """Forward and backward; gradients stay."""
    module.zero_grad()
    out = module(ids()).logits
    (out * out).mean().backward()
    return out.detach()


def without_connections(module: nn.Module) -> nn.Module:
    for layer in module.get_submodule("model.layers"):
        layer.attn_hc, layer.ffn_hc = Nothing(), Nothing()
    return module


def compile_alone(name: str) -> dict[str, Any]:
    """Processor seconds of the first step, with the operators in what was compiled."""
    backend = COMPILED[name]
    warm = nn.Sequential(nn.Linear(8, 8))
    warm.compile(backend="inductor")
    warm(torch.randn(8, 8)).sum().backward()
    module = without_connections(model()) if name == REST else model()
    module.compile(backend=backend)
    start, wall = _processor_seconds(), time.perf_counter()
    step(module)
    row: dict[str, Any] = {
        "compile_s": _processor_seconds() - start,
        "compile_wall_s": time.perf_counter() - wall,
    }
    if backend == "mhc":
        (graph,) = mhc_compile.graphs(module)
        last = {entry.graph: entry.operators for entry in graph.history}
        row["recognised"] = [site.name for site in graph.sites]
        row["passes_ms"] = {e.name: e.milliseconds for e in graph.history if e.graph == "captured"}
        row |= {kind: Counter(last[kind]) for kind in ("forward", "backward")}
    return row


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def in_turn(folder: Path, repeats: int) -> dict[str, Any]:
    """Median steps of both, from the caches that their compilation has left; errors."""
    plain = model()
    modules = {name: copy.deepcopy(plain) for name in CONTESTANTS}
    modules[REST] = without_connections(model())
    expected = step(plain)
    rows: dict[str, Any] = {}
    for name, module in modules.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / _file(name))
        module.compile(backend=COMPILED[name])
        output = step(module)
        rows[name] = {}
        if name in CONTESTANTS:
            rows[name] = {
                "output_error": _error([output], [expected]),
                "gradient_error": _error(*(_gradients(m) for m in (module, plain))),
            }
    steps = {name: partial(step, module) for name, module in modules.items()}
    for name, found in harness.in_turn(steps, repeats, harness.second_run).items():
        rows[name] |= {
            "step_ms": 1e3 * statistics.median(found),
            "steps_ms": [1e3 * t for t in found],
        }
    return rows


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; gradients below a hundredth of the largest count as that."""
    floor = max(e.norm() for e in expected) / 100
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).norm() / e.norm().clamp_min(floor)).item() for a, e in pairs)


# --- the report -----------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    where, rows = results["machine"], results["rows"]
    plain, ours = (rows[name] for name in CONTESTANTS)
    faster, compiling = plain["step_ms"] / ours["step_ms"], ours["compile_s"] / plain["compile_s"]
    lines = [
        "# A model that has hyper-connections already",
        "",
        "`python -m benchmarks.recognize`: `deepseek_v4` of transformers "
        f"{results['transformers']}, random weights,",
        f"{LAYERS} layers ({len(ours['recognised'])} connections, n = 4), C {WIDTH}, "
        f"{TOKENS} tokens, float32, compiled by Inductor alone and by",
        '`model.compile(backend="mhc")`. A step is forward and backward; medians of '
        f"{results['repeats']} repeats in turn.",
        "Compile time is that of the first step with an empty cache, in seconds of one processor; "
        "once more where",
        "our C++ operators, built once for a machine, are on disk; and of the model without its "
        "connections: what is",
        "left when they cost nothing. Errors: relative, against the eager model.",
        f"Measured on {where['processor']} ({where['instructions']}), {where['cores']} cores, "
        f"torch {where['torch']}, Python {where['python']}.",
        "",
        *harness.table(
            ["", "step (ms)", "compile (s)", "output error", "gradient error"],
            [_row(name, row) for name, row in rows.items()],
        ),
        f"| ratio | {faster:.2f} times as fast | {compiling:.2f} of it | | |",
        "",
        *(
            f"Operators, {kind}: "
            + ", ".join(f"{count} {name}" for name, count in sorted(ours[kind].items()))
            + "."
            for kind in ("forward", "backward")
        ),
        "",
        _connections(rows),
        f"The passes take {sum(ours['passes_ms'].values()) / 1e3:.1f} s of the compile time.",
    ]
    return "\n".join([*lines, ""])


def _row(name: str, row: dict[str, Any]) -> list[str]:
    cells = {"step_ms": ".1f", "compile_s": ".1f", "output_error": ".0e", "gradient_error": ".0e"}
    return [name, *(format(row[key], f) if key in row else "" for key, f in cells.items())]


def _connections(rows: dict[str, Any]) -> str:
    """What connections cost, and what was to be gained."""
    plain, ours, rest = (rows[name] for name in (*CONTESTANTS, REST))
    step_ms, compile_s = (
        [row[key] - rest[key] for row in (plain, ours)] for key in ("step_ms", "compile_s")
    )
    faster, shorter = (plain[key] / rest[key] for key in ("step_ms", "compile_s"))
    return (
        f"The {len(ours['recognised'])} connections cost {step_ms[0]:.0f} ms of a step and "
        f"{round(compile_s[0])} s of compilation under Inductor alone,\n{step_ms[1]:.0f} ms and "
        f"{round(compile_s[1])} s as operators. That is the most that there is to gain: without "
        f"them the step is\n{faster:.2f} times as fast, and compiled in {1 / shorter:.2f} of the "
        "time."
    )


def main(work: Path, repeats: int) -> None:
    rows: dict[str, Any] = {}
    os.environ["MHC_COMPILE_CACHE"] = str(work / "operators")
    for name in COMPILED:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / _file(name))
        rows[name] = _part(work / f"{_file(name)}.json", "--compile", name)
    steps = _part(work / "steps.json", "--steps", str(work), "--repeats", str(repeats))
    rows = {name: row | steps.get(name, {}) for name, row in rows.items()}
    results = {
        "machine": harness.machine(),
        "transformers": hf.__version__,
        "repeats": repeats,
        "rows": rows,
    }
    print(document(results))
    harness.write("recognize", results, recognize=document(results))


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")  # compilers' commands do not quote paths


def _part(file: Path, *arguments: str) -> Any:
    """A part of the result, measured in a process of its own unless the file has it."""
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else compilers are not our children
    settings = harness.ALLOCATORS["raised"] | threads
    return harness.kept(file, lambda: harness.run_self(*arguments, **settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a folder to keep caches and parts in")
    parser.add_argument("--compile", help="measure the compile time of this backend and print it")
    parser.add_argument("--steps", type=Path, help="measure steps with the caches of this folder")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.compile:
        harness.show(compile_alone(arguments.compile))
    elif arguments.steps:
        harness.show(in_turn(arguments.steps, arguments.repeats))
    elif arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        main(arguments.work, arguments.repeats)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), arguments.repeats)

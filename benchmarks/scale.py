"""What `transform` costs on deep models, against a bare Dynamo capture of the same model.

    python -m benchmarks.scale                 all depths; writes results/scale.json, docs/scale.md
    python -m benchmarks.scale --layers 10 20  only these depths, printed and not written

Models are on the meta device: no memory, no computation, only tracing and passes. Both sides start
from a fresh model and an empty Dynamo; their repeats take turns, and medians are reported, in
seconds of processor time (one thread, so that other programs disturb little). The bare capture is
`torch.compile(model, backend=recorder, fullgraph=True)` called once under fake tensors. The passes
are those of the first call of the transformed model.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mhc_compile
from benchmarks import harness
from mhc_compile._torch import FakeTensorMode

DEPTHS = (25, 50, 100, 300)
WIDTH, VOCAB, BATCH, LENGTH = 256, 1000, 2, 64


class Block(nn.Module):
    """Pre-norm attention and MLP on `[B, S, C]`."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """`[B, S]` of int64 to logits `[B, S, VOCAB]`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def llama(layers: int) -> nn.Module:
    """Hugging Face's Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[int], nn.Module]] = {"GPT": GPT, "Llama": llama}


@dataclass(frozen=True)
class Row:
    """Medians over the repeats, in seconds of processor time; passes in milliseconds."""

    model: str
    layers: int
    sites: int
    nodes: int
    capture: float
    transform: float
    passes: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.transform / self.capture

    def cells(self) -> list[str]:
        return [
            self.model,
            str(self.layers),
            f"{self.nodes:,}",
            f"{self.capture:.2f}",
            f"{self.transform:.2f}",
            f"{self.ratio:.2f}",
            *(f"{milliseconds:.0f}" for milliseconds in self.passes.values()),
        ]


def measure(name: str, layers: int, repeats: int) -> Row:
    """Time both sides in turn on fresh models."""
    captures, transforms = [], []
    for _ in range(repeats):
        captures.append(timed(bare_capture, fresh(name, layers)))
        model = fresh(name, layers)
        transforms.append(timed(transform, model))
    model(input_ids=inputs())
    graph = mhc_compile.graphs(model)[0]
    return Row(
        name,
        layers,
        len(graph.sites),
        len(graph.before.graph.nodes),
        statistics.median(captures),
        statistics.median(transforms),
        {entry.name: entry.milliseconds for entry in graph.history[1:]},
    )


def fresh(name: str, layers: int) -> nn.Module:
    torch._dynamo.reset()
    with torch.device("meta"):
        return MODELS[name](layers)


def inputs() -> Tensor:
    return torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="meta")


def timed(function: Callable[[nn.Module], Any], model: nn.Module) -> float:
    gc.collect()
    return harness.elapsed(lambda: function(model), time.process_time)


def transform(model: nn.Module) -> None:
    config = mhc_compile.Config(history="full")  # the captured graph is counted
    mhc_compile.transform(model, example_inputs={"input_ids": inputs()}, config=config)


def bare_capture(model: nn.Module) -> None:
    def recorder(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        values = fx.map_arg(output.args[0], lambda n: n.meta["example_value"])
        return lambda *_: values

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    call = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)
    with torch.enable_grad(), mode:
        call(input_ids=mode.from_tensor(inputs()))


# --- the report -----------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    rows, where = [Row(**row) for row in results["rows"]], results["machine"]
    passes = list(rows[0].passes)
    columns = ["model", "layers", "nodes", "capture (s)", "transform (s)", "ratio"]
    columns += [f"{name} (ms)" for name in passes]
    return "\n".join(
        [
            "# What `transform` costs on deep models",
            "",
            "`python -m benchmarks.scale`: models on the meta device, so only tracing and passes "
            "take time.",
            "`capture` is a bare Dynamo capture of the plain model, `transform` all of "
            "`mhc_compile.transform`",
            "(its own capture included): processor time, medians of "
            f"{results['repeats']} repeats in turn. The passes are",
            "those of the transformed model's first call.",
            "",
            f"Measured on {where['processor']}, {where['cores']} cores, torch {where['torch']}, "
            f"Python {where['python']}.",
            "",
            *harness.table(columns, [row.cells() for row in rows]),
            "",
        ]
    )


def main(layers: Sequence[int] | None, repeats: int) -> None:
    torch.set_num_threads(1)
    for name in MODELS:
        measure(name, 2, 1)  # what the first capture of a process imports and builds
    rows = []
    for name in MODELS:
        for depth in layers or DEPTHS:
            rows.append(measure(name, depth, repeats))
            print(*rows[-1].cells(), flush=True)
    if not layers:
        rows = [asdict(row) for row in rows]
        results = {"machine": harness.machine(), "repeats": repeats, "rows": rows}
        harness.write("scale", results, scale=document(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", help="depths to try; nothing is written")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.layers, arguments.repeats)

"""A small language model, plain and as an mHC model, side by side on one page of output.

    python examples/demo.py              a minute or two
    python examples/demo.py --steps 50   shorter

A Llama of four layers with random weights (Hugging Face `LlamaConfig`) reads English text one byte
at a time: the help pages that every Python carries (`pydoc_data.topics`). What is printed is
measured on the machine at hand: one small model, one seed, a few hundred steps.
"""

import argparse
import copy
import re
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import mhc_compile

SEED, STREAMS = 0, 4
BATCH, LENGTH, LEARNING_RATE = 8, 64, 2e-3
SHOWN = "model.layers.1"

console = Console(highlight=False)
console.width = max(console.width, 100)  # where the output goes to a file too


def main(steps: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # tensors this small gain nothing from two, and times stay steady
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    train_text, held_out_text = text()
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )
    model = copy.deepcopy(plain)
    size = sum(p.numel() for p in plain.parameters())
    heading("The model")
    console.print(
        f"Llama, 4 layers, {size:,} parameters, random weights; "
        f"{len(train_text):,} bytes of English to train on, {len(held_out_text):,} held out"
    )

    heading("mhc_compile.explain(model): every add of two tensors, and what becomes of it")
    batch = next(batches(train_text))
    console.print(str(mhc_compile.explain(model, input_ids=batch, labels=batch)), markup=False)

    heading(f"mhc_compile.transform(model, n={STREAMS})")
    start = time.perf_counter()
    mhc_compile.transform(model, n=STREAMS)
    seconds = time.perf_counter() - start
    added = sum(p.numel() for p in mhc_compile.parameters(model))
    console.print(f"{added:,} mHC parameters added in {seconds:.1f} s; the original keys are kept")

    heading("The same function at the start: loss and gradients of one batch")
    compare(plain, model, batch)

    heading("mhc_compile.check(model): what equality at the start cannot show")
    report = mhc_compile.check(model, input_ids=batch, labels=batch)
    console.print(str(report), markup=False, soft_wrap=True)
    report.raise_for_problems()

    heading(f"mhc_compile.graphs(model)[0].after.code, the part of {SHOWN}, names shortened")
    graph = mhc_compile.graphs(model)[0]
    console.print(Syntax(block(graph, SHOWN), "python", background_color="default", word_wrap=True))
    heading("The passes that made it")
    for entry in graph.history[1:]:
        console.print(f"{entry.name:>17} {entry.milliseconds:6.1f} ms  {'; '.join(entry.notes)}")

    heading(f"{steps} steps of AdamW on the same batches")
    runs = [Run("plain", plain), Run(f"mHC, n = {STREAMS}", model)]
    train(runs, train_text, steps)

    heading("What was measured")
    console.print(results(runs, held_out_text))
    console.print(
        f"training loss  mean of the last {Run.RECENT} steps, nats per byte\n"
        "held out       the same batches of unseen text for both\n"
        "ms a step      forward, backward and optimizer, median; run eagerly, the two in turn\n"
        "MiB kept       storages behind the tensors that autograd keeps for backward\n"
        "               (saved_tensors_hooks), each counted once, parameters left out\n\n"
        "One seed of one small model: a demonstration, not a comparison of two methods."
    )


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, int64 `[N]`."""
    pages = "\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(pages.encode()), dtype=torch.uint8).long()
    cut = len(data) * 95 // 100
    return data[:cut], data[cut:]


def batches(data: Tensor) -> Iterator[Tensor]:
    """Random pieces of a text, int64 `[BATCH, LENGTH]`, the same ones at every call."""
    random = torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=random)
        yield torch.stack([data[s : s + LENGTH] for s in starts.tolist()])


# --- the start ----------------------------------------------------------------------------------


def compare(plain: LlamaForCausalLM, model: LlamaForCausalLM, batch: Tensor) -> None:
    """Print the loss of both models on one batch and how far their gradients are apart."""
    losses = []
    for each in (plain, model):
        loss = each(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
    own = dict(model.named_parameters())
    distances = {
        name: ((own[name].grad - p.grad).norm() / p.grad.norm()).item()
        for name, p in plain.named_parameters()
    }
    worst = max(distances, key=distances.__getitem__)
    for each in (plain, model):
        each.zero_grad()
    console.print(f"loss      plain {losses[0]:.7f}   mHC {losses[1]:.7f}")
    console.print(
        f"gradients {len(distances)} tensors, relative distance at most {distances[worst]:.1e}, in "
        f"{worst}"
    )


# --- one block as Python --------------------------------------------------------------------------


def block(graph: mhc_compile.RewrittenGraph, module: str) -> str:
    """The lines of a rewritten graph that one module's call became, names shortened.

    Placeholders are named after the path of their parameter: `l_self_modules_..._weight_` is
    written as the path within the module, and `x = None`, which frees memory, is left out.
    """
    inside = {
        node.name
        for node in graph.after.graph.nodes
        if node.op != "placeholder"
        and any(path.endswith(module) for path, *_ in node.meta.get("nn_module_stack", {}).values())
    }
    lines = [line.strip().split(";  ")[0] for line in graph.after.code.splitlines()]
    lines = [line for line in lines if line.split(" = ")[0] in inside]
    prefix = "l_self_modules_" + module.replace(".", "_modules_") + "_modules_"
    parameter = re.compile(re.escape(prefix) + r"(\w+?)_parameters_(\w+?)_(?!\w)")
    shortened = parameter.sub(
        lambda found: f"{found[1].replace('_modules_', '.')}.{found[2]}", "\n".join(lines)
    )
    return shortened.replace("torch.nn.functional.", "F.")


# --- training -------------------------------------------------------------------------------------


@dataclass
class Run:
    """One of the two models in training."""

    RECENT = 20

    name: str
    model: LlamaForCausalLM
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def recent_loss(self) -> float:
        return statistics.mean(self.losses[-self.RECENT :])

    def held_out_loss(self, data: Tensor, count: int = 20) -> float:
        self.model.eval()
        with torch.no_grad():
            losses = [
                self.model(input_ids=batch, labels=batch).loss.item()
                for batch in islice(batches(data), count)
            ]
        self.model.train()
        return statistics.mean(losses)

    def bytes_kept(self, batch: Tensor) -> int:
        """Bytes of the storages that autograd keeps for backward, without the parameters'."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would refer to its own graph

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()  # until here every storage is alive: no address is counted for two
        self.model.zero_grad()
        return sum(kept.values())


def train(runs: list[Run], data: Tensor, steps: int) -> None:
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    stream = batches(data)
    with progress:
        bar = progress.add_task("", total=steps)
        for _ in range(steps):
            batch = next(stream)
            for run in runs:
                run.step(batch)
            told = "   ".join(f"{run.name}: loss {run.recent_loss:.3f}" for run in runs)
            progress.update(bar, advance=1, description=told)


def results(runs: list[Run], held_out: Tensor) -> Table:
    table = Table()
    table.add_column("")
    for name in ("parameters", "training loss", "held out", "ms a step", "MiB kept"):
        table.add_column(name, justify="right")
    batch = next(batches(held_out))
    for run in runs:
        table.add_row(
            run.name,
            f"{sum(p.numel() for p in run.model.parameters()):,}",
            f"{run.recent_loss:.3f}",
            f"{run.held_out_loss(held_out):.3f}",
            f"{1e3 * statistics.median(run.seconds):.0f}",
            f"{run.bytes_kept(batch) / 2**20:.1f}",
        )
    return table


def heading(words: str) -> None:
    console.print(f"\n[bold]{words}[/bold]\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)

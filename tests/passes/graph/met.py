"""Which operations stand in captured graphs: `python -m tests.passes.graph.met` writes the list.

`operators_met.txt` has every operation of the models of the zoo and of transformers, timm and
diffusers that could be captured where it was written, one a line: `torch.add`, `Tensor.view`,
`aten.add.Tensor`. It grows: what stands there already stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

LIST = Path(__file__).with_name("operators_met.txt")
PLACES: dict[str, Any] = {"torch": torch, "F": F, "operator": operator, "linalg": torch.linalg}


def spelled(node: fx.Node) -> str | None:
    """How an operation is written in the list; None for what is not torch's or Python's."""
    target = node.target
    if node.op == "call_method":
        return f"Tensor.{target}"
    if node.op != "call_function":
        return None
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if target.namespace in ("aten", "prims") else None
    name = getattr(target, "__name__", "")
    for place, module in PLACES.items():
        for short in (name, name.removeprefix("linalg_")):
            if getattr(module, short, None) is target:
                return f"{place}.{short}"
    module_name = getattr(target, "__module__", None) or ""
    is_packet = module_name.startswith("torch._ops")  # of operators that are not torch's, too
    return f"{module_name}.{name}" if module_name.startswith("torch") and not is_packet else None


def found(text: str) -> tuple[str, Any]:
    """The kind of node and the target that a line of the list means."""
    place, _, name = text.rpartition(".")
    if place == "Tensor":
        return "call_method", name
    if text.startswith(("aten.", "prims.")):
        target: Any = torch.ops
        for part in text.split("."):
            target = getattr(target, part)
        return "call_function", target
    if place in PLACES:
        return "call_function", getattr(PLACES[place], name)
    module: Any = torch
    for part in place.split(".")[1:]:
        module = getattr(module, part)
    return "call_function", getattr(module, name)


def operations(graph_module: fx.GraphModule) -> Iterator[str]:
    """Every operation of a graph and of the bodies in it."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (text for node in module.graph.nodes if (text := spelled(node)))


def main() -> None:
    from mhc_compile.capture import capture
    from tests.zoo.models import ZOO
    from tests.zoo.more import MORE

    met = set(LIST.read_text(encoding="utf-8").split()) if LIST.exists() else set()
    for entry in [*ZOO, *MORE]:
        try:
            graphs = capture(entry.make(), (), entry.example())
        except Exception as error:
            print(f"{entry.name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        new = {text for graph in graphs for text in operations(graph.gm)} - met
        met |= new
        print(entry.name, len(new), flush=True)
    LIST.write_text("\n".join(sorted(met)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

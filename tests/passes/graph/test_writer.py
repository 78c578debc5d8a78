"""New nodes of the passes have the values that Dynamo would have given them."""

import torch
from torch import fx

from mhc_compile.passes.graph.writer import Writer


def test_values_of_symbolic_sizes():
    """A matmul of tensors whose sizes are symbols, in the fake mode that the capture left."""
    values: list[object] = []

    def backend(gm: fx.GraphModule, example_inputs: list[object]):
        x = next(n for n in gm.graph.nodes if n.name == "y")
        writer = Writer(x, x)
        node = writer.call(torch.matmul, x, writer.call("transpose", x, 1, 2))
        values.append(node.meta["example_value"])
        return gm.forward

    def double(x):
        y = x * 2
        return y + 1

    torch.compile(double, backend=backend, dynamic=True)(torch.ones(2, 5, 4))
    (value,) = values
    assert tuple(map(int, value.shape)) == (2, 5, 5)
    assert isinstance(value.shape[1], torch.SymInt)

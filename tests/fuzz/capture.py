"""The graph that Dynamo hands to a backend, by public means only."""

import torch
from torch import Tensor, fx, nn


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The one graph of a call of a model; fails where there are more."""
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(model, backend=record, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph

"""Chains of sites written with `mhc::` operators, partitioned as AOTAutograd does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx

from mhc_compile.kernels.variants import Variant, get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.fuse_seams import fuse_seams
from mhc_compile.passes.graph.operators import op_name

ops = torch.ops.mhc
WIDTH, EPS = 8, 1e-6

Between = Callable[[Tensor], Tensor]


@dataclass
class Chain:
    """L sites with random φ, α, b, branch weights and an input, as leaves that require gradients.

    `between` stands behind every site, as a post-norm does; `hidden` reads the streams out in
    front of every site; `parallel` adds a second branch on the same h; the leaves numbered in
    `frozen` require no gradient; `branch` is the dtype of branches, if it is not that of streams.
    """

    layers: int = 3
    n: int = 4
    dtype: torch.dtype = torch.float32
    variant: Variant = field(default_factory=lambda: get_variant("mhc", sinkhorn_iters=3))
    between: Between | None = None
    hidden: bool = False
    parallel: bool = False
    frozen: tuple[int, ...] = ()
    branch: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.text = self.variant.text  # Dynamo cannot trace how it is made

    def leaves(self) -> list[Tensor]:
        """x, then φ, α, b and a weight for each site."""
        generator = torch.Generator().manual_seed(self.layers)
        exact = torch.float64 if self.dtype is torch.float64 else torch.float32
        columns = sum(self.variant.columns(self.n))

        def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

        leaves = [random(2, 5, WIDTH, dtype=self.dtype)]
        for _ in range(self.layers):
            leaves += [
                random(self.n * WIDTH, columns, dtype=exact, scale=0.5),
                random(3, dtype=exact),
                random(columns, dtype=exact),
                random(WIDTH, WIDTH, dtype=self.branch or self.dtype, scale=0.5),
            ]
        for i in self.frozen:
            leaves[i].requires_grad_(False)
        return leaves

    def __call__(self, x: Tensor, *leaves: Tensor) -> list[Tensor]:
        X = x.unsqueeze(-2).tile((self.n, 1))
        outputs = []
        for i in range(0, len(leaves), 4):
            phi, alpha, bias, weight = leaves[i : i + 4]
            if self.hidden:
                outputs.append(X.mean(-2))
            H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, self.text, EPS)
            h = ops.pre(H_pre, X, weight.dtype)
            f = (h @ weight).tanh()
            if self.parallel:
                f = f + torch.sigmoid(h @ weight.mT)
            X = ops.post_res(H_res, H_post, X, f)
            if self.between is not None:
                X = self.between(X)
        return [*outputs, X.mean(-2)]


@dataclass
class Result:
    """One forward and backward: values, what was kept between, and the two graphs."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    saved: list[tuple[torch.Size, torch.dtype, int]]
    graphs: dict[str, fx.GraphModule]
    notes: dict[str, list[str]]

    def operators(self, kind: str) -> list[str]:
        """The `mhc::` operators of a graph, in order."""
        nodes = self.graphs[kind].graph.nodes
        return [op_name(n) for n in nodes if str(n.target).startswith("mhc.")]


def run(
    function: Callable[..., Sequence[Tensor]],
    leaves: Sequence[Tensor],
    *,
    fuse: bool = True,
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
) -> Result:
    """Forward and backward through AOTAutograd, with the pass on both graphs or without."""
    graphs: dict[str, fx.GraphModule] = {}
    notes: dict[str, list[str]] = {}

    def compiler(kind: str, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs[kind], notes[kind] = gm, partitioned(gm) if fuse else []
        return make_boxed_func(gm.forward)

    compiled = aot_function(
        function,
        fw_compiler=partial(compiler, "forward"),
        bw_compiler=partial(compiler, "backward"),
        partition_fn=partition,
    )
    saved: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = compiled(*leaves)
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss(outputs), learned) if outputs[0].requires_grad else ()
    return Result(
        [o.detach() for o in outputs],
        list(gradients),
        sorted(((t.shape, t.dtype, t.nbytes) for t in saved.values()), key=str),
        graphs,
        notes,
    )


def partitioned(gm: fx.GraphModule) -> list[str]:
    """Apply the pass and check what must hold behind it; returns its notes."""
    gm.graph.eliminate_dead_code()
    before = [described(v) for v in gm.graph.output_node().all_input_nodes]
    result = fuse_seams(gm, Context(Options(4, get_variant("mhc"))))
    gm.graph.lint()
    gm.recompile()
    assert [described(v) for v in gm.graph.output_node().all_input_nodes] == before
    return result.notes


def described(node: fx.Node) -> tuple[Any, ...]:
    """What the fake value of a node says."""
    value = node.meta["val"]
    return (value.shape, value.dtype, value.stride(), value.device)


def loss(outputs: Sequence[Tensor]) -> Tensor:
    """Weighs every entry of every output differently."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))  # type: ignore

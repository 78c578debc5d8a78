"""Who computes one mHC site, forward and backward, in `kernels.py`: this library and its peers.

A contestant is a function that builds everything for a `Case` once and returns a step: a function
without arguments that goes from X and f to h and X', and back from the gradients of both to those
of X, f and its own parameters. f, the branch's output, is given: the branch itself costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.kernels import reference
from mhc_compile.kernels.ops import seam as seam_ops  # noqa: F401  (registers mhc::)
from mhc_compile.kernels.variants import get_variant

Step = Callable[[], Any]
EPS = 1e-6
PAPER = get_variant("mhc")
TEXT = PAPER.text
mhc = torch.ops.mhc


@dataclass(frozen=True)
class Case:
    """T tokens of n streams of C channels."""

    n: int
    C: int
    dtype: torch.dtype
    tokens: int = 1024
    device: str = "cpu"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def columns(self) -> int:
        return self.n * (self.n + 2)

    @property
    def row(self) -> int:
        """Bytes of one stream."""
        return self.tokens * self.C * self.dtype.itemsize

    def __str__(self) -> str:
        return f"n = {self.n}, C = {self.C}, {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Operands:
    """Streams, branch output, their incoming gradients, and the parameters of a mapping."""

    X: Tensor
    f: Tensor
    dh: Tensor
    dX2: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor

    @staticmethod
    def of(case: Case) -> Operands:
        streams, single = (case.tokens, case.n, case.C), (case.tokens, case.C)
        exact = {"dtype": torch.float32}
        return Operands(
            case.normal(*streams),
            case.normal(*single),
            case.normal(*single),
            case.normal(*streams),
            case.normal(case.n * case.C, case.columns, **exact) / (case.n * case.C) ** 0.5,
            case.normal(3, **exact),
            case.normal(case.columns, **exact),
        )


def operators(case: Case) -> Step:
    """This library's operators as its passes arrange them for a site that stands alone (41C)."""
    o = Operands.of(case)
    mapping = (o.X, o.phi, o.alpha, o.bias)

    def step() -> Any:
        _, H_pre, H_post, H_res, y, inv_r = mhc.coefficients_pre(*mapping, TEXT, EPS, case.dtype)
        mhc.post_res(H_res, H_post, o.X, o.f)
        dH_res, dH_post, partial, df = mhc.post_res_backward(o.dX2, H_res, H_post, o.X, o.f)
        kept = (H_pre, *mapping, y, inv_r, partial)
        return df, mhc.coefficients_pre_backward(o.dh, dH_post, dH_res, *kept, TEXT, EPS)

    return step


def seams(case: Case) -> Step:
    """This library's operators for an inner site of a chain (29C)."""
    o = Operands.of(case)
    _, H_post, H_res, *_ = mhc.coefficients(o.X, o.phi, o.alpha, o.bias, TEXT, EPS)
    dH_post, dH_res = torch.randn_like(H_post), torch.randn_like(H_res)
    mapping = (o.phi, o.alpha, o.bias)

    def step() -> Any:
        X2, _, H_pre, _, _, y, inv_r = mhc.seam(
            H_res, H_post, o.X, o.f, *mapping, TEXT, EPS, case.dtype
        )
        kept = (H_pre, X2, *mapping, y, inv_r, o.dX2, H_res, H_post, o.X, o.f)
        return mhc.seam_backward(o.dh, dH_post, dH_res, *kept, TEXT, EPS)

    return step


def parts(case: Case) -> dict[str, Step]:
    """The operators that the two forms above consist of, one by one, and the chain in them.

    At 8 channels the product with φ costs next to nothing: what is left is the coefficient chain,
    which is the same for any number of channels, and a call.
    """
    o = Operands.of(case)
    mapping = (o.X, o.phi, o.alpha, o.bias)
    _, H_pre, H_post, H_res, y, inv_r = mhc.coefficients_pre(*mapping, TEXT, EPS, case.dtype)
    closed = (H_res, H_post, o.X, o.f)
    kept = (torch.randn_like(H_post), torch.randn_like(H_res), H_pre, *mapping, y, inv_r, o.dX2)
    few = Operands.of(replace(case, C=8))
    chained = (few.X, few.phi, few.alpha, few.bias)
    _, _, _, *kept_of_few = mhc.coefficients(*chained, TEXT, EPS)
    of_H = (torch.randn_like(H_pre), *kept[:2])
    return {
        "chain": lambda: mhc.coefficients(*chained, TEXT, EPS),
        "chain_backward": lambda: mhc.coefficients_backward(
            *of_H, *chained, *kept_of_few, TEXT, EPS
        ),
        "coefficients": lambda: mhc.coefficients(*mapping, TEXT, EPS),
        "coefficients_pre": lambda: mhc.coefficients_pre(*mapping, TEXT, EPS, case.dtype),
        "post_res": lambda: mhc.post_res(*closed),
        "post_res_backward": lambda: mhc.post_res_backward(o.dX2, *closed),
        "coefficients_pre_backward": lambda: mhc.coefficients_pre_backward(o.dh, *kept, TEXT, EPS),
        "seam": lambda: mhc.seam(*closed, *mapping[1:], TEXT, EPS, case.dtype),
        "seam_backward": lambda: mhc.seam_backward(o.dh, *kept, *closed, TEXT, EPS),
    }


def products(case: Case) -> dict[str, Step]:
    """The three products with φ alone, by PyTorch's matmul, in float32 that is there already."""
    exact = {"dtype": torch.float32}
    x = case.normal(case.tokens, case.n * case.C, **exact)
    phi, dy = (
        case.normal(x.shape[1], case.columns, **exact),
        case.normal(case.tokens, case.columns, **exact),
    )
    return {"x⃗ φ": lambda: x @ phi, "dy φᵀ": lambda: dy @ phi.T, "x⃗ᵀ dy": lambda: x.T @ dy}


def reference_eager(case: Case) -> Step:
    """The paper's equations in PyTorch, operation by operation."""
    return _differentiated(case, _reference(case))


def reference_compiled(case: Case) -> Step:
    """The same under Inductor; Sinkhorn-Knopp is one opaque operator."""
    return _differentiated(case, torch.compile(_reference(case), dynamic=False))


def _reference(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    exact = {"compute_dtype": torch.float32}
    shape: dict[str, Any] = {"variant": PAPER, "n": case.n, "width": case.C, "eps": EPS}

    def site(X: Tensor, f: Tensor, *mapping: Tensor) -> tuple[Tensor, Tensor]:
        H_pre, H_post, H_res = reference.coefficients(X, *mapping, **shape, **exact)
        h = reference.pre(H_pre, X, dtype=X.dtype, **exact)
        return h, reference.post_res(H_res, H_post, X, f, dtype=X.dtype, **exact)

    return site


def _differentiated(case: Case, site: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    o = Operands.of(case)
    leaves = [t.requires_grad_() for t in (o.X, o.f, o.phi, o.alpha, o.bias)]

    def step() -> Any:
        return torch.autograd.grad(site(*leaves), leaves, (o.dh, o.dX2))

    return step


def transformers_eager(case: Case) -> Step:
    """`DeepseekV4HyperConnection` of Hugging Face transformers, with its decoder layer's sums."""
    return _transformers(case, lambda site: site)


def transformers_compiled(case: Case) -> Step:
    """The same under Inductor."""
    return _transformers(case, lambda site: torch.compile(site, dynamic=False))


def _transformers(case: Case, compiled: Callable[[Any], Any]) -> Step:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    config = DeepseekV4Config(hidden_size=case.C, hc_mult=case.n)
    connection = DeepseekV4HyperConnection(config).to(case.device)
    for parameter in connection.parameters():
        nn.init.normal_(parameter, std=0.02)

    def site(X: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        post, comb, h = connection(X)
        mixed = torch.matmul(comb.to(X.dtype).transpose(-1, -2), X)
        return h, post.to(X.dtype).unsqueeze(-1) * f.unsqueeze(-2) + mixed

    return _of_module(case, connection, compiled(site), lambda t: t.unsqueeze(0))


def lucidrains_eager(case: Case) -> Step:
    """`mHC` of the package hyper-connections (norm and mapping of each stream by itself)."""
    from hyper_connections.manifold_constrained_hyper_connections import mHC

    connection = mHC(case.n, dim=case.C, layer_index=0).to(case.device)
    for parameter in connection.parameters():
        nn.init.normal_(parameter, std=0.02)

    def site(X: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        h, add = connection(X)
        return h, add(f)

    def arranged(t: Tensor) -> Tensor:  # streams are folded into the batch there
        return t.transpose(0, 1).contiguous() if t.dim() == 3 else t.unsqueeze(0)

    return _of_module(case, connection, site, arranged)


def _of_module(
    case: Case,
    connection: nn.Module,
    site: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    arranged: Callable[[Tensor], Tensor],
) -> Step:
    o = Operands.of(case)
    X, f = (arranged(t).requires_grad_() for t in (o.X, o.f))
    dh, dX2 = arranged(o.dh), arranged(o.dX2)
    leaves = [X, f, *connection.parameters()]

    def step() -> Any:
        return torch.autograd.grad(site(X, f), leaves, (dh, dX2), allow_unused=True)

    return step


def liger(case: Case) -> Step:
    """The functions behind `LigerMHC` (CUDA only)."""
    from liger_kernel.transformers import functional

    o = Operands.of(case)
    X, f = o.X.requires_grad_(), o.f.requires_grad_()
    phi = o.phi.to(case.dtype).requires_grad_()
    bias, alpha = o.bias.requires_grad_(), o.alpha.requires_grad_()
    options = {"tmax": 20, "rms_eps": EPS, "allow_fp32": case.dtype is torch.float32}

    def step() -> Any:
        H_pre, H_post, H_res = functional.liger_mhc_coeffs(X, phi, bias, *alpha.unbind(), **options)
        h = functional.liger_mhc_pre(X, H_pre)
        X2 = functional.liger_mhc_post_res(X, f, H_post, H_res)
        return torch.autograd.grad((h, X2), (X, f, phi, bias, alpha), (o.dh, o.dX2))

    return step


def transformer_engine(case: Case) -> Step:
    """The functions of TransformerEngine's Triton kernels (CUDA only), which have streams last."""
    from transformer_engine.pytorch.triton import mhc as fused

    if case.n != 4:
        raise NotImplementedError("4 streams only")
    o, tokens = Operands.of(case), (case.tokens, 1)
    X, dX2 = (t.mT.contiguous().unsqueeze(1) for t in (o.X, o.dX2))
    f, dh = o.f.unsqueeze(1).requires_grad_(), o.dh.unsqueeze(1)
    X, phi = X.requires_grad_(), o.phi.T.contiguous().to(case.dtype).requires_grad_()
    alpha, bias = o.alpha.requires_grad_(), o.bias.unsqueeze(0).requires_grad_()

    def step() -> Any:
        y, square = fused.mhc_fused_projection(X.flatten(1), phi)
        H_pre, H_post, H_res = fused.mhc_fused_scale(y, alpha, bias, square, case.n)
        H_res = fused.mhc_fused_sinkhorn(H_res.reshape(*tokens, case.n, case.n), case.n)
        h = fused.mhc_fused_aggregate(X, H_pre.reshape(*tokens, case.n), case.n)
        H_post = H_post.reshape(*tokens, case.n)
        X2 = fused.mhc_fused_expand_combine(f, None, H_post, X, H_res, case.n)
        return torch.autograd.grad((h, X2), (X, f, phi, alpha, bias), (dh, dX2))

    return step


def copy(case: Case) -> Step:
    """Copies a buffer of X's size: the rate at which memory can be moved."""
    source = case.normal(case.tokens, case.n, case.C)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


MATMUL = 1024


def matmul(case: Case) -> Step:
    """A product of 1024³ in the dtype of the streams: the rate of arithmetic."""
    a, b = case.normal(MATMUL, MATMUL), case.normal(MATMUL, MATMUL)
    return lambda: a @ b


def exact_matmul(case: Case) -> Step:
    """The same in float32."""
    return matmul(replace(case, dtype=torch.float32))


OURS = {"operators": operators, "operators, seams": seams}
PEERS = {
    "reference, eager": reference_eager,
    "reference, Inductor": reference_compiled,
    "transformers V4, eager": transformers_eager,
    "transformers V4, Inductor": transformers_compiled,
    "lucidrains mHC, eager": lucidrains_eager,
}
CUDA_PEERS = {"Liger": liger, "TransformerEngine": transformer_engine}
ROOFLINE = {"copy": copy, "matmul": matmul, "exact matmul": exact_matmul}

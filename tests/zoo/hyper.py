"""Models that were written with hyper-connections, of transformers and as in the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

VOCAB, WIDTH = 61, 32
_CONNECTION = ("fn", "base", "scale", "hc_fn", "hc_base", "hc_scale")


def tokens(length: int = 9) -> Tensor:
    """Token ids `[2, length]`."""
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def perturbed(model: nn.Module, sigma: float = 0.5) -> nn.Module:
    """Normal noise on the parameters of all connections, which start at trivial values."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in _CONNECTION:
            p += sigma * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def deepseek_v4(layers: int = 3, hidden: int = WIDTH, **options: Any) -> nn.Module:
    """Latent attention, experts chosen by hashes of the tokens, two connections a layer."""
    pytest.importorskip("transformers.models.deepseek_v4")
    config = hf.DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        use_cache=False,
        **options,
    )
    return perturbed(hf.DeepseekV4ForCausalLM(config))


_LATENT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "pad_token_id": 0,
    "use_cache": False,
}


def hy_v4(layers: int = 2) -> nn.Module:
    """Connections without H_res."""
    pytest.importorskip("transformers.models.hy_v4")
    from transformers.models.hy_v4.modeling_hy_v4 import HYV4Config, HYV4ForCausalLM

    config = HYV4Config(
        **_LATENT,
        num_hidden_layers=layers,
        head_dim=16,
        qk_rope_head_dim=8,
        index_head_dim=16,
        mlp_layer_types=["dense"] * layers,
        bos_token_id=1,
        eos_token_id=2,
    )
    return perturbed(HYV4ForCausalLM(config))


def glm5_next(layers: int = 1) -> nn.Module:
    """Linear attention, the connections of DeepSeek-V4, an unweighted mean at the end."""
    pytest.importorskip("transformers.models.glm5_next")
    from transformers.models.glm5_next.modeling_glm5_next import (
        Glm5NextTextConfig,
        Glm5NextTextModel,
    )

    config = Glm5NextTextConfig(
        **_LATENT,
        num_hidden_layers=layers,
        qk_rope_head_dim=0,
        index_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=2,
        linear_conv_kernel_dim=2,
        index_kpool=2,
        mlp_layer_types=["dense"] * layers,
    )
    return perturbed(Glm5NextTextModel(config))


def qwen4_exp(layers: int = 1) -> nn.Module:
    """Connections of another kind: a gate for each channel, streams normalised one by one."""
    pytest.importorskip("transformers.models.qwen4_exp")
    from transformers.models.qwen4_exp.modeling_qwen4_exp import (
        Qwen4ExpForCausalLM,
        Qwen4ExpTextConfig,
    )

    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_conv_kernel_dim=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
        num_experts=4,
        hc_lowrank=4,
        ple_layer_ids=[],
        pad_token_id=0,
        use_cache=False,
    )
    return Qwen4ExpForCausalLM(config)


class Connection(nn.Module):
    """A site as the paper writes it: three projections, α and b of each, Sinkhorn-Knopp."""

    def __init__(self, n: int, width: int, iterations: int = 6) -> None:
        super().__init__()
        self.n, self.iterations = n, iterations
        self.norm = nn.RMSNorm(n * width, eps=1e-6)
        sizes = {"pre": n, "post": n, "res": n * n}
        self.phi = nn.ModuleDict(
            {k: nn.Linear(n * width, size, bias=False) for k, size in sizes.items()}
        )
        self.alpha = nn.ParameterDict({k: torch.tensor(0.7) for k in sizes})
        self.bias = nn.ParameterDict({k: torch.randn(size) for k, size in sizes.items()})

    def logits(self, x: Tensor, part: str) -> Tensor:
        return self.alpha[part] * self.phi[part](x) + self.bias[part]

    def forward(self, X: Tensor, branch: nn.Module) -> Tensor:
        x = self.norm(X.flatten(-2))
        H_pre = torch.sigmoid(self.logits(x, "pre"))
        H_post = 2 * torch.sigmoid(self.logits(x, "post"))
        H_res = self.logits(x, "res").unflatten(-1, (self.n, self.n)).exp()
        for _ in range(self.iterations):
            H_res = H_res / H_res.sum(-2, keepdim=True)
            H_res = H_res / H_res.sum(-1, keepdim=True)
        f = branch((H_pre.unsqueeze(-2) @ X).squeeze(-2))
        return H_res @ X + H_post.unsqueeze(-1) * f.unsqueeze(-2)


class PaperBlock(nn.Module):
    """Two branches, each with a connection."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.mixer_hc, self.mlp_hc = Connection(n, width), Connection(n, width)

    def forward(self, X: Tensor) -> Tensor:
        return self.mlp_hc(self.mixer_hc(X, self.mixer), self.mlp)


class PaperModel(nn.Module):
    """Streams, blocks, the mean of the streams; `broken` breaks the graph there."""

    def __init__(self, layers: int = 2, n: int = 4, width: int = 16, broken: str = "") -> None:
        super().__init__()
        self.n, self.broken = n, broken
        self.blocks = nn.ModuleList(PaperBlock(n, width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        X = x.unsqueeze(-2).expand(*x.shape[:-1], self.n, x.shape[-1])
        if self.broken == "in front":
            torch._dynamo.graph_break()
        for block in self.blocks:
            X = block(X)
        if self.broken == "behind":
            torch._dynamo.graph_break()
        return F.silu(self.head(X.mean(-2)))

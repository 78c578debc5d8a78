"""Residual models written for the zoo: the spellings and topologies that the library models lack.

Every model takes keyword arguments and returns a tensor or lists of tensors. Shapes: `ids` is int64
`[B, S]`, `image` is float `[B, 3, H, W]`. The site counts stand in `models.py`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB = 64


class Attention(nn.Module):
    """Causal self-attention on `[B, S, C]`, with dropout on the output."""

    def __init__(self, width: int, heads: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.qkv(x).split(width, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Module):
    """Two linear layers with GELU between, `[..., C]` to `[..., C]`."""

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


class Decoder(nn.Module):
    """Token embedding, blocks, norm, head: the frame that most models below share."""

    def __init__(self, blocks: list[nn.Module], width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PreNormBlock(nn.Module):
    """The textbook block: two adds, the state on the left."""

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, dropout=dropout)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width, dropout=dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """A GPT in one page: learned positions, tied head, no biases in the norms."""

    def __init__(self, layers: int = 3, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, width)
        self.wpe = nn.Embedding(length, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([PreNormBlock(width) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ParallelBlock(nn.Module):
    """Attention and MLP read the same normed state; `order` is how the three terms are added."""

    def __init__(self, width: int, order: str) -> None:
        super().__init__()
        self.order = order
        self.norm, self.attn, self.mlp = nn.LayerNorm(width), Attention(width), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        a, m = self.attn(h), self.mlp(h)
        if self.order == "(x+a)+m":
            return (x + a) + m
        if self.order == "x+(a+m)":
            return x + (a + m)
        return a + (x + m)


class Skippable(nn.Module):
    """A stack whose layers are left out by Python flags, as early exit and layer pruning do."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([PreNormBlock(width) for _ in range(layers)])
        self.head = nn.Linear(width, VOCAB)

    def forward(
        self, ids: torch.Tensor, active: tuple[bool, bool, bool] = (True, True, True)
    ) -> torch.Tensor:
        x = self.embed(ids)
        for block, runs in zip(self.blocks, active, strict=True):
            if runs:
                x = block(x)
        return self.head(x)


class SpelledBlock(nn.Module):
    """One add, written in one of the ways that PyTorch code has for it."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.attn(self.norm(x))
        match self.spelling:
            case "torch.add":
                return torch.add(x, f)
            case "method":
                return f.add(x)
            case "add_":
                return f.add_(x)
            case "iadd":
                f += x
                return f
            case "alpha":
                return torch.add(x, f, alpha=0.5)
            case "alpha-skip":
                return torch.add(f, x, alpha=0.5)
        raise ValueError(self.spelling)


class ScaledBlock(nn.Module):
    """Constants on either side and a learned per-channel gain on the skip: three adds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)
        self.norm3, self.mlp2 = nn.LayerNorm(width), MLP(width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 0.5 * x + self.attn(self.norm1(x))
        x = x + 0.1 * self.mlp(self.norm2(x))
        return self.gain * x + self.mlp2(self.norm3(x))


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of whole samples in training mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class LayerScaleBlock(nn.Module):
    """A vision-transformer block with a learned scale and stochastic depth on each branch."""

    def __init__(self, width: int, rate: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)
        self.gamma1 = nn.Parameter(torch.full((width,), 1e-5))
        self.gamma2 = nn.Parameter(torch.full((width,), 1e-5))
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class RepeatedBranchBlock(nn.Module):
    """One branch module used twice, and a branch that is a bare parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(width), MLP(width)
        self.weight = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ff(self.norm(x))
        x = x + self.ff(self.norm(x))
        return x + torch.tanh(x @ self.weight)


class CheckpointedBlock(PreNormBlock):
    """Checkpoints its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class RegionBlock(PreNormBlock):
    """Its forward is a region that torch.compile compiles once for all layers.

    Without dropout: inside such a region PyTorch itself draws other masks than eager mode does.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, dropout=0.0)

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class SequenceFirst(nn.Module):
    """`[S, B, C]` throughout, as fairseq and Megatron keep it."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.norms1 = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.attns = nn.ModuleList([nn.MultiheadAttention(width, 2) for _ in range(layers)])
        self.norms2 = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.mlps = nn.ModuleList([MLP(width) for _ in range(layers)])
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(0, 1)
        layers = zip(self.norms1, self.attns, self.norms2, self.mlps, strict=True)
        for norm1, attn, norm2, mlp in layers:
            h = norm1(x)
            x = x + attn(h, h, h, need_weights=False)[0]
            x = x + mlp(norm2(x))
        return self.head(x).transpose(0, 1)


class DeepSupervision(nn.Module):
    """Every block's state is returned and goes through a head of its own."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([PreNormBlock(width) for _ in range(layers)])
        self.heads = nn.ModuleList([nn.Linear(width, VOCAB) for _ in range(layers)])

    def forward(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x = self.embed(ids)
        states, logits = [], []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            states.append(x)
            logits.append(head(x))
        return states, logits


class MixerBlock(nn.Module):
    """MLP-Mixer: one MLP over the tokens, one over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.token_mlp = nn.LayerNorm(width), MLP(tokens)
        self.norm2, self.channel_mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """Patches of a `[B, 3, 16, 16]` image through three mixer blocks, mean-pooled to classes."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.blocks = nn.ModuleList([MixerBlock(16, width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class PreActivation(nn.Module):
    """Pre-activation residual block: in-place ReLUs in the branch, an in-place add at its end."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out += identity
        return out


class PostActivation(nn.Module):
    """The classic residual block: the in-place ReLU after the add overwrites the stream."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ConvNet(nn.Module):
    """Stem, two stages of three blocks (16 channels, then 32 at half the resolution), a head."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(block(16, 16), block(16, 16), block(16, 16))
        self.stage2 = nn.Sequential(block(16, 32, 2), block(32, 32), block(32, 32))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.stage1(self.stem(image)))
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))


class UNet(nn.Module):
    """Two widths; the upper one's first state returns by concatenation before the last chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Sequential(PreActivation(16, 16), PreActivation(16, 16))
        self.reduce = nn.Conv2d(16, 32, 2, stride=2)
        self.middle = nn.Sequential(PreActivation(32, 32), PreActivation(32, 32))
        self.expand = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge = nn.Conv2d(32, 16, 1)
        self.up = nn.Sequential(PreActivation(16, 16), PreActivation(16, 16))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first = self.down(self.stem(image))
        x = self.expand(self.middle(self.reduce(first)))
        return self.head(self.up(self.merge(torch.cat([x, first], dim=1))))


class TwoTowers(nn.Module):
    """Two independent stacks of different widths that meet in a similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Decoder([PreNormBlock(32) for _ in range(2)], 32)
        self.image = Mixer(layers=2, width=16)
        self.image.head = nn.Linear(16, VOCAB)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        text = F.normalize(self.text(ids).mean(dim=1), dim=-1)
        return text @ F.normalize(self.image(image), dim=-1).T

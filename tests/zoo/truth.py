"""n-stream models written out by hand: what a transformed model has to compute.

Imports nothing of mhc_compile. Each function re-writes the forward of one library model with its
residual stream held as `X [..., n, C]`; the branches are the model's own submodules. Where the
formulas of arXiv:2512.24880 become code (`coefficients`, `connect`), H_res is indexed `[out, in]`
and everything is plain, differentiable PyTorch in the model's dtype.

A `Parameters` maps a site's name (owner path + branch) to its `(phi [nC, 2n+n*n], alpha [3],
bias [2n+n*n])`, columns pre | post | res. `trace`, if given, receives X behind every site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Parameters = Mapping[str, tuple[Tensor, Tensor, Tensor]]
Branch = Callable[[Tensor], Tensor]


def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`X [..., n, C]` to `H_pre`, `H_post [..., n]`, `H_res [..., n, n]` (eqs. 14 to 19)."""
    n = X.shape[-2]
    x = X.flatten(-2)
    r = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pre, post, res = ((x @ phi) / r).split([n, n, n * n], dim=-1)
    b_pre, b_post, b_res = bias.split([n, n, n * n])
    H_pre = torch.sigmoid(alpha[0] * pre + b_pre)
    H_post = 2 * torch.sigmoid(alpha[1] * post + b_post)
    M = torch.exp(alpha[2] * res + b_res).unflatten(-1, (n, n))
    for _ in range(20):
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    return H_pre, H_post, M


class Streams:
    """The n-stream state and the parameters of its sites."""

    def __init__(self, n: int, parameters: Parameters, trace: list[Tensor] | None = None) -> None:
        self.n, self.parameters, self.trace = n, parameters, trace

    def expand(self, x: Tensor) -> Tensor:
        """`[..., C]` to n equal streams `[..., n, C]`."""
        return torch.stack([x] * self.n, dim=-2)

    def connect(self, X: Tensor, site: str, branch: Branch) -> Tensor:
        """One site: `X' = H_res X + H_post^T F(H_pre X)`."""
        H_pre, H_post, H_res = coefficients(X, *self.parameters[site])
        f = branch((H_pre.unsqueeze(-1) * X).sum(-2))
        X = H_res @ X + H_post.unsqueeze(-1) * f.unsqueeze(-2)
        if self.trace is not None:
            self.trace.append(X)
        return X


def readout(X: Tensor) -> Tensor:
    """The mean of the streams, `[..., n, C]` to `[..., C]`."""
    return X.mean(-2)


def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Additive `[1, 1, S, S]` mask: 0 where a token may look, very negative elsewhere."""
    mask = torch.full((1, 1, length, length), torch.finfo(dtype).min, dtype=dtype)
    return mask.triu(1)


def truth_llama(
    model: nn.Module,
    parameters: Parameters,
    n: int,
    *,
    input_ids: Tensor,
    trace: list[Tensor] | None = None,
) -> list[Tensor]:
    """Pre-norm decoder; the final norm runs once, on the readout. Returns `[logits]`."""
    streams = Streams(n, parameters, trace)
    x = model.model.embed_tokens(input_ids)
    position_ids = torch.arange(input_ids.shape[1])[None]
    rotary = model.model.rotary_emb(x, position_ids=position_ids)

    X = streams.expand(x)
    for i, layer in enumerate(model.model.layers):

        def attention(h: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer.self_attn(
                layer.input_layernorm(h), attention_mask=None, position_embeddings=rotary
            )[0]

        def mlp(h: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(h))

        X = streams.connect(X, f"model.layers.{i}.self_attn", attention)
        X = streams.connect(X, f"model.layers.{i}.mlp", mlp)
    return [model.lm_head(model.model.norm(readout(X)))]


def truth_gptj(
    model: nn.Module,
    parameters: Parameters,
    n: int,
    *,
    input_ids: Tensor,
    trace: list[Tensor] | None = None,
) -> list[Tensor]:
    """Parallel branches: one site a layer, F = attention + MLP. Returns `[logits]`."""
    streams = Streams(n, parameters, trace)
    body = model.transformer
    length = input_ids.shape[1]
    x = body.drop(body.wte(input_ids))
    positions: dict[str, Any] = {"position_ids": torch.arange(length)[None]}
    if hasattr(body, "rotary_emb"):  # as of transformers 5.24 it is computed once
        positions = {"position_embeddings": body.rotary_emb(x, **positions)}

    X = streams.expand(x)
    for i, block in enumerate(body.h):

        def attention_and_mlp(h: Tensor, block: nn.Module = block) -> Tensor:
            h = block.ln_1(h)
            mask = causal_mask(length, h.dtype)
            attention = block.attn(h, attention_mask=mask, **positions)[0]
            return attention + block.mlp(h)

        X = streams.connect(X, f"transformer.h.{i}.attn", attention_and_mlp)
    return [model.lm_head(body.ln_f(readout(X)))]


def truth_bert(
    model: nn.Module,
    parameters: Parameters,
    n: int,
    *,
    input_ids: Tensor,
    trace: list[Tensor] | None = None,
) -> list[Tensor]:
    """Post-norm: LayerNorm on every stream, but behind the last add once, on the readout."""
    streams = Streams(n, parameters, trace)
    layers = model.bert.encoder.layer

    X = streams.expand(model.bert.embeddings(input_ids=input_ids))
    for i, layer in enumerate(layers):
        after_attention, after_mlp = layer.attention.output, layer.output

        def attention(
            h: Tensor, attention: nn.Module = layer.attention.self, out: nn.Module = after_attention
        ) -> Tensor:
            return out.dropout(out.dense(attention(h)[0]))

        def mlp(
            h: Tensor, up: nn.Module = layer.intermediate, out: nn.Module = after_mlp
        ) -> Tensor:
            return out.dropout(out.dense(up(h)))

        name = f"bert.encoder.layer.{i}"
        X = streams.connect(X, f"{name}.attention.output.dense", attention)
        X = after_attention.LayerNorm(X)
        X = streams.connect(X, f"{name}.output.dense", mlp)
        if i + 1 < len(layers):
            X = after_mlp.LayerNorm(X)
    return [model.cls(layers[-1].output.LayerNorm(readout(X)))]


def truth_t5(
    model: nn.Module,
    parameters: Parameters,
    n: int,
    *,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    trace: list[Tensor] | None = None,
) -> list[Tensor]:
    """Two chains; every decoder layer attends to the encoder's one readout.

    Returns `[logits, encoder output]`.
    """
    streams = Streams(n, parameters, trace)

    def run(stack: nn.Module, name: str, tokens: Tensor, encoded: Tensor | None) -> Tensor:
        length = tokens.shape[1]
        dtype = stack.final_layer_norm.weight.dtype
        mask = causal_mask(length, dtype) if encoded is not None else None
        # Only the first layer holds the table of relative positions; all layers use its bias.
        attention0 = stack.block[0].layer[0].SelfAttention
        bias = attention0.compute_bias(length, length)

        X = streams.expand(stack.dropout(stack.embed_tokens(tokens)))
        for i, block in enumerate(stack.block):

            def self_attention(h: Tensor, part: nn.Module = block.layer[0]) -> Tensor:
                h = part.layer_norm(h)
                return part.dropout(part.SelfAttention(h, mask=mask, position_bias=bias)[0])

            def cross_attention(h: Tensor, part: nn.Module = block.layer[1]) -> Tensor:
                h = part.layer_norm(h)
                return part.dropout(part.EncDecAttention(h, key_value_states=encoded)[0])

            def mlp(h: Tensor, part: nn.Module = block.layer[-1]) -> Tensor:
                return part.dropout(part.DenseReluDense(part.layer_norm(h)))

            site = f"{name}.block.{i}.layer"
            X = streams.connect(X, f"{site}.0.SelfAttention", self_attention)
            if encoded is not None:
                X = streams.connect(X, f"{site}.1.EncDecAttention", cross_attention)
            X = streams.connect(X, f"{site}.{len(block.layer) - 1}.DenseReluDense", mlp)
        return stack.dropout(stack.final_layer_norm(readout(X)))

    encoded = run(model.encoder, "encoder", input_ids, None)
    decoded = run(model.decoder, "decoder", decoder_input_ids, encoded)
    if model.config.scale_decoder_outputs:
        decoded = decoded * model.model_dim**-0.5
    return [model.lm_head(decoded), encoded]


def truth_resnet(
    model: nn.Module,
    parameters: Parameters,
    n: int,
    *,
    pixel_values: Tensor,
    trace: list[Tensor] | None = None,
) -> list[Tensor]:
    """Channels first: a token is a position, `X [B, H, W, n, C]`.

    A block whose skip is a projection is no site: it runs plainly and a new chain starts behind
    it. The ReLU behind an add acts on every stream, behind a chain's last add once, on the readout.
    Returns `[last hidden state, pooled]`.
    """
    streams = Streams(n, parameters, trace)
    x = model.embedder(pixel_values)
    for s, stage in enumerate(model.encoder.stages):
        blocks = list(stage.layers)
        first = 0 if isinstance(blocks[0].shortcut, nn.Identity) else 1
        if first:
            x = blocks[0](x)

        X = streams.expand(x.movedim(1, -1))
        for i in range(first, len(blocks)):

            def layer(h: Tensor, block: nn.Module = blocks[i]) -> Tensor:
                return block.layer(h.movedim(-1, 1)).movedim(1, -1)

            X = streams.connect(X, f"encoder.stages.{s}.layers.{i}.layer", layer)
            if i + 1 < len(blocks):
                X = blocks[i].activation(X)
        x = blocks[-1].activation(readout(X).movedim(-1, 1))
    return [x, model.pooler(x)]


TRUTHS: dict[str, Callable[..., list[Tensor]]] = {
    "llama": truth_llama,
    "gptj": truth_gptj,
    "bert": truth_bert,
    "t5": truth_t5,
    "resnet": truth_resnet,
}

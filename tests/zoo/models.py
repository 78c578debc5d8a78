"""The zoo: small residual models with random weights, and how many sites a person counts in each.

A count is read from the model's source, never from what the detector says; the reason stands in
`notes`. Library models use three layers (3 + 3 for encoder-decoders), widths of 16 to 32 and their
default dropouts. Dropouts that would decide in Python whether a layer runs (LayerDrop) are off:
such a model has no single graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from . import own

hf.logging.set_verbosity_error()
VOCAB = own.VOCAB


@dataclass(frozen=True)
class Model:
    """One entry of the zoo.

    `sites` and `chains` are the counts of a reader of the source, `linear` says that nothing
    non-linear stands between two sites of a chain, `length` is the default number of tokens.
    `for_float64` edits a model that cannot run in float64, or only with a stream rounded to
    float32, as it stands. `output_error` and `gradient_error` are the relative tolerances against
    the plain model in float32.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    sites: int
    chains: int
    notes: str
    linear: bool = True
    length: int = 8
    for_float64: Callable[[nn.Module], None] | None = None
    output_error: float = 1e-5
    gradient_error: float = 2e-4

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model in training mode, with the same generic weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().train()
            randomize(model)
        if dtype is torch.float64 and self.for_float64 is not None:
            self.for_float64(model)
        return model.to(dtype)

    def example(
        self, dtype: torch.dtype = torch.float32, batch: int = 4, length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Keyword arguments of a call, the same at every call; image models ignore `length`.

        Four samples, so that stochastic depth practically never drops a branch of all of them.
        """
        with torch.random.fork_rng():
            torch.manual_seed(1)
            inputs = self.inputs(batch, length or self.length)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every parameter a generic value of ordinary size.

    Library initialisations (std 0.02, zero biases, unit norms, layer scales of 1e-6) make branches
    of width 32 so weak that a wrong branch would pass every tolerance.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter)
            if isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            elif name == "weight" and parameter.dim() >= 2:
                # Hugging Face's Conv1D (GPT-2) keeps [in, out], all others [out, in, ...].
                conv1d = isinstance(module, hf.pytorch_utils.Conv1D)
                fan_in = parameter.shape[0] if conv1d else parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
            elif parameter.dim() >= 2 and parameter.std() < 0.05:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)


# ------------------------------------------------------------------------------------------- inputs


def ids(batch: int, length: int) -> torch.Tensor:
    """Token ids `[B, S]`, free of the special ids 0 to 2."""
    return torch.randint(3, VOCAB, (batch, length))


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(batch, length)}


def own_text(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"ids": ids(batch, length)}


def text_pair(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length - 3)}


def pixels(size: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    return lambda batch, length: {"pixel_values": torch.randn(batch, 3, size, size)}


def image(size: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    return lambda batch, length: {"image": torch.randn(batch, 3, size, size)}


def states(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"src": torch.randn(batch, length, 32)}


def states_sequence_first(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"src": torch.randn(length, batch, 32)}


# ------------------------------------------------------------------------- configurations in common

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BART_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
VIT_LIKE = {
    # By default 1e-12. A norm in front of the first branch hides the scale of its input, and with
    # it H_pre of the first site, up to this eps.
    "layer_norm_eps": 1e-6,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}

TWO_PRE_NORM = "2 adds a layer: after attention, after the MLP"
TWO_POST_NORM = "2 adds a layer, each followed by the norm of the stream"
ONE_PARALLEL = "1 add a layer: attention and MLP read the same state and are added to it together"
ENCODER_DECODER = "2 adds an encoder layer, 3 a decoder layer (self, cross, MLP); two streams"


class ExactGemmaNorm(Gemma2RMSNorm):
    """The norm in the model's own dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x) * (1.0 + self.weight)


def norm_in_float64(model: nn.Module) -> None:
    """Compute Gemma's norms in float64.

    They round to float32. Behind a branch that hits gradients which are sums of two float32
    numbers: exact ties, so a difference of 1e-16 becomes one of 1e-7.
    """
    for module in model.modules():
        if isinstance(module, Gemma2RMSNorm):
            module.__class__ = ExactGemmaNorm


def batch_experts(model: nn.Module) -> None:
    """The default grouped matmul of the experts has no float64 kernel; the batched one does."""
    model.set_experts_implementation("batched_mm")


def keep_stream_in_float64(model: nn.Module) -> None:
    """Mamba casts its stream to float32 by a flag; in float64 that would round every stream."""
    for module in model.modules():
        if hasattr(module, "residual_in_fp32"):
            module.residual_in_fp32 = False


def sequential_mamba(model: nn.Module) -> None:
    """The recurrence as a loop over the tokens; by default it compiles to an associative scan."""
    keep_stream_in_float64(model)
    for module in model.modules():
        if hasattr(module, "use_associative_scan"):
            module.use_associative_scan = False


# -------------------------------------------------------------------------------------- decoders


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**LLAMA_LIKE, sliding_window=8))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA_LIKE))


def qwen2_moe() -> nn.Module:
    config = hf.Qwen2MoeConfig(
        **LLAMA_LIKE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    )
    return hf.Qwen2MoeForCausalLM(config)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA_LIKE, head_dim=16, sliding_window=8))


def olmo2() -> nn.Module:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**LLAMA_LIKE))


def granite() -> nn.Module:
    config = hf.GraniteConfig(**LLAMA_LIKE, residual_multiplier=0.3, embedding_multiplier=2.0)
    return hf.GraniteForCausalLM(config)


def cohere() -> nn.Module:
    return hf.CohereForCausalLM(hf.CohereConfig(**LLAMA_LIKE))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.GPT2LMHeadModel(config)


def gptj() -> nn.Module:
    config = hf.GPTJConfig(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=2,
        rotary_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.GPTJForCausalLM(config)


def gpt_neox() -> nn.Module:
    config = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**config, use_parallel_residual=True))


def falcon() -> nn.Module:
    config = hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        parallel_attn=True,
        hidden_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.FalconForCausalLM(config)


def phi() -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**{**LLAMA_LIKE, "num_key_value_heads": 2}))


def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.OPTForCausalLM(config)


def bloom() -> nn.Module:
    config = hf.BloomConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=3,
        n_head=2,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.BloomForCausalLM(config)


def mamba() -> nn.Module:
    config = hf.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.MambaForCausalLM(config)


def mamba2() -> nn.Module:
    config = hf.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=16,
        expand=2,
        n_groups=1,
        chunk_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.Mamba2ForCausalLM(config)


# -------------------------------------------------------------------------------------- encoders


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**BERT_LIKE))


def electra() -> nn.Module:
    return hf.ElectraForMaskedLM(hf.ElectraConfig(**BERT_LIKE, embedding_size=16))


def roberta() -> nn.Module:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT_LIKE, bos_token_id=1, eos_token_id=2))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCAB,
        dim=32,
        hidden_dim=48,
        n_layers=3,
        n_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return hf.DistilBertForMaskedLM(config)


def albert() -> nn.Module:
    config = hf.AlbertConfig(
        **BERT_LIKE, embedding_size=16, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return hf.AlbertForMaskedLM(config)


def deberta_v2() -> nn.Module:
    config = hf.DebertaV2Config(
        **BERT_LIKE,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=16,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=2,
    )
    return hf.DebertaV2Model(config)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        **BERT_LIKE,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        mlp_dropout=0.1,
    )
    return hf.ModernBertForMaskedLM(config)


def fnet() -> nn.Module:
    config = {k: v for k, v in BERT_LIKE.items() if k != "num_attention_heads"}
    return hf.FNetForMaskedLM(hf.FNetConfig(**config))


# ------------------------------------------------------------------------------- encoder-decoders


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return hf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART_LIKE, forced_eos_token_id=None))


def marian() -> nn.Module:
    config = hf.MarianConfig(**BART_LIKE, decoder_vocab_size=VOCAB, forced_eos_token_id=None)
    return hf.MarianMTModel(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=8,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        dropout=0.1,
        use_cache=False,
    )
    return hf.WhisperForConditionalGeneration(config)


def whisper_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(batch, 8, 16),
        "decoder_input_ids": ids(batch, length),
    }


# ------------------------------------------------------------------------------- audio and vision


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    model = hf.Wav2Vec2Model(config)
    # Trained, it sets `requires_grad` on its input, which Dynamo does not trace.
    model.freeze_feature_encoder()
    return model


def waveform(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 10 * length + 15)}


def vit() -> nn.Module:
    config = hf.ViTConfig(**VIT_LIKE, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return hf.ViTForImageClassification(config)


def deit() -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**VIT_LIKE))


def dinov2() -> nn.Module:
    config = {k: v for k, v in VIT_LIKE.items() if k != "intermediate_size"}
    return hf.Dinov2Model(hf.Dinov2Config(**config, mlp_ratio=2, drop_path_rate=0.1))


def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.1,
    )
    return hf.SwinModel(config)


def convnext() -> nn.Module:
    config = hf.ConvNextConfig(
        num_stages=2, hidden_sizes=[16, 32], depths=[3, 3], drop_path_rate=0.1
    )
    return hf.ConvNextModel(config)


def poolformer() -> nn.Module:
    config = hf.PoolFormerConfig(
        num_encoder_blocks=2,
        depths=[3, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
        drop_path_rate=0.1,
    )
    return hf.PoolFormerModel(config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        layer_type="basic", depths=[3, 3], embedding_size=16, hidden_sizes=[16, 32]
    )
    return hf.ResNetModel(config)


# -------------------------------------------------------------------------------- PyTorch and own


def encoder(norm_first: bool, batch_first: bool, activation: str = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        32, 2, 48, activation=activation, norm_first=norm_first, batch_first=batch_first
    )
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(32), enable_nested_tensor=False)


def stack(block: Callable[[], nn.Module], layers: int = 3) -> Callable[[], nn.Module]:
    return lambda: own.Decoder([block() for _ in range(layers)])


def spelled() -> nn.Module:
    spellings = ("torch.add", "method", "add_", "iadd", "alpha", "alpha-skip")
    return own.Decoder([own.SpelledBlock(32, spelling) for spelling in spellings])


def two_towers_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"ids": ids(batch, length), "image": torch.randn(batch, 3, 16, 16)}


SANDWICH = TWO_PRE_NORM + ", norms before and behind the branch"
EXPERTS = TWO_PRE_NORM + "; the experts are summed inside the MLP"
STREAM_IN_FP32 = "1 add a layer: the stream, cast to float32 by a flag, plus the mixer"
PRE_ACTIVATION = "3 blocks in stage 1, 2 in stage 2, whose first block projects its skip"

ZOO: list[Model] = [
    Model("llama", llama, text, 6, 1, TWO_PRE_NORM),
    Model("mistral", mistral, text, 6, 1, TWO_PRE_NORM),
    Model("qwen2", qwen2, text, 6, 1, TWO_PRE_NORM),
    Model("qwen2-moe", qwen2_moe, text, 6, 1, EXPERTS, for_float64=batch_experts),
    Model("mixtral", mixtral, text, 6, 1, EXPERTS, for_float64=batch_experts),
    Model("gemma2", gemma2, text, 6, 1, SANDWICH, for_float64=norm_in_float64),
    Model("olmo2", olmo2, text, 6, 1, TWO_PRE_NORM + ", norms only behind the branch"),
    Model("granite", granite, text, 6, 1, TWO_PRE_NORM + ", the branch scaled by a constant"),
    Model("cohere", cohere, text, 3, 1, ONE_PARALLEL + ": (x + a) + m"),
    Model("gpt2", gpt2, text, 6, 1, TWO_PRE_NORM + "; the position add is not one"),
    Model("gptj", gptj, text, 3, 1, ONE_PARALLEL + ": (a + m) + x"),
    Model("gpt-neox", gpt_neox, text, 3, 1, ONE_PARALLEL + ": (m + a) + x, a norm for each"),
    Model("falcon", falcon, text, 3, 1, ONE_PARALLEL + ": m += a, x + dropout(m)"),
    Model("phi", phi, text, 3, 1, ONE_PARALLEL + ": (a + m) + x"),
    Model("opt", opt, text, 6, 1, TWO_PRE_NORM + "; the stream is [B*S, C] around the MLP"),
    Model("bloom", bloom, text, 6, 1, TWO_PRE_NORM + "; the adds are inside the branch modules"),
    Model(
        "mamba",
        mamba,
        text,
        3,
        1,
        STREAM_IN_FP32,
        length=4,  # the scan is unrolled over the tokens: its graph grows with the length
        for_float64=sequential_mamba,
    ),
    Model("mamba2", mamba2, text, 3, 1, STREAM_IN_FP32, for_float64=keep_stream_in_float64),
    Model("bert", bert, text, 6, 1, TWO_POST_NORM, linear=False),
    Model("electra", electra, text, 6, 1, TWO_POST_NORM, linear=False),
    Model("roberta", roberta, text, 6, 1, TWO_POST_NORM, linear=False),
    Model("distilbert", distilbert, text, 6, 1, TWO_POST_NORM, linear=False),
    Model("albert", albert, text, 6, 1, "one layer of 2 adds, applied three times", linear=False),
    Model("deberta-v2", deberta_v2, text, 6, 1, TWO_POST_NORM, linear=False),
    Model("modernbert", modernbert, text, 6, 1, TWO_PRE_NORM + "; no norm before the first branch"),
    Model("fnet", fnet, text, 6, 1, TWO_POST_NORM + "; the first branch is an FFT", linear=False),
    Model("t5", t5, text_pair, 15, 2, ENCODER_DECODER),
    Model("bart", bart, text_pair, 15, 2, ENCODER_DECODER + ", post-norm", linear=False),
    Model("marian", marian, text_pair, 15, 2, ENCODER_DECODER + ", post-norm", linear=False),
    Model("whisper", whisper, whisper_inputs, 15, 2, ENCODER_DECODER),
    Model(
        "wav2vec2",
        wav2vec2,
        waveform,
        7,
        1,
        TWO_POST_NORM + "; before them x + conv(x), the convolutional position embedding of x",
        linear=False,
    ),
    Model("vit", vit, pixels(16), 6, 1, TWO_PRE_NORM),
    Model("deit", deit, pixels(16), 6, 1, TWO_PRE_NORM),
    Model("dinov2", dinov2, pixels(16), 6, 1, TWO_PRE_NORM + ", layer scale and stochastic depth"),
    Model("swin", swin, pixels(16), 8, 2, "2 stages of 2 layers of 2 adds; patch merging between"),
    Model("convnext", convnext, pixels(32), 6, 2, "2 stages of 3 blocks; a convolution between"),
    Model("poolformer", poolformer, pixels(32), 10, 2, "stages of 3 and 2 layers of 2 adds"),
    Model("resnet", resnet, pixels(32), 5, 2, PRE_ACTIVATION, linear=False),
    Model("torch-pre-norm", lambda: encoder(True, True), states, 6, 1, TWO_PRE_NORM),
    Model(
        "torch-pre-norm-sequence-first",
        lambda: encoder(True, False, "gelu"),
        states_sequence_first,
        6,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "torch-post-norm", lambda: encoder(False, True), states, 6, 1, TWO_POST_NORM, linear=False
    ),
    Model(
        "torch-post-norm-sequence-first",
        lambda: encoder(False, False),
        states_sequence_first,
        6,
        1,
        TWO_POST_NORM,
        linear=False,
    ),
    Model("nanogpt", own.NanoGPT, own_text, 6, 1, TWO_PRE_NORM),
    Model(
        "parallel-left",
        stack(lambda: own.ParallelBlock(32, "(x+a)+m")),
        own_text,
        3,
        1,
        ONE_PARALLEL,
    ),
    Model(
        "parallel-inner",
        stack(lambda: own.ParallelBlock(32, "x+(a+m)")),
        own_text,
        3,
        1,
        ONE_PARALLEL,
    ),
    Model(
        "parallel-outer",
        stack(lambda: own.ParallelBlock(32, "a+(x+m)")),
        own_text,
        3,
        1,
        ONE_PARALLEL,
    ),
    Model("skippable", own.Skippable, own_text, 6, 1, TWO_PRE_NORM),
    Model("spelled", spelled, own_text, 6, 1, "1 add a block, six spellings"),
    Model("scaled", stack(lambda: own.ScaledBlock(32), 2), own_text, 6, 1, "3 adds a block"),
    Model(
        "layerscale-droppath", stack(lambda: own.LayerScaleBlock(32)), own_text, 6, 1, TWO_PRE_NORM
    ),
    Model(
        "repeated-branch",
        stack(lambda: own.RepeatedBranchBlock(32), 2),
        own_text,
        6,
        1,
        "3 adds a block: the same MLP twice, a bare matrix once",
    ),
    Model("checkpointed", stack(lambda: own.CheckpointedBlock(32)), own_text, 6, 1, TWO_PRE_NORM),
    Model("nested-region", stack(lambda: own.RegionBlock(32)), own_text, 6, 1, TWO_PRE_NORM),
    Model("sequence-first", own.SequenceFirst, own_text, 6, 1, TWO_PRE_NORM),
    Model(
        "deep-supervision", own.DeepSupervision, own_text, 6, 1, TWO_PRE_NORM + "; heads on the way"
    ),
    Model("mixer", own.Mixer, image(16), 6, 1, "2 adds a layer: over tokens, over channels"),
    Model(
        "pre-activation", lambda: own.ConvNet(own.PreActivation), image(16), 5, 2, PRE_ACTIVATION
    ),
    Model(
        "post-activation",
        lambda: own.ConvNet(own.PostActivation),
        image(16),
        5,
        2,
        PRE_ACTIVATION + "; the ReLU behind the add is in place",
        linear=False,
    ),
    Model("unet", own.UNet, image(16), 6, 3, "2 blocks down, 2 in the middle, 2 up"),
    Model("two-towers", own.TwoTowers, two_towers_inputs, 8, 2, "2 adds a layer, 2 layers a tower"),
]
BY_NAME = {model.name: model for model in ZOO}


def every(step: int, models: list[Model] = ZOO) -> list[Model]:
    """Every `step`-th model, for a test too slow for all; all of them under `make zoo`."""
    return models[:: 1 if os.environ.get("MHC_ZOO") == "all" else step]

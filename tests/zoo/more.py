"""More models, for what differs between families and versions: wrappers, decorators, libraries.

As in `models.py`, with two layers in place of three: roots behind decorators (most of transformers
since 5.24), models inside models, text with images, audio, and the models of timm and diffusers
(whose roots have a `__getattr__`, and whose blocks `allow_in_graph`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from .models import (
    BART_LIKE,
    BERT_LIKE,
    ENCODER_DECODER,
    EXPERTS,
    LLAMA_LIKE,
    ONE_PARALLEL,
    SANDWICH,
    STREAM_IN_FP32,
    TWO_POST_NORM,
    TWO_PRE_NORM,
    VIT_LIKE,
    VOCAB,
    Model,
    batch_experts,
    ids,
    keep_stream_in_float64,
    pixels,
    text,
    text_pair,
    waveform,
)

TWO = {"num_hidden_layers": 2}
LLAMA = LLAMA_LIKE | TWO
BERT = BERT_LIKE | TWO
VIT = VIT_LIKE | TWO
BART = BART_LIKE | {"encoder_layers": 2, "decoder_layers": 2}
GPT = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
SHARED_HEADS = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}


def of(name: str, *, head: str = "ForCausalLM", **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers by the stem of its class names."""

    def build() -> nn.Module:
        config = getattr(hf, f"{name}Config")(**options)
        return getattr(hf, name + head)(config)

    return build


def norm_in_float64(model: nn.Module) -> None:
    """Compute Gemma's norms, which round to float32, in the model's own dtype."""
    for module in model.modules():
        if hasattr(module, "_norm") and hasattr(module, "weight"):
            module.__class__ = type(
                "ExactNorm",
                (type(module),),
                {"forward": lambda self, x: self._norm(x) * (1.0 + self.weight)},
            )


# --------------------------------------------------------------------------------------- decoders


def gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA, head_dim=16))


MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}

DECODERS = [
    Model("qwen3", of("Qwen3", **LLAMA, head_dim=16), text, 4, 1, TWO_PRE_NORM),
    Model("phi3", of("Phi3", **LLAMA, resid_pdrop=0.1), text, 4, 1, TWO_PRE_NORM),
    Model(
        "gemma",
        of("Gemma", **LLAMA, head_dim=16),
        text,
        4,
        1,
        TWO_PRE_NORM,
        for_float64=norm_in_float64,
    ),
    Model("gemma3", gemma3, text, 4, 1, SANDWICH, for_float64=norm_in_float64),
    Model("starcoder2", of("Starcoder2", **LLAMA), text, 4, 1, TWO_PRE_NORM),
    Model("stablelm", of("StableLm", **LLAMA), text, 4, 1, TWO_PRE_NORM),
    Model(
        "stablelm-parallel",
        of("StableLm", **LLAMA, use_parallel_residual=True),
        text,
        2,
        1,
        ONE_PARALLEL,
    ),
    Model("glm", of("Glm", **LLAMA, head_dim=16), text, 4, 1, TWO_PRE_NORM),
    Model("glm4", of("Glm4", **LLAMA, head_dim=16), text, 4, 1, SANDWICH),
    Model("olmo", of("Olmo", **LLAMA), text, 4, 1, TWO_PRE_NORM),
    Model("smollm3", of("SmolLM3", **LLAMA), text, 4, 1, TWO_PRE_NORM),
    Model(
        "exaone4", of("Exaone4", **LLAMA), text, 4, 1, TWO_PRE_NORM + ", norms behind the branch"
    ),
    Model("nemotron", of("Nemotron", **LLAMA), text, 4, 1, TWO_PRE_NORM),
    Model("persimmon", of("Persimmon", **SHARED_HEADS), text, 4, 1, TWO_PRE_NORM),
    Model("gpt-bigcode", of("GPTBigCode", **GPT), text, 4, 1, TWO_PRE_NORM),
    Model("codegen", of("CodeGen", **GPT, rotary_dim=8), text, 2, 1, ONE_PARALLEL),
    Model(
        "gpt-neo",
        of(
            "GPTNeo",
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=64,
            use_cache=False,
        ),
        text,
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "mpt",
        of(
            "Mpt",
            d_model=32,
            n_heads=2,
            n_layers=2,
            expansion_ratio=2,
            max_seq_len=64,
            vocab_size=VOCAB,
            use_cache=False,
        ),
        text,
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "biogpt",
        of("BioGpt", **(BERT | {"use_cache": False, "layerdrop": 0.0})),
        text,
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "falcon-mamba",
        of(
            "FalconMamba",
            vocab_size=VOCAB,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            use_cache=False,
        ),
        text,
        2,
        1,
        STREAM_IN_FP32,
        length=4,
        for_float64=keep_stream_in_float64,
    ),
    Model(
        "qwen3-moe",
        of(
            "Qwen3Moe",
            **LLAMA,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        text,
        4,
        1,
        EXPERTS,
        for_float64=batch_experts,
    ),
    Model(
        "olmoe",
        of("Olmoe", **LLAMA, num_experts=4, num_experts_per_tok=2),
        text,
        4,
        1,
        EXPERTS,
        for_float64=batch_experts,
    ),
    Model(
        "deepseek-v3",
        of(
            "DeepseekV3",
            **(LLAMA | {"num_key_value_heads": 2}),
            **MLA,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        text,
        4,
        1,
        EXPERTS,
        for_float64=batch_experts,
    ),
    Model(
        "gpt-oss",
        of(
            "GptOss",
            **LLAMA,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
        text,
        4,
        1,
        EXPERTS,
        for_float64=batch_experts,
    ),
]

# --------------------------------------------------------------------------------------- encoders

ENCODERS = [
    Model(
        "esm",
        of(
            "Esm",
            head="ForMaskedLM",
            **BERT,
            mask_token_id=3,
            position_embedding_type="rotary",
            layer_norm_eps=1e-6,  # as in VIT_LIKE
        ),
        text,
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "mpnet", of("MPNet", head="ForMaskedLM", **BERT), text, 4, 1, TWO_POST_NORM, linear=False
    ),
    Model(
        "nomic-bert",
        of("NomicBert", head="ForMaskedLM", **BERT),
        text,
        4,
        1,
        TWO_POST_NORM,
        linear=False,
    ),
    Model(
        "convbert",
        of(
            "ConvBert",
            head="ForMaskedLM",
            **BERT,
            embedding_size=32,
            head_ratio=1,
            conv_kernel_size=3,
        ),
        text,
        4,
        1,
        TWO_POST_NORM,
        linear=False,
    ),
    Model(
        "xlm-roberta",
        of("XLMRoberta", head="ForMaskedLM", **BERT, bos_token_id=1, eos_token_id=2),
        text,
        4,
        1,
        TWO_POST_NORM,
        linear=False,
    ),
]

# -------------------------------------------------------------------------------- encoder-decoders

PAIRS = [
    Model(
        "pegasus",
        of("Pegasus", head="ForConditionalGeneration", **BART),
        text_pair,
        10,
        2,
        ENCODER_DECODER,
    ),
    Model(
        "mbart",
        of("MBart", head="ForConditionalGeneration", **BART),
        text_pair,
        10,
        2,
        ENCODER_DECODER,
    ),
    Model(
        "m2m-100",
        of(
            "M2M100",
            head="ForConditionalGeneration",
            **BART,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
        ),
        text_pair,
        10,
        2,
        ENCODER_DECODER,
    ),
    Model(
        "blenderbot",
        of("Blenderbot", head="ForConditionalGeneration", **BART),
        text_pair,
        10,
        2,
        ENCODER_DECODER,
    ),
    Model(
        "umt5",
        of(
            "UMT5",
            head="ForConditionalGeneration",
            vocab_size=VOCAB,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            use_cache=False,
        ),
        text_pair,
        10,
        2,
        ENCODER_DECODER,
    ),
]

# ------------------------------------------------------------------------------------------- audio

AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
WITH_POSITIONS = TWO_POST_NORM + "; before them x + conv(x), the convolutional position embedding"


def frozen_features(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Else its feature encoder sets `requires_grad` on its input, which Dynamo does not trace."""

    def make() -> nn.Module:
        model = build()
        model.freeze_feature_encoder() if hasattr(
            model, "freeze_feature_encoder"
        ) else model.feature_extractor._freeze_parameters()
        return model

    return make


def spectrogram(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 16, 16)}


HEARING = [
    Model(
        "hubert",
        frozen_features(of("Hubert", head="Model", **AUDIO)),
        waveform,
        5,
        1,
        WITH_POSITIONS,
        linear=False,
    ),
    Model(
        "wavlm",
        frozen_features(of("WavLM", head="Model", **AUDIO)),
        waveform,
        5,
        1,
        WITH_POSITIONS,
        linear=False,
    ),
    Model(
        "unispeech-sat",
        frozen_features(of("UniSpeechSat", head="Model", **AUDIO)),
        waveform,
        5,
        1,
        WITH_POSITIONS,
        linear=False,
    ),
    Model(
        "data2vec-audio",
        frozen_features(of("Data2VecAudio", head="Model", **AUDIO)),
        waveform,
        5,
        1,
        WITH_POSITIONS,
        linear=False,
    ),
    Model(
        "ast",
        of(
            "AST",
            head="Model",
            **{k: v for k, v in VIT.items() if k not in ("image_size",)},
            max_length=16,
            num_mel_bins=16,
            frequency_stride=4,
            time_stride=4,
        ),
        spectrogram,
        4,
        1,
        TWO_PRE_NORM,
    ),
]

# ------------------------------------------------------------------------------------------ vision


def video(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 2, 3, 16, 16)}


SEEING = [
    Model(
        "beit",
        of("Beit", head="Model", **VIT, use_relative_position_bias=True, drop_path_rate=0.1),
        pixels(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "dinov2-with-registers",
        of(
            "Dinov2WithRegisters",
            head="Model",
            **{k: v for k, v in VIT.items() if k != "intermediate_size"},
            mlp_ratio=2,
        ),
        pixels(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model("dinov3", of("DINOv3ViT", head="Model", **VIT), pixels(16), 4, 1, TWO_PRE_NORM),
    Model(
        "yolos",
        of("Yolos", head="Model", **(VIT | {"image_size": [16, 16]}), num_detection_tokens=4),
        pixels(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "swinv2",
        of(
            "Swinv2",
            head="Model",
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            mlp_ratio=2.0,
        ),
        pixels(16),
        8,
        2,
        "2 stages of 2 layers of 2 adds; patch merging between",
    ),
    Model(
        "convnextv2",
        of("ConvNextV2", head="Model", num_stages=2, hidden_sizes=[16, 32], depths=[2, 2]),
        pixels(32),
        4,
        2,
        "2 stages of 2 blocks; a convolution between",
    ),
    Model(
        "segformer",
        of(
            "Segformer",
            head="Model",
            num_encoder_blocks=2,
            depths=[2, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 2],
            mlp_ratios=[2, 2],
        ),
        pixels(32),
        8,
        2,
        "2 stages of 2 layers of 2 adds; patch embedding between",
    ),
    Model(
        "videomae",
        of("VideoMAE", head="Model", **VIT, num_frames=2, tubelet_size=2),
        video,
        4,
        1,
        TWO_PRE_NORM,
    ),
]

# --------------------------------------------------------------------------------- text with images

TOWER_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER_IMAGE = VIT
IMAGE_TOKEN = 3


def text_and_pixels(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(batch, length), "pixel_values": torch.randn(batch, 3, 16, 16)}


def text_around_an_image(batch: int, length: int) -> dict[str, torch.Tensor]:
    """16 places for the patches of an image among the tokens."""
    tokens = torch.randint(IMAGE_TOKEN + 1, VOCAB, (batch, length + 16))
    tokens[:, 2:18] = IMAGE_TOKEN
    return {"input_ids": tokens, "pixel_values": torch.randn(batch, 3, 16, 16)}


def two_towers(name: str) -> Callable[[], nn.Module]:
    return of(name, head="Model", text_config=TOWER_TEXT, vision_config=TOWER_IMAGE)


def llava() -> nn.Module:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**LLAMA),
        vision_config=hf.CLIPVisionConfig(**VIT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


def deepseek_vl() -> nn.Module:
    config = hf.DeepseekVLConfig(
        text_config=hf.LlamaConfig(**LLAMA),
        vision_config=hf.SiglipVisionConfig(**VIT, vision_use_head=False),
        image_token_id=IMAGE_TOKEN,
    )
    return hf.DeepseekVLForConditionalGeneration(config)


def git() -> nn.Module:
    return hf.GitForCausalLM(
        hf.GitConfig(**BERT, vision_config=VIT, use_cache=False, num_image_with_embedding=None)
    )


# Else each of these models compares the number of image tokens with that of patches, in a way that
# torch 2.14 cannot trace without `capture_scalar_outputs`. The library offers this switch.
os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"

TOWERS = "a tower each for text and images, " + TWO_PRE_NORM
INSIDE = "an image tower whose states are put among the tokens, " + TWO_PRE_NORM + " in both"

SEEING_AND_READING = [
    Model("clip", two_towers("CLIP"), text_and_pixels, 8, 2, TOWERS),
    Model(
        "siglip",
        two_towers("Siglip"),
        text_and_pixels,
        8,
        2,
        TOWERS + "; the add of the pooling head stands alone",
    ),
    Model("llava", llava, text_around_an_image, 8, 2, INSIDE),
    Model("deepseek-vl", deepseek_vl, text_around_an_image, 8, 2, INSIDE),
    Model("git", git, text_and_pixels, 8, 2, INSIDE, linear=False),
]

REFUSED = [
    Model(
        "vilt",
        of("Vilt", head="Model", **{k: v for k, v in (BERT | VIT).items() if k != "pad_token_id"}),
        text_and_pixels,
        0,
        0,
        "picks patches by the values of a mask, in front of the streams",
    ),
]
"""Models of which no call can be captured: one error says so, and where."""

# ------------------------------------------------------------------------------- timm and diffusers


def of_timm(path: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of timm by module and class."""

    def build() -> nn.Module:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(**options)

    return build


def x(size: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    return lambda batch, length: {"x": torch.randn(batch, 3, size, size)}


TIMM_VIT = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_classes": 10,
}

TIMM = [
    Model(
        "timm-vit",
        of_timm("vision_transformer.VisionTransformer", **TIMM_VIT),
        x(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "timm-deit",
        of_timm("deit.VisionTransformerDistilled", **TIMM_VIT),
        x(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model("timm-beit", of_timm("beit.Beit", **TIMM_VIT), x(16), 4, 1, TWO_PRE_NORM),
    Model("timm-eva", of_timm("eva.Eva", **TIMM_VIT), x(16), 4, 1, TWO_PRE_NORM),
    Model(
        "timm-cait",
        of_timm("cait.Cait", **TIMM_VIT),
        x(16),
        8,
        2,
        TWO_PRE_NORM + "; 2 more layers act on the class token alone",
    ),
    Model(
        "timm-mixer",
        of_timm(
            "mlp_mixer.MlpMixer",
            img_size=16,
            patch_size=4,
            embed_dim=32,
            num_blocks=2,
            num_classes=10,
        ),
        x(16),
        4,
        1,
        TWO_PRE_NORM,
    ),
    Model(
        "timm-convnext",
        of_timm("convnext.ConvNeXt", depths=(2, 2, 2, 2), dims=(8, 16, 16, 16), num_classes=10),
        x(64),
        8,
        4,
        "4 stages of 2 blocks; a convolution between",
    ),
    Model(
        "timm-swin",
        of_timm(
            "swin_transformer.SwinTransformer",
            img_size=16,
            patch_size=2,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=4,
            num_classes=10,
        ),
        x(16),
        8,
        2,
        "2 stages of 2 layers of 2 adds; patch merging between",
    ),
    Model(
        "timm-metaformer",
        of_timm("metaformer.MetaFormer", depths=(2, 2), dims=(16, 32), num_classes=10),
        x(32),
        8,
        2,
        "2 stages of 2 blocks of 2 adds; a convolution between",
    ),
    Model(
        "timm-resnetv2",
        of_timm("resnetv2.ResNetV2", layers=(3, 3), channels=(128, 256), num_classes=10),
        x(32),
        4,
        2,
        "2 stages of 3 blocks, the first of which has a projected skip",
    ),
]


def of_diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of diffusers by class."""
    return lambda: getattr(importlib.import_module("diffusers"), name)(**options)


def noisy(size: int = 8, context: bool = True) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Latents, time steps and the states of a prompt."""

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        found = {"sample": torch.randn(batch, 4, size, size), "timestep": torch.arange(batch)}
        return found | ({"encoder_hidden_states": torch.randn(batch, 5, 16)} if context else {})

    return inputs


def hidden(**more: Callable[[int], torch.Tensor]) -> Callable[[int, int], dict[str, torch.Tensor]]:
    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {"hidden_states": torch.randn(batch, 4, 8, 8)} | {
            k: make(batch) for k, make in more.items()
        }

    return inputs


def flux_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(batch, 16, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": torch.rand(batch),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


DIFFUSERS = [
    Model(
        "unet-condition",
        of_diffusers(
            "UNet2DConditionModel",
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        noisy(),
        26,
        8,
        "4 adds of blocks and transformers down, 4 with the middle; 3 in each of 6 transformers; "
        "up every block has a projected skip, and the add behind it stands alone",
    ),
    Model(
        "unet-2d",
        of_diffusers(
            "UNet2DModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        noisy(context=False),
        9,
        2,
        "2 blocks at first; 2 blocks with attention and the middle; up as in unet-condition",
    ),
    Model(
        "dit",
        of_diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            norm_num_groups=8,
            num_embeds_ada_norm=10,
        ),
        hidden(timestep=torch.arange, class_labels=torch.arange),
        4,
        1,
        "2 adds a layer, behind gates",
    ),
    Model(
        "transformer-2d",
        of_diffusers(
            "Transformer2DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            norm_num_groups=2,
        ),
        hidden(encoder_hidden_states=lambda b: torch.randn(b, 5, 16)),
        6,
        1,
        "3 adds a layer: self, cross, MLP; the add around all stands alone",
    ),
    Model(
        "flux",
        of_diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        flux_inputs,
        8,
        2,
        "2 adds a layer and stream in 2 layers; in the single layers each add stands alone, "
        "behind a cat of text and image",
    ),
    Model(
        "sd3",
        of_diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=4,
        ),
        hidden(
            encoder_hidden_states=lambda b: torch.randn(b, 5, 16),
            pooled_projections=lambda b: torch.randn(b, 16),
            timestep=torch.arange,
        ),
        6,
        2,
        "2 adds a layer and stream; the last layer has none of the text",
    ),
    Model(
        "pixart",
        of_diffusers(
            "PixArtTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
            norm_num_groups=8,
        ),
        hidden(encoder_hidden_states=lambda b: torch.randn(b, 5, 16), timestep=torch.arange),
        6,
        1,
        "3 adds a layer: self, cross, MLP",
    ),
    Model(
        "prior",
        of_diffusers(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=16,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        lambda batch, length: {
            "hidden_states": torch.randn(batch, 16),
            "timestep": torch.arange(batch),
            "proj_embedding": torch.randn(batch, 16),
            "encoder_hidden_states": torch.randn(batch, 5, 16),
        },
        4,
        1,
        "2 adds a layer: self, MLP",
    ),
    Model(
        "autoencoder-kl",
        of_diffusers(
            "AutoencoderKL",
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=2,
            norm_num_groups=8,
        ),
        lambda batch, length: {"sample": torch.randn(batch, 3, 8, 8)},
        14,
        4,
        "2 stages down, the middle in the second; the middle in the first of 2 stages up; behind a "
        "change of width 1 block less",
    ),
]


# ------------------------------------------------------------------------------------ all together

GROUPS = {
    "decoders": DECODERS,
    "encoders": ENCODERS,
    "encoder-decoders": PAIRS,
    "audio": HEARING,
    "vision": SEEING,
    "vision and language": SEEING_AND_READING,
    "timm": TIMM if importlib.util.find_spec("timm") else [],
    "diffusers": DIFFUSERS if importlib.util.find_spec("diffusers") else [],
}
MORE = [model for group in GROUPS.values() for model in group]

"""What particular frameworks need beyond the general mechanism, in one place.

torch.nn: ``TransformerEncoderLayer`` has a fused inference path that hides its residual adds.
Hugging Face: ``generate`` compiles its decode step by itself; ``output_hidden_states`` installs
hooks at the first call, which Dynamo cannot trace; and models can say what inputs they take.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import callbacks

__all__ = ["before_call", "example_inputs", "overrides", "prepare", "undo"]

COMPILED = "_mhc_compiled_calls"
_FAST_PATH = "_mhc_activation_relu_or_gelu"


def prepare(module: nn.Module) -> None:
    """Turn off what would hide residual adds from the capture."""
    if isinstance(module, nn.TransformerEncoderLayer) and _FAST_PATH not in module.__dict__:
        module.__dict__[_FAST_PATH] = module.activation_relu_or_gelu
        module.activation_relu_or_gelu = 0


def undo(module: nn.Module) -> None:
    """Take back what ``prepare`` did."""
    if _FAST_PATH in module.__dict__:
        module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)


def overrides(original: type[nn.Module]) -> Mapping[str, Any]:
    """Methods that the swapped class of a framework's class must answer itself."""
    own: dict[str, Any] = {}
    if hasattr(original, "get_compiled_call"):
        own["get_compiled_call"] = _get_compiled_call
    if hasattr(original, "save_pretrained"):
        own["save_pretrained"] = callbacks.save_pretrained_of(original.save_pretrained)
    return own


def _get_compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
    """Hugging Face's ``PreTrainedModel.get_compiled_call``, with this library's backend."""
    settings = dict(compile_config.to_dict()) if compile_config is not None else {}
    chosen: dict[str, Any] = {
        k: settings.get(k) for k in ("fullgraph", "dynamic", "mode", "options")
    }
    chosen = {k: v for k, v in chosen.items() if v is not None}
    if "options" in chosen:
        chosen.pop("mode", None)
    key = repr(sorted(chosen.items(), key=str))
    kept = self.__dict__.setdefault(COMPILED, {})
    if key not in kept:
        kept[key] = torch.compile(self.__call__, backend=callbacks.mhc, **chosen)
    return kept[key]


def before_call(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Install Hugging Face's output hooks ahead of the capture that would trip over it."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or not hasattr(module, "config"):
        return
    install = getattr(capturing, "maybe_install_capturing_hooks", None)
    wanted = any(
        kwargs.get(f"output_{k}", getattr(module.config, f"output_{k}", False))
        for k in ("hidden_states", "attentions", "router_logits")
    )
    if wanted and install is not None:
        for part in module.modules():
            if hasattr(part, "config") and hasattr(part, "get_compiled_call"):
                install(part)


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Inputs that a Hugging Face model says it takes, None for anything else."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    inputs: dict[str, Any] | None = None
    if main == "pixel_values":
        inputs = {main: _image(config)}
    elif main == "input_ids":
        ids = torch.zeros(2, 8, dtype=torch.long)
        inputs = {main: ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
    # A cache is made of real tensors, which a meta-device model cannot join; no site is in it.
    if inputs is not None and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _image(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.zeros(2, getattr(config, "num_channels", 3), height, width)

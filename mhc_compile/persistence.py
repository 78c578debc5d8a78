"""`save` and `load`: what `transform` added, apart from the model it was added to.

A folder holds `mhc_config.json` (format, configuration, names of the sites) and
`mhc_model.safetensors` (what the mHC containers have in the model's state dict, under the same
names). The base model is saved and loaded by whatever means it has; its keys are untouched.
A folder of `save_pretrained` has the second file only where its own weights lack some of these.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import Config
from .errors import CheckpointError, NotTransformedError
from .model.connection import (
    ENTRY,
    Connection,
    Connections,
    StreamParameters,
    warn_of_old_state,
    why_not_loaded,
)
from .model.pending import is_pending, refuse_pending, then
from .model.swap import is_swapped
from .transform import revert, transform

CONFIG_FILE = "mhc_config.json"
WEIGHTS_FILE = "mhc_model.safetensors"
FORMAT = 1
PRETRAINED_FILES = ("model", "diffusion_pytorch_model")
"""What Hugging Face's libraries call the weights in a folder of `save_pretrained`."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Saved:
    """What a folder says: the configuration, the names of the sites, the tensors by name."""

    config: Config
    sites: list[str]
    weights: dict[str, Tensor]


def save(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write the configuration and the mHC parameters of a transformed model.

    Args:
        model: a transformed model, or whatever is wrapped around one (`torch.compile`,
            DistributedDataParallel, AveragedModel, PEFT, a module of your own): the names are
            those of the transformed model itself, and of PEFT's copies the active one is taken.
        folder: made if it does not exist; files of an earlier `save` are replaced.

    Raises:
        NotTransformedError: the model has no mHC parameters.
        ExampleInputsError: they are made at its first call.
        CheckpointError: its mHC parameters are on the meta device and have no values, or the
            module holds several transformed models of different configurations.
    """
    described, tensors = describe(model, "save"), tensors_of(model)
    if meta := next((name for name, tensor in tensors.items() if tensor.is_meta), None):
        raise CheckpointError(
            f"save: {meta} is on the meta device and has no values; materialise the model first "
            f"(model.to_empty(device=...), then load or initialise it)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, folder)
    write_config(described, folder)


def load(model: Model, folder: str | PathLike[str], *, example_inputs: Any = None) -> Model:
    """Transform a plain model as it was when `save` wrote the folder, and load its mHC weights.

    Args:
        model: a plain model of the architecture that was saved; changed in place.
        folder: what `save` wrote. It is read now, and may be gone afterwards.
        example_inputs: as for `mhc_compile.transform`. Where the model does not say what it takes
            and none are given, the model is transformed and its weights are loaded at the first
            call; until then `parameters()` and `state_dict()` raise.

    Returns:
        The same object, transformed.

    Raises:
        CheckpointError: the folder is incomplete or unreadable, or its sites are not those of
            this model. The model is then plain, as it was (or waiting, at a first call).
        MhcError, ValueError: whatever `transform` raises.
    """
    return restore(model, read(Path(folder)), example_inputs=example_inputs)


def restore(model: Model, saved: Saved, *, example_inputs: Any = None) -> Model:
    """`load` behind the reading of the folder."""
    transform(model, n=saved.config.n, example_inputs=example_inputs, config=saved.config)
    if is_pending(model):
        then(model, partial(_load_weights, saved=saved))
        return model
    try:
        _load_weights(model, saved)
    except BaseException:
        revert(model)
        raise
    return model


def _load_weights(model: nn.Module, saved: Saved) -> None:
    modules = stream_modules(model)
    present = tensors_of(model)
    _require_equal("sites", saved=saved.sites, present=_sites(modules))
    _require_equal("parameters", saved=saved.weights, present=present)
    if not any(_is_entry(name) for name in saved.weights):
        warn_of_old_state()
    if problem := why_not_loaded(modules, saved.weights):
        raise CheckpointError(f"load: {problem}")
    for path, module in modules.items():
        if isinstance(module, StreamParameters):
            own = {name: saved.weights[f"{path}.{name}"] for name in _own(module)}
            # A parameter on the meta device has nothing to copy into: it takes the tensor over.
            module.load_state_dict(own, assign=module.phi.is_meta)


# --- folders ------------------------------------------------------------------------------------


def write_config(described: Mapping[str, Any], folder: Path) -> None:
    """Write `mhc_config.json`."""
    text = json.dumps(described, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `mhc_model.safetensors`."""
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read(folder: Path, variant: str | None = None) -> Saved:
    """What `save` or `save_pretrained` wrote into a folder.

    Args:
        folder: the folder.
        variant: of the weights that `save_pretrained` wrote ("fp16"), where it was given one.

    Raises:
        CheckpointError: a file is missing, is not what it should be, or is of a newer format.
    """
    try:
        if not (folder / CONFIG_FILE).is_file():
            raise _lacks(folder, CONFIG_FILE)
        described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(
                f"load: {folder / CONFIG_FILE} has format {described['format']}, this version "
                f"of mhc-compile reads format {FORMAT}; upgrade mhc-compile"
            )
        config = Config.from_json(json.dumps(described["config"]))
        return Saved(config, list(described["sites"]), _read_weights(folder, variant))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"load: {folder} cannot be read: {error!r}") from error


def _lacks(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"load: {folder} has no {name}; give the folder that mhc_compile.save, or save_pretrained "
        f"of a transformed model, wrote"
    )


def _read_weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return load_file(folder / WEIGHTS_FILE)
    weights: dict[str, Tensor] = {}
    files = stored_names(folder, variant)
    names = [name for name in files if _OWN_NAME.search(name)]
    for file in sorted({files[name] for name in names}):
        with safe_open(file, "pt") as stored:
            weights |= {n: stored.get_tensor(n) for n in names if files[n] == file}
    if not weights:
        raise _lacks(folder, WEIGHTS_FILE)
    return weights


_OWN_NAME = re.compile(rf"(^|\.)mhc\.([^.]+\.(phi|alpha|bias)|{ENTRY})$")
"""How a parameter of ours, or the entry of a container, is called in a state dict."""


def stored_names(folder: Path, variant: str | None) -> dict[str, Path]:
    """The names of all tensors that `save_pretrained` wrote, each with its file."""
    for stem in PRETRAINED_FILES:
        file = folder / ".".join([stem, *([variant] if variant else []), "safetensors"])
        index = file.with_name(f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json")
        if file.is_file():
            with safe_open(file, "pt") as stored:
                return dict.fromkeys(stored.keys(), file)
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / shard for name, shard in shards.items()}
    return {}


def _require_equal(what: str, *, saved: Any, present: Any) -> None:
    """Raise a CheckpointError that names what the folder and the model do not share."""
    missing, unknown = (
        sorted(name for name in set(one) - set(other) if not _is_entry(name))
        for one, other in ((present, saved), (saved, present))
    )
    if missing or unknown:
        raise CheckpointError(
            f"load: the {what} in the folder are not those of the model. Only in the model: "
            f"{_listed(missing)}. Only in the folder: {_listed(unknown)}. Load into a plain model "
            f"of the architecture that was saved."
        )


def _listed(names: list[str], limit: int = 5) -> str:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more]) or "none"


def _is_entry(name: str) -> bool:
    return name.endswith(f".{ENTRY}")


# --- models -------------------------------------------------------------------------------------


def describe(model: nn.Module, verb: str) -> dict[str, Any]:
    """What `mhc_config.json` says of a transformed model.

    Raises:
        NotTransformedError, ExampleInputsError, CheckpointError: as for `save`.
    """
    refuse_pending(model)
    modules = stream_modules(model)
    configs = {m.config for m in modules.values() if isinstance(m, StreamParameters)}
    if not configs:
        raise NotTransformedError(
            f"{verb}: {type(model).__name__} has no mHC parameters; call "
            f"mhc_compile.transform(model) first"
        )
    if len(configs) > 1:
        raise CheckpointError(
            f"{verb}: {type(model).__name__} holds several transformed models of different "
            f"configurations; save each of them into a folder of its own"
        )
    (config,) = configs
    return {"format": FORMAT, "config": config.meaning(), "sites": _sites(modules)}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The mHC entries of a model's state dict, under the names of the model itself."""
    return {
        f"{path}.{name}": tensor
        for path, module in stream_modules(model).items()
        for name, tensor in _own(module).items()
    }


def _own(module: nn.Module) -> dict[str, Tensor]:
    """What a container or a parameter module has by itself, without those inside it."""
    if isinstance(module, Connections):
        return {ENTRY: module.get_extra_state()}
    return dict(module.named_parameters(recurse=False))


def stream_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Containers and parameter modules by their paths in the transformed model itself.

    One that is shared appears once, under its first path.
    """
    return {
        path: module
        for path, module in _walk(_root(model), "", set())
        if isinstance(module, Connections | StreamParameters)
    }


def _root(model: nn.Module) -> nn.Module:
    """The transformed model inside whatever is wrapped around it.

    That is the outermost transformed module. Where several stand side by side, it is the module
    that holds them.
    """
    outermost: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for _, module in _walk(model, "", set()):
        if is_swapped(module) and module not in inside:
            outermost.append(module)
            inside.update(module.modules())
    return outermost[0] if len(outermost) == 1 else model


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules by path, each once, as if no wrapper stood between them."""
    module = _unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where wrappers that leave names alone keep a module: compile, checkpointing, FSDP."""


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that take its place in a model."""
    while True:
        children = dict(module.named_children())
        if {"original_module", "modules_to_save"} <= children.keys():
            module = _active_copy(module)
        elif wrapped := next((k for k in TRANSPARENT if k in children), None):
            module = children[wrapped]
        else:
            return module


def _active_copy(wrapper: Any) -> nn.Module:
    """What PEFT's ModulesToSaveWrapper calls: the copy of its active adapter, or the original."""
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    copies = wrapper.modules_to_save
    return copies[active[0]] if active and active[0] in copies else wrapper.original_module


def _sites(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the sites: `model.layers.0.self_attn` for `model.layers.0.mhc.self_attn`."""
    sites = []
    for path, module in modules.items():
        if isinstance(module, Connection):
            container, _, branch = path.rpartition(".")
            owner = container.rpartition(".")[0]
            sites.append(f"{owner}.{branch}" if owner else branch)
    return sites

"""`save` and `load`: what `transform` added, apart from the model it was added to.

A folder holds `mhc_config.json` (format, configuration, names of the sites) and
`mhc_model.safetensors` (the mHC parameters under the names they have in the model's state dict).
The base model is saved and loaded by whatever means it has; its keys are untouched.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import Config
from .connection import Connection, StreamParameters
from .passes.errors import CheckpointError, NotTransformedError

CONFIG_FILE = "mhc_config.json"
WEIGHTS_FILE = "mhc_model.safetensors"
FORMAT = 1

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write the configuration and the mHC parameters of a transformed model.

    Args:
        model: a transformed model; one wrapped by `torch.compile` or DistributedDataParallel is
            looked into, so that the names are those of the model itself.
        folder: made if it does not exist; files of an earlier `save` are replaced.

    Raises:
        NotTransformedError: the model has no mHC parameters.
        CheckpointError: its mHC parameters are on the meta device and have no values.
    """
    modules = dict(_stream_parameters(_unwrapped(model)))
    if not modules:
        raise NotTransformedError(
            f"save: {type(model).__name__} has no mHC parameters; call "
            f"mhc_compile.transform(model) first"
        )
    tensors = _tensors(modules)
    if meta := next((name for name, tensor in tensors.items() if tensor.is_meta), None):
        raise CheckpointError(
            f"save: {meta} is on the meta device and has no values; materialise the model first "
            f"(model.to_empty(device=...), then load or initialise it)"
        )
    config = next(iter(modules.values())).config
    description = {"format": FORMAT, "config": asdict(config), "sites": _sites(modules)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(model: Model, folder: str | PathLike[str], *, example_inputs: Any = None) -> Model:
    """Transform a plain model as it was when `save` wrote the folder, and load its mHC weights.

    Args:
        model: a plain model of the architecture that was saved; changed in place.
        folder: what `save` wrote.
        example_inputs: as for `mhc_compile.transform`, for models it cannot infer inputs of.

    Returns:
        The same object, transformed.

    Raises:
        CheckpointError: the folder is incomplete or unreadable, or its sites are not those of
            this model. The model is then plain, as it was.
        MhcError, ValueError: whatever `transform` raises.
    """
    from .transform import revert, transform

    config, sites, weights = _read(Path(folder))
    transform(model, n=config.n, example_inputs=example_inputs, config=config)
    try:
        _load_weights(model, sites, weights)
    except BaseException:
        revert(model)
        raise
    return model


def _load_weights(model: nn.Module, sites: list[str], weights: dict[str, Tensor]) -> None:
    modules = dict(_stream_parameters(model))
    _require_equal("sites", saved=sites, present=_sites(modules))
    _require_equal("parameters", saved=weights, present=_tensors(modules))
    for path, module in modules.items():
        own = {name: weights[f"{path}.{name}"] for name in _own(module)}
        try:
            # A parameter on the meta device has nothing to copy into: it takes the tensor over.
            module.load_state_dict(own, strict=False, assign=module.phi.is_meta)
        except RuntimeError as error:
            raise CheckpointError(f"load: {path}: {error}") from error


def _read(folder: Path) -> tuple[Config, list[str], dict[str, Tensor]]:
    """Configuration, site names and tensors of a folder.

    Raises:
        CheckpointError: a file is missing, is not what it should be, or is of a newer format.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"load: {folder} has no {name}; give the folder that mhc_compile.save wrote"
            )
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"load: {folder / CONFIG_FILE} has format {description['format']}, this version "
                f"of mhc-compile reads format {FORMAT}; upgrade mhc-compile"
            )
        config = Config.from_json(json.dumps(description["config"]))
        sites = list(description["sites"])
        weights = load_file(folder / WEIGHTS_FILE)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"load: {folder} cannot be read: {error!r}") from error
    return config, sites, weights


def _require_equal(what: str, *, saved: Any, present: Any) -> None:
    """Raise a CheckpointError that names what the folder and the model do not share."""
    missing, unknown = sorted(set(present) - set(saved)), sorted(set(saved) - set(present))
    if missing or unknown:
        raise CheckpointError(
            f"load: the {what} in the folder are not those of the model. Only in the model: "
            f"{_listed(missing)}. Only in the folder: {_listed(unknown)}. Load into a plain model "
            f"of the architecture that was saved."
        )


def _listed(names: list[str], limit: int = 5) -> str:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more]) or "none"


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)` and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in dict(model.named_children()):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _stream_parameters(model: nn.Module) -> Iterator[tuple[str, StreamParameters]]:
    """Parameter modules by path; one that is shared appears once, under its first path."""
    for path, module in model.named_modules():
        if isinstance(module, StreamParameters):
            yield path, module


def _own(module: StreamParameters) -> dict[str, nn.Parameter]:
    """The module's own parameters, without those of modules inside it."""
    return dict(module.named_parameters(recurse=False))


def _tensors(modules: dict[str, StreamParameters]) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in _own(module).items()
    }


def _sites(modules: dict[str, StreamParameters]) -> list[str]:
    """Names of the sites: `model.layers.0.self_attn` for `model.layers.0.mhc.self_attn`."""
    sites = []
    for path, module in modules.items():
        if isinstance(module, Connection):
            container, _, branch = path.rpartition(".")
            owner = container.rpartition(".")[0]
            sites.append(f"{owner}.{branch}" if owner else branch)
    return sites

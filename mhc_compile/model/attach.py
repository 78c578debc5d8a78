"""``attach``: the parameters of every site on the modules of a model, which then declare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..config import Config
from ..errors import MhcError
from ..passes.sites.records import Detection, Site, identity_of, stack_of
from . import swap
from .connection import Connection, Connections, Head, StreamParameters
from .declare import DeclaredSite, Spec

__all__ = ["DDP_COMES_LAST", "attach"]

DDP_COMES_LAST = (
    "DistributedDataParallel was made before the mHC parameters and would not average their "
    "gradients. Transform first: DistributedDataParallel(mhc_compile.transform(model))."
)


@dataclass
class _Plan:
    """What one module will get."""

    sites: list[Site]
    homes: list[int]


def attach(
    model: nn.Module,
    gm: fx.GraphModule,
    detection: Detection,
    witnesses: Mapping[Site, Any],
    config: Config,
) -> dict[Site, list[nn.Parameter]]:
    """Make the parameters of every site and swap the classes; all of it or nothing.

    Args:
        gm: the examined graph, on which ``detection`` was made.
        witnesses: by which ``guard`` will see whether the branch of a site ran.

    Returns:
        The parameters of each site, in the order in which they are declared.
    """
    plans = _plan(model, gm, detection)
    last = {chain[-1] for chain in detection.chains}
    containers, made = _make_parameters(plans, last, config)
    for site, witness in witnesses.items():
        if not site.excluded:
            containers[site.owner][site.branch_name].witness = witness
    modules, changed = dict(model.named_modules()), list[nn.Module]()
    try:
        for path, plan in plans.items():
            module = modules[path]
            changed.append(module)
            if path in containers:
                module.add_module("mhc", containers[path].train(module.training))
            swap.swap(module, _spec(plan, last, config).to_json())
    except BaseException:
        for module in changed:
            swap.restore(module)
        raise
    return made


def _plan(model: nn.Module, gm: fx.GraphModule, detection: Detection) -> dict[str, _Plan]:
    """Which modules declare what: owners of sites, homes of chains, and all their ancestors."""
    plans: dict[str, _Plan] = {}
    for site in detection.sites:
        plans.setdefault(site.owner, _Plan([], [])).sites.append(site)
    modules, called = dict(model.named_modules()), _called(model, gm)
    for chain in detection.chains:
        home = _common_path([s.owner.split(".") for s in chain])
        while home and ".".join(home) not in called:
            home = home[:-1]
        plans.setdefault(".".join(home), _Plan([], [])).homes.append(chain[0].chain)
    for path in [p for p in plans if p]:
        parts = path.split(".")
        for depth in range(len(parts)):
            ancestor = ".".join(parts[:depth])
            if _has_forward(modules[ancestor]):
                plans.setdefault(ancestor, _Plan([], []))
    for path in plans:
        if "mhc" in dir(modules[path]):
            raise MhcError(
                f"module '{path or type(model).__name__}' has an attribute 'mhc' of its own, the "
                "name under which mHC parameters are kept; rename it"
            )
    return plans


def _common_path(paths: list[list[str]]) -> list[str]:
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    while any(path[: len(shared)] != shared for path in paths):
        shared = shared[:-1]
    return shared


def _called(model: nn.Module, gm: fx.GraphModule) -> set[str]:
    """Paths of the modules whose forward ran in a graph (``""``, the root, always did)."""
    paths = {str(id(m)): name for name, m in model.named_modules()}
    keys = {identity_of(key) for n in gm.graph.nodes for key, _ in stack_of(n)}
    return {paths[k] for k in keys if k in paths} | {""}


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _make_parameters(
    plans: Mapping[str, _Plan], last: set[Site], config: Config
) -> tuple[dict[str, Connections], dict[Site, list[nn.Parameter]]]:
    containers: dict[str, Connections] = {}
    made: dict[Site, list[nn.Parameter]] = {}
    for path, plan in plans.items():
        for site in plan.sites:
            if site.excluded:
                made[site] = []
                continue
            container = containers.setdefault(path, Connections())
            value = site.node.meta["example_value"]
            dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
            place: dict[str, Any] = {"dtype": dtype, "device": value.device}
            role: dict[str, Any] = {"index": site.position, "last": site in last}
            parts: list[StreamParameters] = [
                Connection(site.width, config, linear=site.linear, **role, **place)
            ]
            container[site.branch_name] = parts[0]
            if site in last and config.readout == "head":
                parts.append(Head(site.width, config, **place))
                container[f"{site.branch_name}_readout"] = parts[1]
            made[site] = [t for p in parts for t in (p.phi, p.alpha, p.bias)]
    return containers, made


def _spec(plan: _Plan, last: set[Site], config: Config) -> Spec:
    sites = tuple(
        DeclaredSite(
            name=s.branch_name,
            chain=s.chain,
            first=s.position == 0,
            last=s in last,
            tensors=0 if s.excluded else 6 if s in last and config.readout == "head" else 3,
        )
        for s in plan.sites
    )
    return Spec(config, sites, tuple(plan.homes))

"""The passes on partitioned graphs inside Inductor: options, the user's own passes, caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile import Config, _torch
from mhc_compile.compiler.partitioned import PartitionedPasses, digest, sources
from mhc_compile.passes.graph.operators import op_name
from mhc_compile.passes.runner import HistoryEntry
from tests.checks import error
from tests.passes.seams import Chain, loss

ON, OFF = Config(), Config(disabled=("fuse_seams",))


class Recorder(_torch.InferenceAwareGraphPass):
    """A user's pass that notes what it sees."""

    def __init__(self, key: str | None = "recorder") -> None:
        self.key = key
        self.seen: list[tuple[bool, list[str]]] = []

    def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
        names = [op_name(n) for n in graph.nodes if str(n.target).startswith("mhc.")]
        self.seen.append((is_inference, names))

    def uuid(self) -> str | None:
        return self.key


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(
    chain: Callable[..., list[Tensor]], config: Config, after: Any = None
) -> tuple[Callable[..., Any], list[HistoryEntry]]:
    """A chain compiled by Inductor with the passes, and their history."""
    history: list[HistoryEntry] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        passes = PartitionedPasses(config, history, after)
        runner = _torch.compile_inductor(gm, inputs, {"post_grad_custom_pre_pass": passes})
        passes.note_cache()
        return runner

    torch._dynamo.reset()
    return torch.compile(chain, backend=backend, fullgraph=True), history


def run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    outputs = function(*leaves)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss(outputs), leaves)]


SEAMS = {
    "forward": ["coefficients_pre", "seam", "post_res"],
    "backward": ["post_res_backward", "seam_backward", "coefficients_pre_backward"],
}
APART = {
    "forward": ["coefficients", "pre", "post_res"] * 2,
    "backward": ["post_res_backward", "pre_backward", "coefficients_backward"] * 2,
}


def test_two_configurations_in_one_process_with_caches_on(monkeypatch: Any) -> None:
    """Each has its own compiled graphs; the second run of the first one takes them from a cache."""
    traced: list[str] = []
    monkeypatch.setattr(_torch, "trace_artifact", lambda name, text: traced.append(name))
    chain = Chain(layers=2)
    leaves = chain.leaves()
    expected = run(chain, leaves)
    user = Recorder(uuid.uuid4().hex)  # of this run only: at first nothing is in the caches
    for config, operators in ((ON, SEAMS), (OFF, APART)):
        function, history = compiled(chain, config, user)
        results = run(function, leaves)
        assert all(error(a, b) < 1e-5 for a, b in zip(results, expected, strict=True))
        assert [(e.graph, e.name) for e in history] == [
            (kind, name) for kind in ("forward", "backward") for name in (kind, "fuse_seams")
        ]
        for entry in history:
            wanted = APART if entry.name == entry.graph else operators
            assert entry.operators == wanted[entry.graph]
        assert user.seen == [(False, operators["forward"]), (False, operators["backward"])]
        user.seen.clear()
    function, history = compiled(chain, ON, user)
    again = run(function, leaves)
    assert [e.name for e in history] == ["cache"] and not user.seen
    seams = [f"mhc_compile_{kind}_1_fuse_seams" for kind in ("forward", "backward")]
    assert [name for name in traced if "seams" in name] == seams
    assert all(error(a, b) < 1e-5 for a, b in zip(again, expected, strict=True))


def test_the_key_holds_options_and_the_passes_of_the_user() -> None:
    def key(config: Config = ON, after: Any = None) -> str | None:
        return PartitionedPasses(config, [], after).uuid()

    keys = [
        key(),
        key(OFF),
        key(replace(ON, n=2)),
        key(after=Recorder("a")),
        key(after=Recorder("b")),
    ]
    keys.append(key(after=[Recorder("a"), Recorder("b")]))
    assert len(set(keys)) == len(keys) and key() == key(after=()) == keys[0]
    assert all(k is not None and len(k) == 64 for k in keys)
    for without_key in (Recorder(None), print):
        assert key(after=without_key) is None


OTHER: dict[str, Any] = {
    "n": 2,
    "variant": "deepseek_v4",
    "sinkhorn_iters": 5,
    "eps": 1e-5,
    "alpha_init": 0.1,
    "init": "paper",
    "spread": 0.01,
    "readout": "sum",
    "stream_dtype": "float32",
    "defer_norms": True,
    "include": ("*.mlp",),
    "exclude": ("*.mlp",),
    "disabled": ("defer_norm",),
}


def test_every_option_is_in_the_key() -> None:
    """Those of today and of tomorrow: a new option needs a second value here."""
    assert {*OTHER, "history"} == {field.name for field in fields(Config)}
    changed = [replace(ON, **{name: value}) for name, value in OTHER.items()]
    keys = [PartitionedPasses(config, []).uuid() for config in (ON, *changed)]
    assert len(set(keys)) == len(keys)
    assert PartitionedPasses(replace(ON, history="full"), []).uuid() == keys[0]  # changes no graph


FILES = [
    "kernels/ops/site.py",
    "kernels/cpu/codegen.py",
    "passes/fusion/fuse_seams.py",
    "backend.py",
]


@pytest.fixture(params=[True, False], ids=["links", "installed"])
def package(request: Any, tmp_path: Path) -> Path:
    """A copy of the package, with `passes` and `kernels` as links or as folders."""
    import mhc_compile

    here = Path(mhc_compile.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    if not request.param or not (here / "kernels").is_symlink():
        return shutil.copytree(here, tmp_path / "mhc_compile", ignore=ignore)
    for name in ("passes", "kernels"):
        shutil.copytree(here.parent / name, tmp_path / name, ignore=ignore)
    return shutil.copytree(here, tmp_path / "mhc_compile", symlinks=True, ignore=ignore)


def test_the_text_of_every_source_is_in_the_key(package: Path) -> None:
    """Python, what emits kernels, and C++ headers."""
    before = digest(sources(package))
    headers = [path for path in sources(package) if path.suffix == ".h"]
    assert headers and before == digest(sources(package))
    for path in [*(package / name for name in FILES), *headers[:1]]:
        text = path.read_text()
        path.write_text(text.replace("a", "b", 1))
        assert digest(sources(package)) != before
        path.write_text(text)
    (package / "kernels" / "another.h").write_text("")
    assert digest(sources(package)) != before


def test_the_users_own_pass_is_kept(monkeypatch: Any) -> None:
    """Whether it is set in the options or in Inductor's configuration."""
    import mhc_compile
    from tests.models import ids, pair

    seen = []

    def inductor(gm: Any, inputs: Any, patches: Any) -> Any:
        graph = fx.Graph()
        graph.output(())
        patches["post_grad_custom_pre_pass"](graph, True)
        return gm.forward

    monkeypatch.setattr(_torch, "compile_inductor", inductor)
    mine, option = Recorder(), lambda graph: seen.append(graph)
    _, model = pair()
    model.compile(backend="mhc", options={"post_grad_custom_pre_pass": option})
    model(ids())
    assert len(seen) == 1
    _, model = pair()
    model.compile(backend="mhc")
    with torch._inductor.config.patch(post_grad_custom_pre_pass=mine):
        model(ids())
    assert mine.seen == [(True, [])]
    assert mhc_compile.graphs(model)


def test_what_the_passes_do_is_logged_and_traced(tmp_path: Any) -> None:
    """TORCH_LOGS prints it; TORCH_TRACE keeps every version of every graph."""
    script = "from tests.models import ids, pair; pair()[1](ids())"
    environment = os.environ | {"TORCH_LOGS": "+mhc_compile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "] widen: " in done.stderr and "torch.ops.mhc.coefficients" in done.stderr
    (file,) = tmp_path.iterdir()
    trace = file.read_text(encoding="utf-8")
    for name in ("0_capture", "4_widen", "7_fuse_coefficients"):
        assert f'"name": "mhc_compile_captured_{name}"' in trace
    assert "torch.ops.mhc.coefficients" in trace

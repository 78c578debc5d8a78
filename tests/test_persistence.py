"""save, load and state dicts: function and weights go round, and what does not fit is refused."""

import copy
import io
import itertools
import json
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import mhc_compile
from mhc_compile.errors import CheckpointError, ExampleInputsError, NotTransformedError
from mhc_compile.persistence import CONFIG_FILE, WEIGHTS_FILE
from tests.checks import assert_moves

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


INPUT = (torch.linspace(-1, 1, 2 * 5 * WIDTH).reshape(2, 5, WIDTH),)


_numbers = itertools.count()


def transformed(model: nn.Module, **options) -> nn.Module:
    """A transformed model whose mHC parameters are not where they started, nor another's."""
    config = mhc_compile.Config(**options)
    mhc_compile.transform(model, n=config.n, example_inputs=INPUT, config=config)
    assert_moves(model, INPUT)
    generator = torch.Generator().manual_seed(next(_numbers))
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A plain model with the weights of a transformed one."""
    plain = Model(len(model.layers))
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "variant": "kromhc"}, {"n": 3, "readout": "head", "eps": 1e-20}]
)
def test_a_saved_model_comes_back_exactly(options, tmp_path):
    model = transformed(Model(), **options)
    mhc_compile.save(model, tmp_path / "adapter")
    plain = plain_copy(model)
    loaded = mhc_compile.load(plain, tmp_path / "adapter", example_inputs=INPUT)
    assert loaded is plain
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    assert loaded(*INPUT).equal(model(*INPUT))


def test_the_folder_holds_only_what_transform_added(tmp_path):
    model = transformed(Model(), n=2, history="full")
    mhc_compile.save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["sites"] == [
        f"layers.{layer}.{branch}" for layer in (0, 1) for branch in ("mixer", "mlp")
    ]
    assert description["config"]["n"] == 2
    assert "history" not in description["config"]
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as weights:
        assert set(weights.keys()) == set(model.state_dict()) - set(Model().state_dict())


def test_float32_parameters_of_a_bfloat16_model_are_saved_exactly(tmp_path):
    model = transformed(Model()).bfloat16()
    mhc_compile.save(model, tmp_path)
    loaded = mhc_compile.load(Model(), tmp_path, example_inputs=INPUT)
    pairs = zip(mhc_compile.parameters(model), mhc_compile.parameters(loaded), strict=True)
    assert all(a.dtype is torch.float32 and a.equal(b) for a, b in pairs)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.parallel.DistributedDataParallel(m, init_sync=False),
    ],
)
def test_a_wrapped_model_is_saved_under_its_own_names(wrap, tmp_path):
    model = transformed(Model())
    mhc_compile.save(wrap(model), tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as weights:
        assert set(weights.keys()) <= set(model.state_dict())


def test_loading_into_a_meta_model_brings_the_values(tmp_path):
    model = transformed(Model())
    mhc_compile.save(model, tmp_path)
    with torch.device("meta"):
        empty = Model()
    mhc_compile.load(empty, tmp_path, example_inputs=(INPUT[0].to("meta"),))
    for loaded, saved in zip(
        mhc_compile.parameters(empty), mhc_compile.parameters(model), strict=True
    ):
        assert isinstance(loaded, nn.Parameter)
        assert loaded.equal(saved)


def test_a_plain_model_has_nothing_to_save(tmp_path):
    with pytest.raises(NotTransformedError, match=r"Model has no mHC parameters.*transform"):
        mhc_compile.save(Model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_values_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = Model()
    mhc_compile.transform(model, example_inputs=(INPUT[0].to("meta"),))
    with pytest.raises(CheckpointError, match="meta device"):
        mhc_compile.save(model, tmp_path)


def assert_plain(model: nn.Module) -> None:
    assert type(model) is Model
    assert model.state_dict().keys() == Model(len(model.layers)).state_dict().keys()


def test_another_architecture_is_refused_and_left_plain(tmp_path):
    mhc_compile.save(transformed(Model(layers=3)), tmp_path)
    model = Model(layers=2)
    with pytest.raises(CheckpointError, match=r"sites .* Only in the folder: layers\.2\.mixer"):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


def test_lost_parameters_are_named_and_the_model_left_plain(tmp_path):
    mhc_compile.save(transformed(Model()), tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    del weights["layers.1.mhc.mlp.alpha"]
    save_file(weights, tmp_path / WEIGHTS_FILE)
    model = Model()
    with pytest.raises(CheckpointError, match=r"Only in the model: layers\.1\.mhc\.mlp\.alpha"):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


def test_weights_of_another_n_are_refused_with_both_numbers(tmp_path):
    mhc_compile.save(transformed(Model(), n=2), tmp_path)
    file = tmp_path / CONFIG_FILE
    file.write_text(file.read_text().replace('"n": 2', '"n": 4'))
    model = Model()
    with pytest.raises(CheckpointError, match=r"the checkpoint has n=2, this model has n=4"):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name, tmp_path):
    mhc_compile.save(transformed(Model()), tmp_path)
    (tmp_path / name).unlink()
    model = Model()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG_FILE, "{", "cannot be read"),
        (CONFIG_FILE, "[]", "cannot be read"),
        (CONFIG_FILE, "{}", "cannot be read.*format"),
        (CONFIG_FILE, '{"format": 2}', "has format 2.*upgrade"),
        (CONFIG_FILE, '{"format": 1, "config": {"n": 0}, "sites": []}', "positive integer"),
        (WEIGHTS_FILE, "not safetensors", "cannot be read"),
    ],
)
def test_an_unreadable_folder_leaves_the_model_plain(name, content, message, tmp_path):
    mhc_compile.save(transformed(Model()), tmp_path)
    (tmp_path / name).write_text(content)
    model = Model()
    with pytest.raises(CheckpointError, match=message):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


# --------------------------------------------------------------------- which function it is


EQUAL_SHAPES = {
    "variant hc": ({}, {"variant": "hc"}, r"variant='mhc', this model has .*variant='hc'"),
    "variant deepseek_v4": ({}, {"variant": "deepseek_v4"}, "variant='deepseek_v4'"),
    "iterations": ({}, {"sinkhorn_iters": 10}, "sinkhorn_iters=20, this .* sinkhorn_iters=10"),
    "eps": ({}, {"eps": 1e-5}, r"eps=1e-06, this model has eps=1e-05"),
    "readout": ({}, {"readout": "sum"}, "readout='mean', this model has readout='sum'"),
    "head": ({"readout": "head"}, {}, "readout='head', this model has readout='mean'"),
    "first": (
        {},
        {"exclude": ("layers.0.mixer",)},
        "'mixer' is first in its chain in the .*, no n-stream",
    ),
    "last": (
        {},
        {"exclude": ("layers.1.mlp",)},
        "'mlp' is last in its chain in the checkpoint, no n-stream",
    ),
    "n": ({}, {"n": 2}, "n=4, this model has n=2"),
}
ROUTES: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "strict=False": lambda model, other: model.load_state_dict(other.state_dict(), strict=False),
    "assign=True": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "torch.save": lambda model, other: model.load_state_dict(through_a_file(other.state_dict())),
    "a part": lambda model, other: [
        a.load_state_dict(b.state_dict()) for a, b in zip(model.layers, other.layers, strict=True)
    ],
    "container": lambda model, other: [
        a.mhc.load_state_dict(b.mhc.state_dict())
        for a, b in zip(model.layers, other.layers, strict=True)
    ],
    "wrapped": lambda model, other: nn.Sequential(model).load_state_dict(
        nn.Sequential(other).state_dict()
    ),
    "AveragedModel": lambda model, other: AveragedModel(model).module.load_state_dict(
        without_module(AveragedModel(other).state_dict())
    ),
    "torch.compile": lambda model, other: torch.compile(model, backend="eager").load_state_dict(
        torch.compile(other, backend="eager").state_dict()
    ),
    "distributed": lambda model, other: set_model_state_dict(model, get_model_state_dict(other)),
    "bfloat16": lambda model, other: model.load_state_dict(
        {k: v.bfloat16() for k, v in other.state_dict().items()}
    ),
}


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_values(model: nn.Module, state: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert [name for name in state if not now[name].equal(state[name])] == []


@pytest.mark.parametrize("saved, own, message", EQUAL_SHAPES.values(), ids=EQUAL_SHAPES.keys())
def test_the_state_of_another_function_is_refused_before_anything_is_loaded(saved, own, message):
    other, model = transformed(Model(), **saved), transformed(Model(), **own)
    before = values(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(other.state_dict())
    assert_same_values(model, before)


class Cut(Model):
    """The same modules; but no stream passes from one block to the next."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.sort(-1).values)
        return self.head(x)


def test_the_state_of_other_chains_is_refused():
    other, model = transformed(Model()), transformed(Cut())
    assert other.state_dict().keys() == model.state_dict().keys()
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        model.load_state_dict(other.state_dict())
    assert (
        "layers.0.mhc: site 'mlp' is inside its chain in the checkpoint, last in its chain in "
        "this model" in str(caught.value)
    )
    assert "layers.1.mhc: site 'mixer' is inside its chain" in str(caught.value)
    assert_same_values(model, before)


@pytest.mark.parametrize("load", ROUTES.values(), ids=ROUTES.keys())
def test_whatever_loads_a_state_of_another_function_is_refused(load):
    other, model = transformed(Model(), variant="hc"), transformed(Model())
    before = values(model)
    with pytest.raises(CheckpointError, match=r"variant='hc', this model has .*variant='mhc'"):
        load(model, other)
    assert_same_values(model, before)


@pytest.mark.parametrize("load", ROUTES.values(), ids=ROUTES.keys())
def test_whatever_loads_a_state_of_the_same_function_loads_all_of_it(load):
    torch.manual_seed(1)
    other = transformed(Model(), variant="deepseek_v4", sinkhorn_iters=7)
    model = transformed(
        copy.deepcopy(mhc_compile.revert(copy.deepcopy(other))),
        variant="deepseek_v4",
        sinkhorn_iters=7,
    )
    if load is ROUTES["bfloat16"]:
        other.load_state_dict({k: v.bfloat16() for k, v in other.state_dict().items()})
    if load is ROUTES["AveragedModel"]:  # it is a copy that has loaded
        load(model, other)
        model.load_state_dict(without_module(AveragedModel(other).state_dict()))
    assert not model(*INPUT).equal(other(*INPUT)) or load is ROUTES["AveragedModel"]
    load(model, other)
    assert model(*INPUT).equal(other(*INPUT))
    assert_same_values(model, values(other))


def test_safetensors_carries_what_the_state_is(tmp_path):
    other = transformed(Model())
    save_model(other, tmp_path / "model.safetensors")
    model = transformed(copy.deepcopy(mhc_compile.revert(copy.deepcopy(other))))
    before = model(*INPUT)
    assert load_model(model, tmp_path / "model.safetensors") == (set(), [])
    assert model(*INPUT).equal(other(*INPUT))
    assert not before.equal(other(*INPUT))
    wrong = transformed(Model(), readout="sum")
    before = values(wrong)
    with pytest.raises(CheckpointError, match="readout='mean', this model has readout='sum'"):
        load_model(wrong, tmp_path / "model.safetensors")
    assert_same_values(wrong, before)


def test_a_state_under_other_names_is_compared_as_well():
    """Of a checkpointed layer: its wrapper leaves its name out of the state dict."""
    other, model = transformed(Model(), variant="hc"), transformed(Model())
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    before = values(model)
    assert not any("_checkpoint_wrapped_module" in name for name in before)
    with pytest.raises(CheckpointError, match="variant='hc', this model has"):
        model.load_state_dict(other.state_dict())
    assert_same_values(model, before)


@pytest.mark.usefixtures("one_process")
def test_a_state_of_distributed_data_parallel_is_compared_as_well():
    parallel = nn.parallel.DistributedDataParallel
    other, model = transformed(Model()), transformed(Model(), variant="hc")
    state, before = parallel(other).state_dict(), values(model)
    assert all(name.startswith("module.") for name in state)
    with pytest.raises(CheckpointError, match="variant='mhc', this model has"):
        parallel(model).load_state_dict(state)
    assert_same_values(model, before)
    same = transformed(Model())
    parallel(same).load_state_dict(state)
    assert same(*INPUT).equal(other(*INPUT))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: whole_through_a_file(model),
}


def whole_through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_model_knows_its_function(copied):
    model = transformed(Model(), n=3, readout="head")
    model(*INPUT)
    other = copied(model)
    assert_same_values(other, values(model))
    assert other(*INPUT).equal(model(*INPUT))
    with pytest.raises(CheckpointError, match="readout='head', this model has readout='mean'"):
        transformed(Model(), n=3).load_state_dict(other.state_dict())


def test_reverting_takes_what_the_state_is_along():
    model = transformed(Model())
    mhc_compile.revert(model)
    assert_plain(model)
    Model().load_state_dict(model.state_dict())


def test_a_loaded_state_computes_the_same_when_compiled():
    other = transformed(Model(), n=2)
    state = through_a_file(other.state_dict())
    model = transformed(plain_copy(other), n=2)
    start = model(*INPUT)
    model.load_state_dict(state)
    for one in (other, model):
        one.compile(backend="mhc")
    assert model(*INPUT).equal(other(*INPUT))
    assert not model(*INPUT).allclose(start)


def test_a_state_on_the_meta_device_loads_with_assign():
    """Shards are often put in place first and filled later."""
    model = transformed(Model())
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    assert all(p.is_meta for p in model.parameters())


# ----------------------------------------------------------------------------- older states


def of_an_older_version(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_does_not_say_what_it_is_loads_with_one_warning(strict):
    other = transformed(Model())
    state = of_an_older_version(other.state_dict())
    model = transformed(Model())
    assert not model(*INPUT).equal(other(*INPUT))
    with pytest.warns(UserWarning, match="does not say which function") as caught:
        result = model.load_state_dict(state, strict=strict)
    assert len(caught) == 1
    assert result == ([], [])
    assert model(*INPUT).equal(other(*INPUT))
    with pytest.warns(UserWarning, match="does not say which function"):
        model.load_state_dict(state)


def test_a_plain_state_lacks_the_parameters_alone_and_warns_of_nothing():
    model = transformed(Model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missing, unexpected = model.load_state_dict(Model().state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) == {k for k, _ in model.named_parameters() if ".mhc." in k}


def test_a_folder_that_does_not_say_what_it_is_loads_with_one_warning(tmp_path):
    model = transformed(Model())
    mhc_compile.save(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file(of_an_older_version(weights), tmp_path / WEIGHTS_FILE)
    with pytest.warns(UserWarning, match="does not say which function") as caught:
        loaded = mhc_compile.load(plain_copy(model), tmp_path, example_inputs=INPUT)
    assert len(caught) == 1
    assert loaded(*INPUT).equal(model(*INPUT))


def test_a_state_of_a_newer_version_is_refused():
    model = transformed(Model())
    state = model.state_dict()
    entry = bytes(state["layers.0.mhc._extra_state"].tolist()).replace(b'"format":1', b'"format":9')
    state["layers.0.mhc._extra_state"] = torch.tensor(list(entry), dtype=torch.int32)
    with pytest.raises(CheckpointError, match="cannot be read: it has format 9"):
        model.load_state_dict(state)


@pytest.mark.parametrize("edit", [('"variant": "mhc"', '"variant": "hc"'), ("1e-06", "1e-05")])
def test_a_folder_whose_files_contradict_each_other_is_refused(edit, tmp_path):
    mhc_compile.save(transformed(Model()), tmp_path)
    file = tmp_path / CONFIG_FILE
    assert edit[0] in file.read_text()
    file.write_text(file.read_text().replace(*edit))
    model = Model()
    with pytest.raises(
        CheckpointError, match=r"load: layers\.0\.mhc and 1 more: the checkpoint has"
    ):
        mhc_compile.load(model, tmp_path, example_inputs=INPUT)
    assert_plain(model)


# ------------------------------------------------------------------- without example inputs


@pytest.fixture
def folder(tmp_path):
    """A folder of `save`, the model that it is of, and a plain one that waits to be loaded."""
    model = transformed(Model(), n=2)
    mhc_compile.save(model, tmp_path)
    return tmp_path, model, plain_copy(model)


def test_a_folder_loads_at_the_first_call_where_inputs_are_not_known(folder):
    path, model, plain = folder
    with pytest.warns(UserWarning, match="Model does not say what its forward takes: it is"):
        loaded = mhc_compile.load(plain, path)
    assert loaded is plain
    for file in path.iterdir():
        file.unlink()
    with pytest.raises(ExampleInputsError, match="gets its mHC parameters at its first call"):
        loaded.state_dict()
    assert loaded(*INPUT).equal(model(*INPUT))
    assert_same_values(loaded, values(model))
    for one in (loaded, model):
        one.compile(backend="mhc")
    assert loaded(*INPUT).equal(model(*INPUT))


@pytest.mark.filterwarnings("ignore:Model does not say")
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_model_that_waits_loads_as_well(copied, folder):
    path, model, plain = folder
    loaded = copied(mhc_compile.load(plain, path))
    assert loaded(*INPUT).equal(model(*INPUT))


@pytest.mark.filterwarnings("ignore:Model does not say")
def test_a_model_that_waits_is_plain_again_after_revert(folder):
    path, _, plain = folder
    assert_plain(mhc_compile.revert(mhc_compile.load(plain, path)))
    expected = copy.deepcopy(plain)(*INPUT)
    assert plain(*INPUT).equal(expected)
    assert_plain(plain)


@pytest.mark.filterwarnings("ignore:Model does not say")
def test_a_folder_that_does_not_fit_is_refused_at_the_first_call(folder):
    path, _, _ = folder
    other = mhc_compile.load(Model(layers=3), path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"sites .* Only in the model: layers\.2\.mixer"):
            other(*INPUT)
    assert_plain(mhc_compile.revert(other))


@pytest.mark.filterwarnings("ignore:Model does not say")
@pytest.mark.parametrize(
    "load",
    [
        lambda m, s: m.load_state_dict(s),
        lambda m, s: nn.Sequential(m).load_state_dict(
            {f"0.{k}": v for k, v in s.items()}, strict=False
        ),
    ],
)
def test_a_state_is_not_loaded_into_a_model_that_waits(load, folder):
    """Its mHC parameters would be left out, and taken for unexpected ones."""
    _, model, plain = folder
    before = values(plain)
    waiting = mhc_compile.transform(plain)
    with pytest.raises(ExampleInputsError, match=r"at its first call.*example_inputs"):
        load(waiting, model.state_dict())
    assert_same_values(mhc_compile.revert(waiting), before)


# ------------------------------------------------------------------------ what is wrapped around


class Mine(nn.Module):
    """A module around a model, with parameters of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.net = model

    def forward(self, x):
        return self.scale * self.net(x)


def test_a_model_inside_another_module_is_saved_under_its_own_names(folder, tmp_path):
    _, model, plain = folder
    mhc_compile.save(AveragedModel(Mine(model)), tmp_path / "wrapped")
    loaded = mhc_compile.load(plain, tmp_path / "wrapped", example_inputs=INPUT)
    assert loaded(*INPUT).equal(model(*INPUT))

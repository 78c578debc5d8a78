"""save and load: configuration and mHC weights go round, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import mhc_compile
from mhc_compile.passes.errors import CheckpointError, NotTransformedError
from mhc_compile.persistence import CONFIG_FILE, WEIGHTS_FILE

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


def transformed(model: nn.Module, **options) -> nn.Module:
    """A transformed model whose mHC parameters are not where they started."""
    config = mhc_compile.Config(**options)
    mhc_compile.transform(model, n=config.n, example_inputs=INPUT, config=config)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
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
    model = transformed(Model(), n=2)
    mhc_compile.save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["sites"] == [
        f"layers.{layer}.{branch}" for layer in (0, 1) for branch in ("mixer", "mlp")
    ]
    assert description["config"]["n"] == 2
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
    from safetensors.torch import load_file, save_file

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
    with pytest.raises(CheckpointError, match=r"the checkpoint has n=2 .* this model has n=4"):
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

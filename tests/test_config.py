"""Config: what it accepts, what it refuses and how it says so, and that it survives JSON."""

import dataclasses
import json

import pytest
import torch

from mhc_compile.config import Config


def test_defaults_are_the_papers():
    config = Config()
    assert (config.n, config.variant, config.sinkhorn_iters) == (4, "mhc", 20)
    assert (config.alpha_init, config.init, config.readout) == (0.01, "preserve", "mean")
    assert config.spread == 0.0
    assert config.stream_torch_dtype is None


@pytest.mark.parametrize("n", [0, -1, 2.0, "4", True, False, None])
def test_n_must_be_a_positive_integer(n):
    with pytest.raises(ValueError, match=f"n must be a positive integer, got {n!r}"):
        Config(n=n)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_any_positive_number_of_streams_is_accepted(n):
    assert Config(n=n).n == n


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("variant", "mch", "one of mhc, "),
        ("variant", None, "one of mhc, "),
        ("init", "zeros", "one of preserve, paper"),
        ("readout", "last", "one of mean, sum, head"),
        ("sinkhorn_iters", 0, "positive integer"),
        ("sinkhorn_iters", True, "positive integer"),
        ("eps", 0.0, "greater than 0"),
        ("eps", float("nan"), "greater than 0"),
        ("eps", float("inf"), "greater than 0"),
        ("alpha_init", 0, "greater than 0"),
        ("alpha_init", "0.01", "greater than 0"),
        ("spread", 1.0, "less than 1"),
        ("spread", -0.1, "at least 0"),
        ("stream_dtype", "int8", "one of float64, float32"),
        ("stream_dtype", torch.int8, "one of float64, float32"),
        ("stream_dtype", 32, "one of float64, float32"),
        ("include", 3, "a string or a list of strings"),
        ("exclude", ("a", 1), "a string or a list of strings"),
        ("disabled", None, "a string or a list of strings"),
    ],
)
def test_a_bad_value_is_named_with_what_is_possible(option, value, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{option: value})
    assert option in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("variant", "n"), [("mhc_lite", 8), ("kromhc", 3)])
def test_impossible_variant_and_n_are_refused_together(variant, n):
    with pytest.raises(ValueError, match=variant):
        Config(variant=variant, n=n)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_stream_dtype_is_a_name_or_a_dtype(dtype):
    torch_dtype = getattr(torch, dtype)
    assert Config(stream_dtype=dtype) == Config(stream_dtype=torch_dtype)
    assert Config(stream_dtype=torch_dtype).stream_torch_dtype is torch_dtype


def test_equal_configs_hash_equal_whatever_they_were_written_as():
    config = Config(exclude=["*.mlp"], spread=0, stream_dtype=torch.float32)
    same = Config(exclude="*.mlp", spread=0.0, stream_dtype="float32")
    assert config == same
    assert hash(config) == hash(same)
    assert len({config, same, Config()}) == 2


def test_config_cannot_be_changed_but_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().n = 2
    assert dataclasses.replace(Config(), n=2) == Config(n=2)
    with pytest.raises(ValueError, match="positive integer"):
        dataclasses.replace(Config(), n=0)


def test_json_round_trip_gives_an_equal_config():
    config = Config(
        n=2,
        variant="kromhc",
        eps=1e-20,
        readout="head",
        stream_dtype=torch.bfloat16,
        exclude=("model.layers.0.*", "*.mlp"),
        disabled="defer_norm",
    )
    assert Config.from_json(config.to_json()) == config


def test_json_that_is_not_a_config_is_refused():
    with pytest.raises(ValueError, match=r"unknown option.* streams; known are .*n, "):
        Config.from_json(json.dumps({"streams": 4}))
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        Config.from_json("[]")
    with pytest.raises(ValueError, match="n must be a positive integer, got 0"):
        Config.from_json('{"n": 0}')


def test_how_much_history_is_kept_makes_no_other_configuration():
    full = Config(history="full")
    assert full == Config() and hash(full) == hash(Config())
    assert Config.from_json(full.to_json()).history == "full"
    assert "history" not in full.meaning() and full.meaning()["n"] == 4
    with pytest.raises(ValueError, match="history must be one of notes, full, got 'code'"):
        Config(history="code")


def test_every_option_is_documented():
    assert Config.__doc__ is not None
    for field in dataclasses.fields(Config):
        assert f"        {field.name}: " in Config.__doc__

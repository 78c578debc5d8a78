"""What a state dict says of its function: it survives what people do to state dicts."""

import io
import json

import pytest
import torch
from torch import Tensor

from mhc_compile._torch import FakeTensorMode
from mhc_compile.model.description import FORMAT, PADDED_TO, decode, differences, encode

DESCRIPTION = {
    "n": 4,
    "variant": "mhc",
    "sinkhorn_iters": 20,
    "eps": 1e-6,
    "readout": "mean",
    "sites": {"self_attn": "first", "mlp": "inside", "größe": "last"},
}


def saved_and_loaded(entry: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(entry, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


TREATMENTS = {
    "none": lambda entry: entry,
    "clone": lambda entry: entry.clone().requires_grad_(False),
    "torch.save": saved_and_loaded,
    "bfloat16": lambda entry: entry.bfloat16(),
    "float16": lambda entry: entry.half(),
    "float64": lambda entry: entry.double(),
    "int8": lambda entry: entry.to(torch.int8),
    "average of four": lambda entry: sum([entry] * 4) / 4,
    "average as in AveragedModel": lambda entry: torch.lerp(entry.float(), entry.float(), 0.3),
    "weighted": lambda entry: 0.3 * entry + 0.7 * entry,
    "as a batch": lambda entry: entry[None],
}


@pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS.keys())
def test_a_description_survives_what_is_done_to_state_dicts(treatment):
    assert decode(treatment(encode(DESCRIPTION))) == DESCRIPTION


def test_equal_descriptions_are_equal_tensors():
    backwards = dict(reversed(DESCRIPTION.items()))
    assert encode(backwards).equal(encode(DESCRIPTION))
    assert not encode({**DESCRIPTION, "n": 5}).equal(encode(DESCRIPTION))


def test_a_description_is_a_small_tensor_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        entry = encode(DESCRIPTION)
    assert entry.device.type == "cpu"
    assert entry.dtype is torch.int32
    assert entry.numel() % PADDED_TO == 0
    assert encode({**DESCRIPTION, "n": 16}).shape == entry.shape


def test_a_tensor_without_values_says_nothing():
    assert decode(encode(DESCRIPTION).to("meta")) is None
    with FakeTensorMode():
        assert decode(encode(DESCRIPTION)) is None


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.int32)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"{}", "it is a bytes, not a tensor"),
        (None, "it is a NoneType"),
        (text("{"), "Expecting"),
        (text("[]"), "no JSON object"),
        (text("{}"), f"format None, this version of mhc-compile reads {FORMAT}"),
        (text(json.dumps({"format": FORMAT + 1})), f"format {FORMAT + 1}"),
        (torch.tensor([300, -1]), "range"),
        (torch.tensor([200]), "ascii"),
        (torch.tensor([float("nan")]), "."),
        (torch.tensor([]), "Expecting"),
    ],
)
def test_what_is_no_description_raises_a_value_error(entry, message):
    with pytest.raises(ValueError, match=message):
        decode(entry)


def test_equal_descriptions_do_not_differ():
    assert differences(DESCRIPTION, dict(DESCRIPTION)) is None


def test_options_that_differ_are_named_with_both_values_and_what_to_write():
    own = {**DESCRIPTION, "variant": "hc", "eps": 1e-5}
    del own["sinkhorn_iters"]
    found = differences(DESCRIPTION, own)
    assert "the checkpoint has eps=1e-06, sinkhorn_iters=20, variant='mhc'" in found
    assert "this model has eps=1e-05, no sinkhorn_iters, variant='hc'" in found
    assert "Config(eps=1e-06, sinkhorn_iters=20, variant='mhc')" in found
    assert "no sinkhorn_iters, variant='hc'; transform" not in differences(own, DESCRIPTION)
    assert "Config(eps=1e-05, variant='hc')" in differences(own, DESCRIPTION)


def test_sites_that_differ_are_named_with_both_places():
    own = {**DESCRIPTION, "sites": {"self_attn": "inside", "mlp": "inside", "more": "last"}}
    found = differences(DESCRIPTION, own)
    assert "site 'self_attn' is first in its chain in the checkpoint, inside its chain" in found
    assert "site 'größe' is last in its chain in the checkpoint, no n-stream site" in found
    assert "site 'more' is no n-stream site in the checkpoint, last in its chain" in found
    assert "mlp" not in found

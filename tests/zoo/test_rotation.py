"""The rotation test holds for every kind of model, and notices what equality at the start does not.

The mistakes are made in the open form of the graph, which `widen` writes by calling `reference`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from benchmarks.rotation import measure
from mhc_compile import Config
from mhc_compile.errors import GraphBreakError
from mhc_compile.kernels import reference
from tests import checks
from tests.checks import output_error, run
from tests.models import GPT, ids
from tests.zoo.models import Model, every
from tests.zoo.more import MORE, REFUSED
from tests.zoo.rotation import assert_streams_take_turns

OPEN = ("recognize", "defer_norm", "fuse_coefficients")
INPUTS = {"ids": ids()}
LAYERS = 2


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("entry", [*every(10), *every(10, MORE)], ids=lambda entry: entry.name)
def test_streams_take_turns_in(entry: Model) -> None:
    """benchmarks/rotation.py writes down the same for every model, and for which versions."""
    measure(entry)


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_a_model_without_a_whole_graph_is_refused(entry: Model) -> None:
    model, inputs = entry.make(), entry.example()
    expected = checks.outputs_of(model, inputs)
    with pytest.raises(GraphBreakError, match=r"depends on the value of a tensor at .*py:\d+"):
        mhc_compile.transform(model, example_inputs=inputs)
    assert not any("mhc." in key for key in model.state_dict())
    assert checks.output_error(checks.outputs_of(model, inputs), expected) == 0


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_any_number_of_streams_takes_turns(n: int) -> None:
    plain = GPT().double()
    model = mhc_compile.transform(copy.deepcopy(plain), n=n, example_inputs=(ids(),))
    assert_streams_take_turns(plain, model, INPUTS, n)


# ----------------------------------------------------------------------------------- mistakes

Function = Callable[..., Tensor]
pre, post_res = reference.pre, reference.post_res


def transposed(H_res: Tensor, *others: Tensor, **dtypes: Any) -> Tensor:
    return post_res(H_res.transpose(-1, -2), *others, **dtypes)


def missing(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor, **dtypes: Any) -> Tensor:
    return X + H_post.unsqueeze(-1) * f.unsqueeze(-2)


def wrong_stream(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor, **dtypes: Any) -> Tensor:
    return post_res(H_res, torch.roll(H_post, 1, -1), X, f, **dtypes)


def collapsed(*operands: Tensor, **dtypes: Any) -> Tensor:
    return post_res(*operands, **dtypes).mean(-2, keepdim=True).tile((4, 1))


def mean(H_pre: Tensor, X: Tensor, **dtypes: Any) -> Tensor:
    return X.mean(-2) + 0 * H_pre[..., :1]  # φ is read, or the guard would notice first


def added(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor, **dtypes: Any) -> Tensor:
    return X + f.unsqueeze(-2)


MISTAKES = (transposed, missing, wrong_stream, collapsed)


def transformed(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain GPT and a transformed one whose graph keeps the open form."""
    plain = GPT(LAYERS).double()
    config = Config(disabled=OPEN, **options)
    inputs = (ids(),)
    return plain, mhc_compile.transform(copy.deepcopy(plain), example_inputs=inputs, config=config)


def at(position: int, wrong: Function, right: Function) -> Function:
    """A mistake at one site only, counted in the order in which `widen` writes them."""
    calls = iter(range(2 * LAYERS))

    def function(*operands: Tensor, **dtypes: Any) -> Tensor:
        return (wrong if next(calls) == position else right)(*operands, **dtypes)

    return function


def test_the_open_form_takes_turns() -> None:
    plain, model = transformed()
    assert_streams_take_turns(plain, model, INPUTS)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("position", range(2 * LAYERS - 1))
def test_a_mistake_at_one_site_is_noticed(mistake, position, monkeypatch) -> None:
    """Of every site but the last one of the chain, behind which only the mean is seen."""
    if mistake in (transposed, missing) and position == 0:
        return  # right: at the first site all streams are equal
    monkeypatch.setattr(reference, "post_res", at(position, mistake, post_res))
    plain, model = transformed()
    with pytest.raises(AssertionError):
        assert_streams_take_turns(plain, model, INPUTS)


@pytest.mark.parametrize("position", range(2 * LAYERS))
def test_a_site_that_is_computed_plainly_is_noticed(position, monkeypatch) -> None:
    """It has parameters, and its branch reads the mean and is added to every stream."""
    monkeypatch.setattr(reference, "pre", at(position, mean, pre))
    monkeypatch.setattr(reference, "post_res", at(position, added, post_res))
    plain, model = transformed()
    with pytest.raises(AssertionError):
        assert_streams_take_turns(plain, model, INPUTS)


def test_an_excluded_site_is_noticed() -> None:
    plain, model = transformed(exclude="h.1.attn")
    with pytest.raises(AssertionError, match=r"h\.1\.attn"):
        assert_streams_take_turns(plain, model, INPUTS)


@pytest.mark.parametrize("mistake", [transposed, missing])
def test_the_same_mistakes_pass_at_the_start(mistake, monkeypatch) -> None:
    """Why there is this test: to the plain model's eye all of that is right."""
    monkeypatch.setattr(reference, "post_res", mistake)
    plain, model = transformed()
    assert output_error(run(model, INPUTS).outputs, run(plain, INPUTS).outputs) < 1e-12

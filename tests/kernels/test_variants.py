"""The descriptions of the variants: columns, names, and what cannot be."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from mhc_compile.kernels.variants import VARIANTS, Gate, get_variant, parse_variant


@pytest.mark.parametrize(
    ("name", "n", "columns"),
    [
        ("mhc", 2, (2, 2, 4)),
        ("mhc", 3, (3, 3, 9)),
        ("mhc", 1, (1, 1, 1)),
        ("deepseek_v4", 4, (4, 4, 16)),
        ("hc", 5, (5, 5, 25)),
        ("mhc_lite", 3, (3, 3, 6)),
        ("mhc_lite", 4, (4, 4, 24)),
        ("kromhc", 1, (1, 1, 0)),
        ("kromhc", 2, (2, 2, 2)),
        ("kromhc", 8, (8, 8, 6)),
        ("identity", 7, (7, 7, 0)),
        ("low_rank", 4, (4, 4, 8)),
    ],
)
def test_columns_of_phi(name, n, columns):
    variant = get_variant(name)
    variant.check(n)
    assert variant.columns(n) == columns


def test_names_are_the_published_ones_with_the_paper_first():
    assert VARIANTS == ("mhc", "deepseek_v4", "hc", "mhc_lite", "kromhc", "identity", "low_rank")
    assert [get_variant(name).name for name in VARIANTS] == list(VARIANTS)


def test_sinkhorn_iterations_are_bound_where_there_are_any():
    iterations = {name: get_variant(name, sinkhorn_iters=7).iterations for name in VARIANTS}
    assert iterations == {
        **dict.fromkeys(VARIANTS, 0),
        "mhc": 7,
        "deepseek_v4": 7,
    }
    assert get_variant("mhc").iterations == 20


def test_descriptions_are_values():
    variant = get_variant("mhc")
    assert variant == get_variant("mhc") != get_variant("mhc", sinkhorn_iters=3)
    assert hash(variant) == hash(get_variant("mhc"))
    assert replace(get_variant("hc"), inner="linear") != get_variant("hc")
    with pytest.raises(FrozenInstanceError):
        variant.eps = 1.0


def test_gates_of_the_paper_and_of_v4():
    assert (get_variant("mhc").pre, get_variant("mhc").post) == (
        Gate("sigmoid"),
        Gate("sigmoid", scale=2.0),
    )
    assert get_variant("deepseek_v4").pre == Gate("sigmoid", offset=1e-6)


@pytest.mark.parametrize(
    ("name", "n", "advice"),
    [
        ("mhc_lite", 5, "n <= 4.*'kromhc'"),
        ("mhc_lite", 10_000, "n <= 4"),
        ("kromhc", 3, "n=2 or n=4"),
        ("kromhc", 6, "n=4 or n=8.*'mhc'"),
        ("mhc", 0, "positive integer, got 0"),
        ("mhc", -4, "positive integer"),
        ("mhc", 4.0, "positive integer"),
        ("mhc", True, "positive integer"),
    ],
)
def test_impossible_numbers_of_streams_are_refused_with_advice(name, n, advice):
    with pytest.raises(ValueError, match=advice):
        get_variant(name).check(n)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_variant_has_one_two_and_four_streams(name, n):
    get_variant(name).check(n)
    assert sum(get_variant(name).columns(n)) <= 2 * n + max(n * n, math.factorial(n), 2 * n)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'MHC'; known are mhc, deepseek_v4"):
        get_variant("MHC")


@pytest.mark.parametrize("iters", [0, -1, 2.5, True, "20"])
def test_impossible_numbers_of_iterations_are_refused(iters):
    with pytest.raises(ValueError, match="sinkhorn_iters must be a positive integer"):
        get_variant("mhc", sinkhorn_iters=iters)


def test_text_is_readable_and_goes_both_ways():
    assert get_variant("mhc").text == "mhc(iterations=20)"
    assert get_variant("kromhc").text == "kromhc()"
    changed = replace(
        get_variant("deepseek_v4", sinkhorn_iters=7),
        pre=Gate("sigmoid", offset=1e-5),
        eps=2e-5,
        transposed=False,
    )
    assert (
        changed.text == "deepseek_v4(pre.offset=1e-05, iterations=7, eps=2e-05, transposed=False)"
    )
    linear = replace(get_variant("hc"), inner="linear")
    for variant in (changed, linear, *map(get_variant, VARIANTS)):
        assert parse_variant(variant.text) == variant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mhc", "is written like"),
        ("paper()", "unknown variant 'paper'; known are mhc"),
        ("mhc(turns=3)", "has no field 'turns'; it has pre.function"),
    ],
)
def test_text_that_is_none_raises(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text)

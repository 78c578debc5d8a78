"""The generated chain in the interpreter, against float64 truth; and its text."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mhc_compile.kernels import reference
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.gpu import codegen, generated
from mhc_compile.kernels.operands import Saved
from mhc_compile.kernels.variants import VARIANTS, get_variant

from .. import truth
from ..operands import DESCRIPTIONS, EPS, label, possible

T, C = 9, 8  # tokens, of a chain behind streams of 8 channels


class Chain:
    """Inputs of the chain of one variant: y in two parts, Σ x⃗² in two parts, α, b, gradients."""

    def __init__(self, variant, n, tokens=T, scale=1.0):
        columns = sum(variant.columns(n))
        self.variant, self.n = variant, n
        self.X = torch.empty(tokens, n, C)
        self.y_parts = torch.randn(2, tokens, columns)
        self.square_parts = n * C * torch.rand(2, tokens)
        self.alpha, self.bias = scale * torch.randn(3), scale * torch.randn(columns)
        shapes = ((tokens, n), (tokens, n), (tokens, n, n))
        self.grads = [torch.randn(shape) for shape in shapes]

    def forward(self, interpreted):
        return interpreted(
            gpu._chain_forward, self.X, self.y_parts, self.square_parts, self.alpha, self.bias,
            self.variant, EPS,
        )  # fmt: skip

    def backward(self, interpreted, y, inv_r):
        saved = Saved(self.X, torch.empty(0), self.alpha, self.bias, y, inv_r)  # φ is not read
        return interpreted(gpu._chain_backward, self.grads, saved, self.variant)

    def coefficients(self, y, inv_r, alpha, bias):
        """The reference, differentiable, in the dtype of its arguments."""
        mapped = y * inv_r.unsqueeze(-1)
        return reference.from_projection(mapped, alpha, bias, variant=self.variant, n=self.n)

    def gradients(self, y, inv_r, dtype):
        """Of the reference with respect to y, inv_r, α and b."""
        leaves = [t.to(dtype).requires_grad_() for t in (y, inv_r, self.alpha, self.bias)]
        grads = [g.to(dtype) for g in self.grads]
        H = zip(self.coefficients(*leaves), grads, strict=True)
        outputs, grads = zip(*((h, g) for h, g in H if h.requires_grad), strict=True)
        return torch.autograd.grad(outputs, leaves, grads)


def assert_close(actual, eager, expected, floor=4e-7):
    """No further from the truth than twice what eager float32 is, plus a few roundings."""
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    error, allowed = ((t.double() - expected).abs().max() for t in (actual, eager))
    assert error <= 2 * allowed + floor * expected.abs().max(), (float(error), float(allowed))


@pytest.mark.parametrize(("variant", "n"), possible([2, 3, 4, 8]), ids=label)
def test_equals_float64_truth(interpreted, variant, n):
    """Forward, and the exact gradient of the finite iteration: autograd through the reference."""
    chain = Chain(variant, n)
    *H, y, inv_r = chain.forward(interpreted)
    assert torch.equal(y, chain.y_parts[0] + chain.y_parts[1])
    exact = chain.square_parts.double().sum(0)
    r = ((exact / (n * C)) + EPS).rsqrt()
    torch.testing.assert_close(inv_r.double(), r, rtol=3e-7, atol=0)

    given = (y, inv_r, chain.alpha, chain.bias)
    plain = chain.coefficients(*given)
    wanted = chain.coefficients(*(t.double() for t in given))
    for actual, eager_result, expected in zip(H, plain, wanted, strict=True):
        assert_close(actual, eager_result, expected)

    dy, norm_grad, sums = chain.backward(interpreted, y, inv_r)
    sums = sums.sum(0)
    widths = variant.columns(n)
    dalpha = torch.stack([part.sum() for part in sums[1].split(widths)])
    plain = chain.gradients(y, inv_r, torch.float32)
    wanted = chain.gradients(y, inv_r, torch.float64)
    assert_close(dy, plain[0], wanted[0])
    # d x⃗ = … + dinv_r · d inv_r / d x⃗, and inv_r = (Σ x⃗² / width + eps)^(-1/2).
    scale = -(inv_r.double() ** 3) / (n * C)
    assert_close(norm_grad, (plain[1] * scale).float(), wanted[1] * scale, floor=2e-6)
    assert_close(dalpha, plain[2], wanted[2], floor=4e-6)
    assert_close(sums[0], plain[3], wanted[3])


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("name", ["mhc", "deepseek_v4"])
def test_sinkhorn_of_logits_of_any_size(interpreted, name, iters):
    """Every token has logits of another size: α = 1, r = 1, b = 0, so that y are the logits."""
    n, variant = 4, get_variant(name, sinkhorn_iters=iters)
    scales = torch.tensor([1.0, 30.0, 1e3, 1e4]).repeat_interleave(2)
    chain = Chain(variant, n, tokens=len(scales))
    chain.alpha.fill_(1)
    chain.bias.zero_()
    chain.y_parts[0] *= scales.unsqueeze(1)
    chain.y_parts[1] = 0
    chain.square_parts.zero_()
    chain.square_parts[0] = n * C * (1 - EPS)
    *H, y, inv_r = chain.forward(interpreted)
    for token, found in enumerate(H[2].double().numpy()):
        logits = (y[token, 2 * n :] * inv_r[token]).reshape(n, n).double().numpy()
        if name == "mhc":
            expected = truth.sinkhorn(logits, iters)
        else:
            expected = truth.sinkhorn_v4(logits, iters).T
        assert np.abs(found - expected).max() < 2e-6

    dy, *_ = chain.backward(interpreted, y, inv_r)
    assert (dy - chain.gradients(y, inv_r, torch.float64)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("variant", "n"), possible([4]), ids=label)
def test_a_nan_stays_in_its_token(interpreted, variant, n):
    chain = Chain(variant, n)
    chain.y_parts[1, 4] = float("nan")
    *H, y, inv_r = chain.forward(interpreted)
    others = torch.arange(T) != 4
    dy, norm_grad, _ = chain.backward(interpreted, y, inv_r)
    assert H[0][4].isnan().all() and norm_grad[4].isnan()
    for result in (*H, dy, norm_grad):
        assert result[others].isfinite().all()


def test_backward_replays_what_eager_computes(interpreted):
    """The Sinkhorn gradient is that of 3 iterations, not of their limit."""
    chain = Chain(get_variant("mhc", sinkhorn_iters=3), 4, scale=4.0)
    *_, y, inv_r = chain.forward(interpreted)
    dy, *_ = chain.backward(interpreted, y, inv_r)
    exact = chain.gradients(y, inv_r, torch.float64)[0]
    chain.variant = get_variant("mhc", sinkhorn_iters=300)
    converged = chain.gradients(y, inv_r, torch.float64)[0]
    assert (converged - exact).abs().max() > 100 * (dy - exact).abs().max()


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "n"), possible([4, 8]), ids=label)
def test_text_can_be_read(variant, n):
    """It is Python, says what it computes, has docstrings, and its lines are short."""
    text = codegen.source(variant, n)
    compile(text, "chain", "exec")
    assert f"{n} streams, {sum(variant.columns(n))} columns of φ" in text
    assert "def chain_forward(" in text and "def chain_backward(" in text
    assert '"""Coefficients of BT tokens.' in text and '"""Gradients of BT tokens' in text
    assert max(map(len, text.splitlines())) <= 120
    assert text == codegen.source(variant, n)


def test_number_of_iterations_is_in_the_text():
    texts = [codegen.source(get_variant("mhc", sinkhorn_iters=k), 4) for k in (1, 7, 20)]
    assert len(set(texts)) == 3
    assert "7 times columns and rows to sum 1" in texts[1] and "tl.range(6)" in texts[1]


def test_modules_are_cached_by_content(tmp_path, monkeypatch):
    """One text is one file; a process that finds it does not write it again."""
    monkeypatch.setenv(generated.FOLDER_VARIABLE, str(tmp_path / "cache"))
    variants = [replace(variant, name="other") for variant in DESCRIPTIONS[:2]]
    paths = [codegen.load(variant, 2).__file__ for variant in variants]
    assert len(set(paths)) == 2
    assert (tmp_path / "cache").stat().st_mode & 0o77 == 0
    text = codegen.source(variants[0], 2)
    with open(paths[0], encoding="utf-8") as file:
        assert file.read() == text
    again = generated.load("chain", text)
    assert again.__file__ == paths[0]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_spoilt_file_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv(generated.FOLDER_VARIABLE, str(tmp_path))
    text = codegen.source(get_variant("identity"), 2)
    module = generated.load("chain", text)
    with open(module.__file__, "w", encoding="utf-8") as file:
        file.write("raise RuntimeError")
    assert hasattr(generated.load("chain", text), "chain_forward")


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    """Code is run from there."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(generated.FOLDER_VARIABLE, str(shared))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    module = generated.load("chain", codegen.source(get_variant("identity"), 2))
    assert not list(shared.iterdir())
    assert str(tmp_path) in module.__file__


EVIL = '"""\nimport os\nos.abort()\n"""'


def test_no_foreign_string_gets_into_the_text():
    """Names are not written; words and numbers that no kernel has raise."""
    plain = get_variant("deepseek_v4")
    assert codegen.source(replace(plain, name=EVIL), 4) == codegen.source(plain, 4)
    gate = plain.pre
    spoilt = [
        replace(plain, inner=EVIL),
        replace(plain, residual=EVIL),
        replace(plain, pre=replace(gate, function=EVIL)),
        replace(plain, eps=float("nan")),
        replace(plain, post=replace(gate, scale=float("inf"))),
        replace(plain, iterations=0),
    ]
    for variant in spoilt:
        with pytest.raises(ValueError):
            codegen.source(variant, 4)
    for variant in (replace(plain, eps=EVIL), replace(plain, iterations=EVIL)):
        with pytest.raises((TypeError, ValueError)):
            codegen.source(variant, 4)


@pytest.mark.parametrize(
    "name, n, match", [("kromhc", 3, "power of two"), ("mhc_lite", 5, "n <= 4")]
)
def test_impossible_combinations_raise(name, n, match):
    with pytest.raises(ValueError, match=match):
        codegen.source(get_variant(name), n)


def test_every_named_variant_is_generated():
    assert {variant.name for variant, _ in possible([4])} == set(VARIANTS)


def test_source_is_the_same_in_every_process(interpreted):
    """Nothing in it depends on hashes or addresses."""
    for variant, n in possible([3]):
        assert interpreted(codegen.source, variant, n) == codegen.source(variant, n)

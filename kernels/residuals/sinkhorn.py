"""Sinkhorn-Knopp, the paper's: exp, then `iterations` times columns, rows to sum 1 (rows last).

Note: eps
    0, as in arXiv:2512.24880 (eq. 19): the first columns and rows in the log domain. Above 0, as
    DeepSeek-V4 does: softmax over each column plus eps instead of exp and the first columns, and
    eps added to every sum that is divided by.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.basic import sinkhorn_knopp_backward
from .matrix import TRITON_GRADIENT, Matrix
from .residual import (
    DIAGONAL,
    OFF_DIAGONAL,
    Chain,
    Text,
    check_integer,
    cpp_number,
    eye,
    padded,
)

SEGMENT = 5
"""In Triton: iterations between two checkpoints of the backward pass, at most."""


@dataclass(frozen=True)
class Sinkhorn(Matrix):
    name = "sinkhorn"
    iterations: int = 0
    eps: float = 0.0

    def title(self) -> str:
        return f"{int(self.iterations)} times columns and rows to sum 1, eps = {float(self.eps)!r}"

    def forward(self, x: Tensor, n: int) -> Tensor:
        matrix = self.matrix(x, n)
        return torch.ops.mhc.sinkhorn_knopp.default(matrix, self.iterations, self.eps)

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        logits = self.matrix(x, n)
        return self.numbers(sinkhorn_knopp_backward(grad, logits, self.iterations, self.eps))

    def near_identity(self, n: int) -> Tensor:
        return ((DIAGONAL - OFF_DIAGONAL) * eye(n) + OFF_DIAGONAL).flatten()

    def triton(self, chain: Chain) -> Text:
        """The finite iteration and its replay.

        H_res = u · K · v with scales u of rows and v of columns: the sums of K lie between 1 / n
        and n, and iterations change only u and v. Padded rows and columns of K are 0; `pad`, 1
        there and 0 elsewhere, keeps their scales finite.
        """
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"Sinkhorn needs a finite eps, 0 or more, got {self.eps!r}")
        if not int(self.iterations) >= 1:
            raise ValueError(f"Sinkhorn needs at least one iteration, got {self.iterations!r}")
        pairs = self.iterations - 1
        if self.eps:
            state = "u, v"  # what the next iteration depends on
            first, step, begin, end = _deepseek_v4(chain, self.eps)
        else:
            state = "u"  # v follows from u alone
            first, step, begin, end = _paper(chain)
        if chain.n != chain.N:
            begin = f"    pad = tl.where(k < {chain.n}, 0.0, 1.0)[:, None]\n{begin}"
        loop = f"""
    for _ in tl.range({pairs}):
        u, v = columns_then_rows(K, {state}{chain.if_padded(", pad")})"""
        make = f"{begin}{loop if pairs else ''}\n    H = u[:, None, :] * K * v[None, :, :]"
        unmake = f"{begin}\n{_replay(chain, pairs, state)}\n{end}"
        iteration = (step, _ITERATION_BACKWARD) if pairs else ()
        return self.triton_matrix(chain, make, unmake, (first, *iteration))

    def cpp(self, n: int) -> Text:
        check_integer("iterations", self.iterations)
        place = self.cpp_place
        order = "[in, out]" if self.transposed else "[out, in]"
        start, start_backward = _CPP_START_WITH_EPS if self.eps else _CPP_START_IN_LOGARITHMS
        helpers = _CPP_ITERATION.format(
            iterations=self.iterations, eps=cpp_number(self.eps), start=start
        )
        forward = (
            f"    // H̃_res is {order}.\n"
            f"    for (int i = 0; i < N; ++i)\n"
            f"        for (int j = 0; j < N; ++j) H_res[i][j] = x[2 * N + {place}];\n"
            f"    V columns[N][N];\n"
            f"    start(H_res, columns);\n"
            f"    V factor[N];\n"
            f"    for (int k = 0; k < NORMALISATIONS; ++k) normalisation(k, H_res, factor);"
        )
        backward = _CPP_BACKWARD.format(place=place, start_backward=start_backward)
        return Text(forward, backward, (helpers,))


# --- Triton ---------------------------------------------------------------------------------------


def _paper(chain: Chain) -> tuple[str, str, str, str]:
    real, pad, plus_pad = (chain.if_padded(text) for text in (", real", ", pad", " + pad"))
    hide, hide_below, zeros = (
        chain.if_padded(f"\n    {x} = tl.where(real, {x}, {value})")
        for x, value in (("h", "-1e30"), ("below", "-1e30"), ("K", "0.0"))
    )
    first = f'''
@triton.jit
def first_columns_and_rows(h{real}{pad}):
    """K: exp(h) with columns, then rows, to sum 1; and the sums of the rows in between.

    In differences of logarithms, because a whole row may lie too far down for exp.
    """{hide}
    below = h - tl.max(h, 0)[None, :, :]{hide_below}
    columns = tl.sum(tl.exp(below), 0){plus_pad}
    rows = tl.sum(tl.exp(below) / columns[None, :, :], 1)
    K = tl.exp(below - tl.max(below, 1)[:, None, :]) / columns[None, :, :]
    K = K / tl.sum(K, 1)[:, None, :]{zeros}
    return K, rows
'''
    step = f'''
@triton.jit
def columns_then_rows(K, u{pad}):
    """The scales u, v after one more iteration."""
    v = 1.0 / (tl.sum(K * u[:, None, :], 0){plus_pad})
    u = 1.0 / (tl.sum(K * v[None, :, :], 1){plus_pad})
    return u, v
'''
    begin = f"""\
    K, rows = first_columns_and_rows(h{chain.if_padded(", real[:, :, None], pad")})
    u = tl.full([{chain.N}, BT], 1.0, tl.float32)
    v = u"""
    end = """\
    # F is dK: back through the first rows, then through the first columns, K * rows.
    d = F * K
    d -= K * tl.sum(d, 1)[:, None, :]
    d -= K * rows[:, None, :] * tl.sum(d, 0)[None, :, :]"""
    return first, step, begin, end


def _deepseek_v4(chain: Chain, eps: float) -> tuple[str, str, str, str]:
    real, pad, plus_pad = (chain.if_padded(text) for text in (", real", ", pad", " + pad"))
    hide = chain.if_padded("\n    h = tl.where(real, h, -1e30)")
    added = repr(float(eps))
    first = f'''
@triton.jit
def softmax_of_columns(h{real}):
    """exp(h) with columns to sum 1."""{hide}
    P = tl.exp(h - tl.max(h, 0)[None, :, :])
    return P / tl.sum(P, 0)[None, :, :]
'''
    step = f'''
@triton.jit
def columns_then_rows(K, u, v{pad}):
    """The scales u, v after one more iteration, with {added} added to every sum."""
    v = v / (v * tl.sum(K * u[:, None, :], 0) + {added}{plus_pad})
    u = u / (u * tl.sum(K * v[None, :, :], 1) + {added}{plus_pad})
    return u, v
'''
    K = f"P + {added}" if chain.n == chain.N else f"tl.where(real[:, :, None], P + {added}, 0.0)"
    begin = f"""\
    P = softmax_of_columns(h{chain.if_padded(", real[:, :, None]")})
    K = {K}
    first_rows = tl.sum(K, 1) + {added}{plus_pad}
    u = 1.0 / first_rows
    v = tl.full([{chain.N}, BT], 1.0, tl.float32)"""
    end = """\
    # Back through the first rows, in front of which F is dK, then through the softmax.
    F -= (tl.sum(F * K, 1) / first_rows)[:, None, :]
    d = F * P
    d -= P * tl.sum(d, 0)[None, :, :]"""
    return first, step, begin, end


_ITERATION_BACKWARD = '''
@triton.jit
def iteration_backward(F, K, u_before, u, v):
    """F in front of an iteration from F behind it, where the scales are u and v.

    M' = M / sum(M) has dM = (dM' - sum(dM' * M')) / sum(M). In F = u * dM * v there is no division
    left: it is the change of the scale.
    """
    F -= (u * tl.sum(F * K, 1))[:, None, :] * v[None, :, :]
    F -= u_before[:, None, :] * (v * tl.sum(F * K, 0))[None, :, :]
    return F
'''


def _replay(chain: Chain, pairs: int, state: str) -> str:
    """F at the beginning: forward once, then segment by segment forward and backward.

    The scales in front of each segment are kept in one tensor, from which a sum picks. All segments
    have one length; the first leaves out what is too much.
    """
    F = f"{TRITON_GRADIENT}\n    F = d * u[:, None, :] * v[None, :, :]"
    if not pairs:
        return F
    segments = -(-pairs // SEGMENT)
    length = -(-pairs // segments)
    spare = segments * length - pairs
    slots, pad, scales = padded(segments), chain.if_padded(", pad"), state.split(", ")
    lines = [f"    # The scales in front of every {length} iterations are kept."]
    lines += [f"    segment = tl.arange(0, {slots})[:, None, None]"]
    for x in scales:
        zeros = f"tl.zeros([{slots}, {chain.N}, BT], tl.float32)"
        lines += [f"    {x}_kept = {zeros} + {x}[None, :, :]"]
    lines += [f"    for t in tl.range({pairs}):"]
    for x in scales:
        here = f"segment * {length} == t + {spare}"
        lines += [f"        {x}_kept = tl.where({here}, {x}[None, :, :], {x}_kept)"]
    lines += [f"        u, v = columns_then_rows(K, {state}{pad})", F]
    lines += [f"    for back in tl.range({segments}):", f"        number = {segments - 1} - back"]
    for x in scales:
        lines += [f"        {x}_0 = tl.sum(tl.where(segment == number, {x}_kept, 0.0), 0)"]
    for i in range(1, length + 1):
        before = ", ".join(f"{x}_{i - 1}" for x in scales)
        lines += [f"        u_{i}, v_{i} = columns_then_rows(K, {before}{pad})"]
        if i <= spare:
            lines += [
                f"        {x}_{i} = tl.where(number > 0, {x}_{i}, {x}_{i - 1})" for x in scales
            ]
    for i in range(length, 0, -1):
        call = f"iteration_backward(F, K, u_{i - 1}, u_{i}, v_{i})"
        lines += [f"        F = {call if i > spare else f'tl.where(number > 0, {call}, F)'}"]
    return "\n".join(lines)


# --- C++ ------------------------------------------------------------------------------------------

_CPP_ITERATION = """
// Sinkhorn-Knopp, {iterations} times columns, then rows; rows are the last index.
constexpr int ITERATIONS = {iterations};
constexpr K EPS = {eps};  // added to every sum
{start}
constexpr bool of_columns(int k) {{ return (FIRST == COLUMNS_TO_ONE) == (k % 2 == 0); }}

// The k-th of them; `factor` is what columns or rows were multiplied by.
INLINE void normalisation(int k, V (&M)[N][N], V (&factor)[N]) {{
    if (of_columns(k))
        normalise<COLUMNS_TO_ONE>(M, factor, EPS);
    else
        normalise<ROWS_TO_ONE>(M, factor, EPS);
}}

// A matrix behind each normalisation and the factors of the normalisation.
struct Step {{
    V M[N][N], factor[N];
}};
"""

_CPP_START_IN_LOGARITHMS = (
    """
// The first columns and rows are normalised in the log domain, which logits of any size survive;
// after them every sum lies between 1 / N and N.
constexpr Axis FIRST = COLUMNS_TO_ONE;
constexpr int NORMALISATIONS = 2 * ITERATIONS - 2;  // behind the start

// `columns` becomes the matrix with columns of sum 1, M that with rows of sum 1 behind it.
INLINE void start(V (&M)[N][N], V (&columns)[N][N]) {
    softmax_of_columns<true>(M);
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) columns[i][j] = exp(M[i][j]);
        softmax(M[i]);
    }
}
""",
    """\
    for (int i = 0; i < N; ++i) softmax_backward(first[i], dH_res[i]);""",
)

_CPP_START_WITH_EPS = (
    """
// DeepSeek-V4's order: softmax over each column, plus eps, in place of exp and the first columns.
constexpr Axis FIRST = ROWS_TO_ONE;
constexpr int NORMALISATIONS = 2 * ITERATIONS - 1;  // behind the start

INLINE void start(V (&M)[N][N], V (&columns)[N][N]) {
    softmax_of_columns<false>(M);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) {
            columns[i][j] = M[i][j];
            M[i][j] += EPS;
        }
}
""",
    """\
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) dH_res[i][j] *= columns[i][j];""",
)

_CPP_BACKWARD = """\
    // Replay, keeping every step; then backwards through the steps.
    Array<Step> steps(NORMALISATIONS);
    V first[N][N], columns[N][N], M[N][N];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) first[i][j] = x[2 * N + {place}];
    start(first, columns);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) M[i][j] = first[i][j];
    for (int k = 0; k < NORMALISATIONS; ++k) {{
        normalisation(k, M, steps[k].factor);
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) steps[k].M[i][j] = M[i][j];
    }}
    for (int k = NORMALISATIONS - 1; k >= 0; --k) {{
        if (of_columns(k))
            normalise_backward<COLUMNS_TO_ONE>(steps[k].M, steps[k].factor, dH_res);
        else
            normalise_backward<ROWS_TO_ONE>(steps[k].M, steps[k].factor, dH_res);
    }}
{start_backward}
    softmax_of_columns_backward(columns, dH_res);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) dx[2 * N + {place}] = dH_res[i][j];"""

"""The part of the generated chain that makes H_res from H̃_res, and its backward.

Each entry of `RESIDUALS` turns a `Chain` into a `Residual`: functions that stand in front of the
kernels, and a block of text for the body of each. The blocks find there `k` (numbers of streams,
padded to N), `token`, `inside` and `inv` (1 / r), all [BT], and `size` (elements of y). Forward
stores y and H_res; backward stores dy and sums over tokens, and adds Σ d(y / r) · y to `along`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations, product

from ..variants import Variant

SEGMENT = 5
"""Sinkhorn iterations between two checkpoints of the backward pass, at most."""


@dataclass(frozen=True)
class Chain:
    """What is generated for: a variant with n streams."""

    variant: Variant
    n: int

    @property
    def N(self) -> int:
        return padded(self.n)

    @property
    def columns(self) -> int:
        return sum(self.variant.columns(self.n))

    @property
    def inner_gradient(self) -> str:
        return " * (1.0 - x * x)" if self.variant.inner == "tanh" else ""

    def if_padded(self, text: str) -> str:
        return "" if self.n == self.N else text


@dataclass(frozen=True)
class Residual:
    helpers: tuple[str, ...]
    forward: str
    backward: str


def padded(n: int) -> int:
    """The next power of two, from n on."""
    return 1 << (n - 1).bit_length()


# --- matrices: H̃_res is one tensor ---------------------------------------------------------------


def _matrix(chain: Chain, helpers: tuple[str, ...], make: str, unmake: str) -> Residual:
    """`make` turns h into H; `unmake` makes d, the gradient of h, from h and dH_res."""
    n, first = chain.n, 2 * chain.n
    out_in, in_out = f"k[:, None] * {n} + k[None, :]", f"k[None, :] * {n} + k[:, None]"
    load = f"""
    # H̃_res: [out, in, token]
    entry = {in_out + "  # as φ has them: [in, out]" if chain.variant.transposed else out_in}
    real = (k[:, None] < {n}) & (k[None, :] < {n})
    here = inside[None, None, :]{chain.if_padded(" & real[:, :, None]")}
    at = token[None, None, :] * {chain.columns} + {first} + entry[:, :, None]
    at_H = token[None, None, :] * {n * n} + ({out_in})[:, :, None]
    bias_res = tl.load(bias + {first} + entry, real, other=0.0)[:, :, None]"""
    forward = f"""{load}
    x = mapped(y_parts, y, at, here, size, inv[None, None, :], SPLITS)
    h = tl.load(alpha + 2) * x + bias_res
{make}
    tl.store(H_res + at_H, H, here)"""
    backward = f"""{load}
    x = inner(tl.load(y + at, here, other=0.0) * inv[None, None, :])
    h = tl.load(alpha + 2) * x + bias_res
{unmake}
    # y is read again (volatile): registers are few in between.
    y_res = tl.load(y + at, here, other=0.0, volatile=True)
    x = inner(y_res * inv[None, None, :])
    tl.store(sums + {first} + entry, tl.sum(d, 2), real)
    tl.store(sums + {chain.columns + first} + entry, tl.sum(d * x, 2), real)
    d = tl.load(alpha + 2) * d{chain.inner_gradient}
    tl.store(dy + at, d * inv[None, None, :], here)
    along += tl.sum(tl.sum(d * y_res, 0), 0)"""
    return Residual(helpers, forward, backward)


_LOAD_GRADIENT = "    d = tl.load(dH_res + at_H, here, other=0.0)"


def _free(chain: Chain) -> Residual:
    return _matrix(chain, (), "    H = h", _LOAD_GRADIENT)


# --- Sinkhorn-Knopp ------------------------------------------------------------------------------
#
# H_res = u · K · v with scales u of rows and v of columns: the sums of K lie between 1 / n and n,
# and iterations change only u and v. Padded rows and columns of K are 0; `pad`, 1 there and 0
# elsewhere, keeps their scales finite.


def _sinkhorn(chain: Chain) -> Residual:
    """The finite iteration and its replay, the paper's (eps = 0) or DeepSeek-V4's."""
    pairs = chain.variant.iterations - 1
    first, step, begin, end = (_deepseek_v4 if chain.variant.eps else _paper)(chain)
    if chain.n != chain.N:
        begin = f"    pad = tl.where(k < {chain.n}, 0.0, 1.0)[:, None]\n{begin}"
    loop = f"""
    for _ in tl.range({pairs}):
        u, v = columns_then_rows(K, {_state(chain)}{chain.if_padded(", pad")})"""
    make = f"{begin}{loop if pairs else ''}\n    H = u[:, None, :] * K * v[None, :, :]"
    unmake = f"{begin}\n{_replay(chain, pairs)}\n{end}"
    iteration = (step, _ITERATION_BACKWARD) if pairs else ()
    return _matrix(chain, (first, *iteration), make, unmake)


def _state(chain: Chain) -> str:
    """What the next iteration depends on: without eps the new v follows from u alone."""
    return "u, v" if chain.variant.eps else "u"


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


def _deepseek_v4(chain: Chain) -> tuple[str, str, str, str]:
    real, pad, plus_pad = (chain.if_padded(text) for text in (", real", ", pad", " + pad"))
    hide = chain.if_padded("\n    h = tl.where(real, h, -1e30)")
    eps = repr(float(chain.variant.eps))
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
    """The scales u, v after one more iteration, with {eps} added to every sum."""
    v = v / (v * tl.sum(K * u[:, None, :], 0) + {eps}{plus_pad})
    u = u / (u * tl.sum(K * v[None, :, :], 1) + {eps}{plus_pad})
    return u, v
'''
    K = f"P + {eps}" if chain.n == chain.N else f"tl.where(real[:, :, None], P + {eps}, 0.0)"
    begin = f"""\
    P = softmax_of_columns(h{chain.if_padded(", real[:, :, None]")})
    K = {K}
    first_rows = tl.sum(K, 1) + {eps}{plus_pad}
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


def _replay(chain: Chain, pairs: int) -> str:
    """F at the beginning: forward once, then segment by segment forward and backward.

    The scales in front of each segment are kept in one tensor, from which a sum picks. All segments
    have one length; the first leaves out what is too much.
    """
    F = f"{_LOAD_GRADIENT}\n    F = d * u[:, None, :] * v[None, :, :]"
    if not pairs:
        return F
    segments = -(-pairs // SEGMENT)
    length = -(-pairs // segments)
    spare = segments * length - pairs
    slots, pad, state = padded(segments), chain.if_padded(", pad"), _state(chain)
    scales = state.split(", ")
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


# --- single numbers: H̃_res is a few named tensors [BT] -------------------------------------------


def _numbers(chain: Chain, names: list[str], x: str) -> list[str]:
    """`h_<name>` of each column, from x."""
    lines = ["", "    # H̃_res, number by number"]
    for name, column in zip(names, range(2 * chain.n, chain.columns), strict=True):
        lines += [f"    x = {x.format(at=f'token * {chain.columns} + {column}')}"]
        lines += [f"    h_{name} = tl.load(alpha + 2) * x + tl.load(bias + {column})"]
    return lines


def _numbers_backward(chain: Chain, names: list[str]) -> list[str]:
    """From `d_<name>` of each column on."""
    lines = ["    # y is read again (volatile): registers are few in between."]
    for name, column in zip(names, range(2 * chain.n, chain.columns), strict=True):
        at = f"token * {chain.columns} + {column}"
        lines += [f"    y_res = tl.load(y + {at}, inside, other=0.0, volatile=True)"]
        lines += ["    x = inner(y_res * inv)"]
        lines += [f"    tl.store(sums + {column}, tl.sum(d_{name}))"]
        lines += [f"    tl.store(sums + {chain.columns + column}, tl.sum(d_{name} * x))"]
        lines += [f"    d = tl.load(alpha + 2) * d_{name}{chain.inner_gradient}"]
        lines += [f"    tl.store(dy + {at}, d * inv, inside)"]
        lines += ["    along += d * y_res"]
    return lines


def _of_numbers(
    chain: Chain, names: list[str], make: list[str], store: list[str], unmake: list[str]
) -> Residual:
    """`make` what store and unmake need from h_<name>; `unmake` dH_res into d_<name>."""
    forward = _numbers(chain, names, "mapped(y_parts, y, {at}, inside, size, inv, SPLITS)")
    again = _numbers(chain, names, "inner(tl.load(y + {at}, inside, other=0.0) * inv)")
    backward = [*again, *make, *unmake, *_numbers_backward(chain, names)]
    return Residual((), "\n".join([*forward, *make, *store]), "\n".join(backward))


def _permutations(chain: Chain) -> Residual:
    """Softmax over the n! permutations p; H_res[i, j] adds the weights of those with p[i] = j."""
    n = chain.n
    names = ["".join(map(str, p)) for p in permutations(range(n))]
    make = [f"    top = h_{names[0]}"]
    make += [f"    top = tl.maximum(top, h_{name})" for name in names[1:]]
    make += [f"    w_{name} = tl.exp(h_{name} - top)" for name in names]
    make += [f"    total = {_sum(f'w_{name}' for name in names)}"]
    make += [f"    w_{name} = w_{name} / total" for name in names]
    store, unmake = [], []
    for i, j in product(range(n), range(n)):
        at = f"token * {n * n} + {i * n + j}"
        value = _sum(f"w_{name}" for name in names if name[i] == str(j))
        store += [f"    tl.store(H_res + {at}, {value}, inside)"]
        unmake += [f"    dH_{i}{j} = tl.load(dH_res + {at}, inside, other=0.0)"]
    for name in names:
        unmake += [f"    d_{name} = {_sum(f'dH_{i}{j}' for i, j in enumerate(name))}"]
    unmake += [f"    mean = {_sum(f'w_{name} * d_{name}' for name in names)}"]
    unmake += [f"    d_{name} = w_{name} * (d_{name} - mean)" for name in names]
    return _of_numbers(chain, names, make, store, unmake)


def _sum(terms: Iterable[str]) -> str:
    """Left to right, a few terms a line."""
    terms = list(terms)
    if len(terms) <= _TERMS:
        return " + ".join(terms)
    lines = [" + ".join(terms[i : i + _TERMS]) for i in range(0, len(terms), _TERMS)]
    return "(\n        " + "\n        + ".join(lines) + "\n    )"


_TERMS = 6


def _kronecker(chain: Chain) -> Residual:
    """U_1 ⊗ … ⊗ U_k: bit i of (out xor in), highest first, picks p or q of factor i."""
    n, factors = chain.n, chain.n.bit_length() - 1
    names = [f"{i}{x}" for i in range(factors) for x in "pq"]
    make = [
        "    swapped = k[:, None] ^ k[None, :]",
        f"    at = token[None, None, :] * {n * n} + (k[:, None] * {n} + k[None, :])[:, :, None]",
    ]
    for i in range(factors):
        bit = factors - 1 - i
        make += [f"    p_{i} = tl.sigmoid(h_{i}p - h_{i}q)"]
        make += [f"    q_{i} = tl.sigmoid(h_{i}q - h_{i}p)"]
        make += [f"    same_{i} = ((swapped >> {bit}) % 2 == 0)[:, :, None]"]
        make += [f"    U_{i} = tl.where(same_{i}, p_{i}[None, None, :], q_{i}[None, None, :])"]
    whole = " * ".join(f"U_{i}" for i in range(factors)) or "1.0"
    store = [f"    tl.store(H_res + at, {whole}, inside[None, None, :])"]
    unmake = ["    dH = tl.load(dH_res + at, inside[None, None, :], other=0.0)"]
    for i in range(factors):
        unmake += [f"    d = {' * '.join(['dH', *(f'U_{j}' for j in range(factors) if j != i)])}"]
        unmake += [f"    d = tl.sum(tl.sum(tl.where(same_{i}, d, -d), 0), 0)"]
        unmake += [f"    d_{i}p = p_{i} * q_{i} * d", f"    d_{i}q = -d_{i}p"]
    return _of_numbers(chain, names, make, store, unmake)


def _identity(chain: Chain) -> Residual:
    n = chain.n
    real = chain.if_padded(f" & ((k[:, None] < {n}) & (k[None, :] < {n}))[:, :, None]")
    store = f"""
    # H_res = I
    at = token[None, None, :] * {n * n} + (k[:, None] * {n} + k[None, :])[:, :, None]
    here = inside[None, None, :]{real}
    tl.store(H_res + at, tl.where(k[:, None] == k[None, :], 1.0, 0.0)[:, :, None], here)"""
    return Residual((), store, "")


RESIDUALS: dict[str, Callable[[Chain], Residual]] = {
    "sinkhorn": _sinkhorn,
    "free": _free,
    "permutations": _permutations,
    "kronecker": _kronecker,
    "identity": _identity,
}

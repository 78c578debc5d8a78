"""mHC in float64 by plain loops over Python and numpy numbers. Imports nothing of ours.

One token at a time, no cleverness: where these disagree with the package, the package is wrong.
"""

import itertools
import math

import numpy as np

EPS_V4 = 1e-6


def log_sum(values):
    """log Σ exp(values); -inf if there is nothing but -inf."""
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def sinkhorn(logits, iters):
    """`iters` times columns, rows to sum 1, from exp(logits) [n, n]; every step in logarithms."""
    n = len(logits)
    log = [[float(v) for v in row] for row in logits]
    for _ in range(iters):
        for j in range(n):
            total = log_sum([log[i][j] for i in range(n)])
            for i in range(n):
                log[i][j] -= total
        for i in range(n):
            total = log_sum(log[i])
            for j in range(n):
                log[i][j] -= total
    return np.array([[math.exp(v) for v in row] for row in log])


def sinkhorn_v4(comb_logits, iters):
    """DeepSeek-V4's `comb` [in, out] as its code makes it, from its logits [in, out]."""
    comb = np.array(
        [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in comb_logits]
    )
    comb = comb + EPS_V4
    comb = comb / (comb.sum(axis=0, keepdims=True) + EPS_V4)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(axis=1, keepdims=True) + EPS_V4)
        comb = comb / (comb.sum(axis=0, keepdims=True) + EPS_V4)
    return comb


def softmax(values):
    e = np.exp(values - np.max(values))
    return e / e.sum()


def permutations(logits, n):
    """Σ softmax(logits)[p] · P_p over `itertools.permutations`, P_p[i, p[i]] = 1."""
    H = np.zeros((n, n))
    for weight, p in zip(softmax(logits), itertools.permutations(range(n)), strict=True):
        for i in range(n):
            H[i, p[i]] += weight
    return H


def kronecker(logits):
    H = np.ones((1, 1))
    for pair in np.reshape(logits, (-1, 2)):
        p, q = softmax(pair)
        H = np.kron(H, np.array([[p, q], [q, p]]))
    return H


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mapped(X, phi, eps):
    """x⃗ φ / r, one output at a time, of one token's state X [n, C]."""
    x = X.reshape(-1)
    r = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return np.array([math.fsum(x * phi[:, k]) / r for k in range(phi.shape[1])])


def coefficients(X, phi, alpha, bias, variant, eps, iters=20):
    """(H_pre [n], H_post [n], H_res [n, n] as [out, in]) of one token's state X [n, C]."""
    n = X.shape[0]
    h = mapped(X, phi, eps)
    if variant.startswith("hc"):
        h = np.tanh(h) if variant == "hc" else h
    pre = alpha[0] * h[:n] + bias[:n]
    post = alpha[1] * h[n : 2 * n] + bias[n : 2 * n]
    res = alpha[2] * h[2 * n :] + bias[2 * n :]
    if variant.startswith("hc"):
        return pre, post, res.reshape(n, n)
    H_res = {
        "mhc": lambda: sinkhorn(res.reshape(n, n), iters),
        "deepseek_v4": lambda: sinkhorn_v4(res.reshape(n, n), iters).T,
        "mhc_lite": lambda: permutations(res, n),
        "kromhc": lambda: kronecker(res),
        "identity": lambda: np.eye(n),
        "low_rank": lambda: np.eye(n) + np.outer(*res.reshape(2, n)),
    }[variant]()
    return sigmoid(pre) + (EPS_V4 if variant == "deepseek_v4" else 0), 2 * sigmoid(post), H_res


def pre(H_pre, X):
    """h[c] = Σ_i H_pre[i] · X[i, c]."""
    n, C = X.shape
    return np.array([math.fsum(H_pre[i] * X[i, c] for i in range(n)) for c in range(C)])


def post_res(H_res, H_post, X, f):
    """X'[i, c] = Σ_j H_res[i, j] · X[j, c] + H_post[i] · f[c]."""
    n, C = X.shape
    out = np.zeros((n, C))
    for i in range(n):
        for c in range(C):
            mixed = math.fsum(H_res[i, j] * X[j, c] for j in range(n))
            out[i, c] = mixed + H_post[i] * f[c]
    return out


def over_tokens(function, *arrays):
    """`function` for every leading index of the arrays (which share one leading dimension)."""
    results = [function(*token) for token in zip(*arrays, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(np.stack(parts) for parts in zip(*results, strict=True))
    return np.stack(results)

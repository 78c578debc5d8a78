"""Every way to make H_res: one file each, see `residual.py` for what a file says."""

from .free import Free
from .identity import Identity
from .kronecker import Kronecker
from .low_rank import LowRank
from .permutations import Permutations
from .residual import Residual
from .sinkhorn import Sinkhorn

RESIDUALS: dict[str, type[Residual]] = {
    kind.name: kind for kind in (Identity, Free, Sinkhorn, Permutations, Kronecker, LowRank)
}
"""By the name that `Variant.residual` has."""

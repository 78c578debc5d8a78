"""Every way to make H_res: one file each, see `residual.py` for what a file says."""

from .free import Free
from .identity import Identity
from .kronecker import Kronecker
from .permutations import Permutations
from .residual import Residual
from .sinkhorn import Sinkhorn

RESIDUALS: dict[str, type[Residual]] = {
    kind.name: kind for kind in (Identity, Free, Sinkhorn, Permutations, Kronecker)
}
"""By the name that `Variant.residual` has."""

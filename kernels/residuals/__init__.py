"""Every way to make H_res, a file each; `residual.py` says what a file has to say.

To add one: write its file, list it here, and give `variants.py` a description that names it. Tests
and tables iterate over `RESIDUALS` and `VARIANTS`.
"""

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

"""How many tensors a function returns; torch reads the schemas of operators from these."""

from torch import Tensor

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""H_pre, H_post, H_res, y, inv_r."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of X, φ, α, b; or of H_res, H_post, X, f."""

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

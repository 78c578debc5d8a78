"""H_res = H̃_res, as in Hyper-Connections (arXiv:2409.19606)."""

from dataclasses import dataclass

from torch import Tensor

from .matrix import TRITON_GRADIENT, Matrix
from .residual import Chain, Text, eye


@dataclass(frozen=True)
class Free(Matrix):
    name = "free"
    starts_static = True  # without a dynamic part: arXiv:2409.19606, eq. 14

    def title(self) -> str:
        return "H̃_res as it is"

    def forward(self, x: Tensor, n: int) -> Tensor:
        return self.matrix(x, n)

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        return self.numbers(grad)

    def near_identity(self, n: int) -> Tensor:
        return eye(n).flatten()  # I, as Hyper-Connections start

    def triton(self, chain: Chain) -> Text:
        return self.triton_matrix(chain, "    H = h", TRITON_GRADIENT)

    def cpp(self, n: int) -> Text:
        loops = "    for (int i = 0; i < N; ++i)\n        for (int j = 0; j < N; ++j) "
        place = self.cpp_place
        return Text(
            f"{loops}H_res[i][j] = x[2 * N + {place}];",
            f"{loops}dx[2 * N + {place}] = dH_res[i][j];",
        )

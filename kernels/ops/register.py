"""How an operator of a site is registered, and what each of its calls has in common.

    @operator(fake=..., keep=..., formula=...)      a forward: shapes, what backward needs, backward
    @operator(like="X phi alpha bias")              a backward: gradients of these arguments

The name of the function is that of the operator, its signature the schema. Every operator computes
in the dtypes of its operands, whatever autocast says.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, get_origin

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import planned
from ..operands import OF_THE_SITE, OF_THE_TOKENS, WITH_CHANNELS


def operator(
    *,
    fake: Callable[..., Any] | None = None,
    like: str = "",
    keep: Callable[..., None] | None = None,
    formula: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Register `mhc::<name of the function>` with torch.

    Args:
        fake: from the operands to results without values.
        like: in place of `fake`, of a backward: the operands that its results are gradients of.
            The results get their shapes and dtypes; autograd refuses to differentiate them.
        keep, formula: `setup_context` and backward of `torch.library.register_autograd`.
    """

    def register(function: Callable[..., Any]) -> Any:
        signature = inspect.signature(function)
        names = list(signature.parameters)
        if like and get_origin(signature.return_annotation) is not tuple:
            raise TypeError(f"{function.__name__} must return a tuple of gradients, of one as well")
        places = [names.index(name) for name in like.split()]

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if torch.is_autocast_enabled(args[0].device.type):
                with torch.autocast(args[0].device.type, enabled=False):
                    return run(*args)
            found = function(*args)
            if not places:
                return found
            shaped = []
            for place, gradient in zip(places, found, strict=True):
                operand = args[place]
                shaped.append(gradient.reshape(operand.shape).to(operand.dtype))
            return tuple(shaped)

        def fake_like(*args: Any) -> tuple[Tensor, ...]:
            return tuple(empty_like(args[place]) for place in places)

        found = custom_op(f"mhc::{function.__name__}", mutates_args=())(run)
        found.register_fake(fake or fake_like)
        if like or formula:
            found.register_autograd(formula or _refuse_double_backward, setup_context=keep)
        return found

    return register


class Call:
    """One call of an operator: its tokens as one dimension, its streams in one dtype.

    Args:
        X: streams `[..., n, C]`.
        coefficient: any tensor in the dtype of the coefficients.
        dtypes: of all else that has channels.
        variant: `Variant.text`, of operators that compute coefficients.
    """

    def __init__(
        self, X: Tensor, coefficient: Tensor, *dtypes: torch.dtype, variant: str | None = None
    ) -> None:
        self.leading = X.shape[:-2]
        self.tokens = math.prod(self.leading)
        plan = planned(X.device, X.shape[-2], coefficient.dtype, (X.dtype, *dtypes), variant)
        self.kernels, self.dtype = plan.kernels, plan.dtype
        self.variant: Any = plan.variant  # None where there are no coefficients to compute

    def flat(self, names: Sequence[str], *tensors: Tensor) -> list[Tensor]:
        """Operands as kernels take them; their names say of what kind they are: see `operands`."""
        found, count = [], len(self.leading)
        for name, t in zip(names, tensors, strict=True):
            if name in WITH_CHANNELS:
                t = t.reshape(self.tokens, *t.shape[count:]).to(self.dtype)
            elif name in OF_THE_TOKENS:
                t = t.reshape(self.tokens, *t.shape[count:])
            elif name not in OF_THE_SITE:
                raise ValueError(f"kernels.operands does not say what {name!r} is")
            found.append(t.contiguous())
        return found

    def shaped(self, *flat: Tensor) -> list[Tensor]:
        """`[T, ...]` -> `[..., ...]`."""
        found = []
        for t in flat:
            found.append(t.reshape(self.leading + t.shape[1:]))
        return found


def keep_inputs(count: int) -> Callable[..., None]:
    """A `keep` for which the first operands are all that backward needs."""
    return lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:count])


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous, whatever the strides of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def described(*tensors: Tensor) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "the backward of an mhc:: operator cannot be differentiated: double backward (create_graph="
        "True, torch.func.hessian) is not supported by the fused operators. Take such gradients of "
        "the open form: Config(disabled=('fuse_coefficients',))"
    )

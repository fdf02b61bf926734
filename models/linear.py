"""torch.nn.functional.linear, as fast as the processor can: on CPU in fp32 by core/products.py."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from omnistep.core.products import goes_wide, wide_product

FEWEST_ROWS = 16
"""With fewer the product waits for memory, whoever computes it."""


# Any strides do: if that were not said, the compiler would copy operands into those it expects.
@torch.library.custom_op("omnistep::linear", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T; its gradients are the same operator."""
    return wide_product(_dense(x), _dense(weight))


def _dense(x: Tensor) -> Tensor:
    return x if x.mT.is_contiguous() else x.contiguous()


@_linear.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    x_grad = _linear(grad, weight.T) if ctx.needs_input_grad[0] else None
    return x_grad, _linear(grad.T, x.T) if ctx.needs_input_grad[1] else None


_linear.register_autograd(_backward, setup_context=_save)


def linear(
    x: Float[Tensor, "*rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """torch.nn.functional.linear, as fast as the processor can. Differentiable."""
    if not goes_wide(x) or math.prod(x.shape[:-1]) < FEWEST_ROWS:
        return F.linear(x, weight, bias)
    y = _linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


SAVED_OPS = frozenset({torch.ops.omnistep.linear.default})
"""What a checkpointing policy should save rather than compute a second time."""

"""Matrix products in fp32 on CPU by oneDNN, where that is faster than torch.mm.

torch.mm in fp32 is MKL's, which on AMD processors uses half the width of AVX-512's registers:
110 GFLOP/s on a core of a Zen 5, where oneDNN's kernels, exact fp32 too, make 240. In bf16 torch.mm
is oneDNN already.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HAS_WIDE_PRODUCTS = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
FEWEST_ROWS = 16
"""With fewer the product waits for memory, whoever computes it."""


def goes_wide(x: Tensor) -> bool:
    """Whether products of x are oneDNN's."""
    return HAS_WIDE_PRODUCTS and x.device.type == "cpu" and x.dtype == torch.float32


def wide_product(
    a: Float[Tensor, "rows in"], b: Float[Tensor, "out in"]
) -> Float[Tensor, "rows out"]:
    """a @ b.T in fp32 by oneDNN; not differentiable. The first product of a shape takes up to 1 ms
    more; 1024 shapes are remembered. Both must be contiguous or the transpose of what is."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@torch.library.custom_op("omnistep::linear", mutates_args=())
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

"""Cross entropy of a linear output layer, without the logits of all tokens at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.models.layers import at_least_fp32

CHUNK_BYTES = 16 << 20
"""Size of the fp32 logits that exist at one time."""


def chunk_tokens(tokens: int, vocab: int) -> int:
    """Rows per chunk: a power of two, so that the products keep good shapes."""
    most = max(CHUNK_BYTES // (4 * vocab), 16)
    return min(tokens, 1 << (most.bit_length() - 1))


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass already computes the gradients, chunk by chunk, while the logits are there
    (as in Liger-Kernel, arXiv 2410.10989): the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights):  # pyright: ignore[reportIncompatibleMethodOverride]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
        grads_hidden, grad_weight = [], None
        size = chunk_tokens(hidden.shape[0], weight.shape[0])
        for h, y, m in zip(*(t.split(size) for t in (hidden, targets, weights)), strict=True):
            z = at_least_fp32(F.linear(h, w))
            m = m.to(z.dtype)
            top = z.amax(-1, keepdim=True)
            e = (z - top).exp()
            s = e.sum(-1, keepdim=True)
            picked = z.gather(-1, y.unsqueeze(-1))
            total = total + (((top + s.log()) - picked).squeeze(-1) * m).sum()
            if not (need_hidden or need_weight):
                continue
            ids = torch.arange(z.shape[-1], device=z.device)
            p = e * (m.unsqueeze(-1) / s) - torch.where(
                ids == y.unsqueeze(-1), m.unsqueeze(-1), 0.0
            )
            p = p.to(hidden.dtype)
            grads_hidden.append(p @ w)
            part = p.t() @ h
            grad_weight = part.to(total.dtype) if grad_weight is None else grad_weight + part
        if grads_hidden:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grad).to(grad_hidden.dtype),
            (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens embed"],
    weight: Float[Tensor, "vocab embed"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum over tokens of weights × −log softmax(hidden @ weightᵀ)[targets], in nats, fp32 or
    better. Products run in the dtype of `hidden`; memory for logits is bounded by CHUNK_BYTES."""
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights)  # pyright: ignore[reportReturnType]

"""Cross entropy of a linear output layer, without the logits of all tokens at once; with the
vocabulary shared by the ranks of tensor parallelism."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.compile import compile_graph
from omnistep.models.layers import at_least_fp32
from omnistep.models.linear import linear
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.mesh import Group

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Type of device -> size of the fp32 logits that exist at one time. A CPU works fastest on what its
cache holds; a GPU's products need thousands of rows, and each chunk reads the weight and its
gradient once (Llama-3-8B's, 8,192 tokens, an H100: 1.23 s in chunks of 16 MiB, 0.05 of 1 GiB)."""


def chunk_tokens(tokens: int, vocab: int, device_type: str = "cpu") -> int:
    """Rows per chunk: a power of two, so that the products keep good shapes."""
    most = max(CHUNK_BYTES[device_type] // (4 * vocab), 16)
    return min(tokens, 1 << (most.bit_length() - 1))


def _add_weight_gradient(
    total: Float[Tensor, "vocab embed"] | None,
    p: Float[Tensor, "chunk vocab"],
    h: Float[Tensor, "chunk embed"],
) -> Float[Tensor, "vocab embed"]:
    """total + pᵀ h, in fp32 or better, in the buffer of `total`."""
    if p.device.type == "cuda" and p.element_size() < 4:
        # one kernel: no part in half precision, no cast, no pass to add it
        if total is None:
            return torch.mm(p.t(), h, out_dtype=torch.float32)
        return torch.ops.aten.addmm.dtype_out(total, p.t(), h, torch.float32, out=total)
    part = at_least_fp32(linear(p.t(), h.t()))
    return part if total is None else total.add_(part)


def _softmax_gradient(
    z: Float[Tensor, "chunk vocab"],
    y: Int[Tensor, " chunk"],
    m: Float[Tensor, " chunk"],
    tp: Group,
) -> tuple[Float[Tensor, ""], Float[Tensor, "chunk vocab"]]:
    """The sum of m × -log softmax(z)[y], and its gradient by z, m × (softmax(z) - one-hot(y)).
    With tp above 1, z holds this rank's part of the vocabulary, in order."""
    dtype, z = z.dtype, at_least_fp32(z)
    m = m.to(z.dtype)
    ids = torch.arange(z.shape[-1], device=z.device) + tp.index * z.shape[-1]
    hit = ids == y.unsqueeze(-1)
    top = all_reduce(z.amax(-1, keepdim=True), tp, "max")
    e = (z - top).exp()
    parts = torch.stack([e.sum(-1), torch.where(hit, z - top, 0.0).sum(-1)])
    s, picked = all_reduce(parts, tp).unbind(0)
    gradient = e * (m / s).unsqueeze(-1) - torch.where(hit, m.unsqueeze(-1), 0.0)
    return ((s.log() - picked) * m).sum(), gradient.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass already computes the gradients, chunk by chunk, while the logits are there
    (as in Liger-Kernel, arXiv 2410.10989): the backward pass only scales them."""

    @staticmethod
    def forward(ctx, softmax, tp, hidden, weight, targets, weights):  # pyright: ignore[reportIncompatibleMethodOverride]
        need = any(ctx.needs_input_grad)
        w = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
        grads_hidden, grad_weight = [], None
        size = chunk_tokens(hidden.shape[0], weight.shape[0], hidden.device.type)
        for h, y, m in zip(*(t.split(size) for t in (hidden, targets, weights)), strict=True):
            loss, p = softmax(linear(h, w), y, m, tp)
            total = total + loss
            if not need:
                continue
            grads_hidden.append(linear(p, w.t()))
            grad_weight = _add_weight_gradient(grad_weight, p, h)
        if need:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        ctx.weight_dtype = weight.dtype
        # every rank of tp has the whole sum; each reports its part
        return total / tp.size

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None,
            None,
            (grad_hidden * grad).to(grad_hidden.dtype),
            (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_linear_cross_entropy(
    tp: Group | None = None, *, compile: bool = False
) -> LinearCrossEntropy:
    """`linear_cross_entropy` with the vocabulary cut over `tp`: each rank gives its rows of the
    weight and all tokens, and gets its part of the sum (the whole divided by the ranks). The
    gradient of `hidden` is this rank's part too, to be summed over tp.

    compile: the softmax is compiled, once for all chunks; where the caller is compiled it is not
    needed.
    """
    softmax = compile_graph(_softmax_gradient) if compile else _softmax_gradient
    tp = tp or Group()

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return _LinearCrossEntropy.apply(softmax, tp, hidden, weight, targets, weights)  # pyright: ignore[reportReturnType]

    return function


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens embed"],
    weight: Float[Tensor, "vocab embed"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum over tokens of weights × −log softmax(hidden @ weightᵀ)[targets], in nats, fp32 or
    better. Products run in the dtype of `hidden`; memory for logits is bounded by CHUNK_BYTES."""
    return make_linear_cross_entropy()(hidden, weight, targets, weights)

"""Products of experts: rows that are sorted by expert, each times its own expert's weights.

`omnistep::grouped_linear` and `omnistep::grouped_outer` are opaque to torch.compile and to
checkpointing policies. Where an expert's rows end is a tensor, so one graph serves every routing.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.products import goes_wide, wide_product


def grouped_linear(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "experts out in"],
    ends: Int[Tensor, "experts"],
) -> Float[Tensor, "rows out"]:
    """Row p times the transpose of its expert's weight: x[p] @ weight[e].T for the p from
    ends[e-1] (0 for the first expert) up to, without, ends[e].

    Differentiable in x and weight. Rows from ends[-1] on belong to no expert, and their gradient
    gives nothing to any weight. What comes out of them, and out of the gradient of x, is zeros on
    CPU; on CUDA it may be anything, NaN too, and must not be read.

    On CUDA bfloat16 of sizes that are multiples of 8 is one kernel (torch's grouped_mm) which the
    host does not wait for. All else is a loop over the experts that first reads `ends` on the host.

    Args:
        ends: int32, on the device of x; never decreasing, from 0 to `rows`.

    Raises:
        ValueError: shapes or dtypes do not fit together; where the host reads `ends`, also if they
            decrease or exceed the rows.
    """
    _check(x, weight, ends)
    return _linear(x, weight, ends)


def swiglu_experts(
    x: Float[Tensor, "rows embed"],
    row_weight: Float[Tensor, "rows"],
    gate: Float[Tensor, "experts mlp embed"],
    up: Float[Tensor, "experts mlp embed"],
    down: Float[Tensor, "experts embed mlp"],
    ends: Int[Tensor, "experts"],
) -> Float[Tensor, "rows embed"]:
    """SwiGLU (arXiv 2002.05202) of each row by its expert, times the row's weight; rows and `ends`
    as for `grouped_linear`.

    The weight multiplies the hidden vector, not the result, which is the same: so its gradient
    needs nothing that is not kept anyway. Made to be compiled: elementwise code is plain.
    """
    g, u = grouped_linear(x, gate, ends), grouped_linear(x, up, ends)
    h = F.silu(g) * u * row_weight.unsqueeze(-1)
    return grouped_linear(h.to(x.dtype), down, ends)


def clamped_experts(
    x: Float[Tensor, "rows embed"],
    row_weight: Float[Tensor, "rows"],
    gate_up: Float[Tensor, "experts embed 2*mlp"],
    gate_up_bias: Float[Tensor, "experts 2*mlp"],
    down: Float[Tensor, "experts mlp embed"],
    down_bias: Float[Tensor, "experts embed"],
    ends: Int[Tensor, "experts"],
    limit: float,
) -> Float[Tensor, "rows embed"]:
    """gpt-oss's experts (transformers, models/gpt_oss/modeling_gpt_oss.py), as `swiglu_experts`.

    Gate and up are every other column of one product; the gate is at most `limit`, up within plus
    and minus it; the hidden vector is gate sigmoid(1.702 gate) (up + 1).
    """
    both = grouped_linear(x, gate_up.mT, ends) + _of_rows(gate_up_bias, ends, x)
    g, u = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
    row_weight = row_weight.unsqueeze(-1)
    h = g * torch.sigmoid(1.702 * g) * (u + 1) * row_weight
    y = grouped_linear(h.to(x.dtype), down.mT, ends)
    return y + (_of_rows(down_bias, ends, x) * row_weight).to(x.dtype)


def _of_rows(
    bias: Float[Tensor, "experts out"], ends: Int[Tensor, "experts"], x: Float[Tensor, "rows in"]
) -> Float[Tensor, "rows out"]:
    """Each row's expert's bias, as a product: so its gradient is a sum over the expert's rows. Of
    8 columns, the fewest that a GPU's kernel takes."""
    ones = x.new_ones(x.shape[0], 8)
    return grouped_linear(ones, F.pad(bias.unsqueeze(-1), (0, 7)), ends)


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x must be [rows, in] and weight [experts, out, in]; they are {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(
            f"x and weight must have one floating dtype; they have {x.dtype} and {weight.dtype}"
        )
    if ends.shape != weight.shape[:1] or ends.dtype != torch.int32:
        raise ValueError(
            f"ends must be int32 [{weight.shape[0]}], one for each expert; it is {ends.dtype} "
            f"{tuple(ends.shape)}"
        )


def _slices(ends: Tensor, rows: int) -> list[slice]:
    """Each expert's rows."""
    bounds = [0, *ends.tolist()]
    if any(a > b for a, b in pairwise(bounds)) or bounds[-1] > rows:
        raise ValueError(f"ends must never decrease, from 0 to {rows} rows; they are {bounds[1:]}")
    return [slice(a, b) for a, b in pairwise(bounds)]


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm takes them: rows must begin at multiples of 16 bytes."""
    return x.dtype == torch.bfloat16 and not any(n % 8 for n in (x.shape[1], *weight.shape[-2:]))


def _step(count: int) -> int:
    """Numbers of rows are rounded to multiples of this for `wide_product`, since a kernel is made
    for each shape, and experts have other numbers of rows at every step."""
    return 1 if count < 128 else 1 << count.bit_length() - 5  # 16 to 32 numbers up to the double


def _product_of_rows(x: Tensor, rows: slice, one: Tensor) -> Tensor:
    """x[rows] @ one.T, of some more rows than these as far as there are any."""
    count = rows.stop - rows.start
    rounded = -(-count // _step(count)) * _step(count)
    if rounded > x.shape[0]:
        return x[rows] @ one.T
    begin = min(rows.start, x.shape[0] - rounded)
    return wide_product(x[begin : begin + rounded], one).narrow(0, rows.start - begin, count)


def linear_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear`; the gradient of x is the same operator with the weights transposed."""
    x = x.contiguous()
    out, wide = x.new_empty(x.shape[0], weight.shape[1]), goes_wide(x)
    slices = _slices(ends, x.shape[0])
    for rows, one in zip(slices, weight.unbind(), strict=True):
        if not wide:
            torch.mm(x[rows], one.T, out=out[rows])
        elif rows.stop > rows.start:
            out[rows] = _product_of_rows(x, rows, one)
    out[slices[-1].stop :].zero_()
    return out


def outer_loop(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weights, y.T @ x over the rows of each expert: [experts, out, in]."""
    x, y = x.contiguous(), y.contiguous()
    out, wide = x.new_empty(ends.shape[0], y.shape[1], x.shape[1]), goes_wide(x)
    for rows, one in zip(_slices(ends, x.shape[0]), out.unbind(), strict=True):
        count = rows.stop - rows.start
        if not wide or not count:
            torch.mm(y[rows].T, x[rows], out=one)  # zeros where there are no rows
            continue
        middle = rows.start + count // _step(count) * _step(count)
        one.copy_(wide_product(y[rows.start : middle].T, x[rows.start : middle].T))
        if middle < rows.stop:
            one.addmm_(y[middle : rows.stop].T, x[middle : rows.stop])
    return out


def linear_cuda(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if not _one_kernel(x, weight):
        return linear_loop(x, weight, ends)
    return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)


def outer_cuda(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    if not _one_kernel(x, y):
        return outer_loop(y, x, ends)
    out = F.grouped_mm(y.contiguous().T, x.contiguous(), offs=ends)
    # Of experts without rows some GPUs leave what was in memory (pytorch issue 172439).
    return out.masked_fill_(ends.diff(prepend=ends.new_zeros(1)).eq(0)[:, None, None], 0)


_linear = torch.library.custom_op("omnistep::grouped_linear", linear_loop, mutates_args=())
_outer = torch.library.custom_op("omnistep::grouped_outer", outer_loop, mutates_args=())
_linear.register_kernel("cuda", linear_cuda)
_outer.register_kernel("cuda", outer_cuda)


@_linear.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(y, x, ends):
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    x_grad = _linear(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    weight_grad = _outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return x_grad, weight_grad, None


_linear.register_autograd(_backward, setup_context=_save)

SAVED_OPS = frozenset({torch.ops.omnistep.grouped_linear.default})
"""What a checkpointing policy should save rather than compute a second time."""

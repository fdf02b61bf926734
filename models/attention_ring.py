"""Attention of a ring's rank: its queries over the keys of one rank after another.

Two operators, opaque to torch.compile and to checkpointing policies: on CPU the kernel of
attention_cpu.cpp, which computes nothing outside of what is seen; elsewhere, and without a C++
compiler, attention_plain.py.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.models import attention_cpu as cpu
from omnistep.models.attention_plain import compute_dtype, plain_part, plain_part_backward
from omnistep.parallel.mesh import Group
from omnistep.parallel.ring import chunks_of, holder, ring, take_local, tokens_before

# They read tensors of any strides. If that were not said, the compiler would make for each hop a
# copy of what it has not yet written to memory, such as q.
ANY_STRIDES = (torch.Tag.flexible_layout,)


@torch.library.custom_op("omnistep::attention_part", mutates_args=(), tags=ANY_STRIDES)
def attention_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    earlier: Tensor | None,
    earlier_lse: Tensor | None,
    in_flight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, going on from that over earlier ones.

    Args:
        q: [rows, queries, heads, head_dim].
        k, v: [rows, keys, kv_heads, head_dim].
        seen: int32 [2, rows, queries]; query i of a row sees the keys seen[0, row, i] ..
            seen[1, row, i] - 1 of these. Neither bound decreases along a row.
        earlier, earlier_lse: what this returned for earlier keys; None where there are none.
        in_flight: not read; an operand only, for `omnistep.parallel.ring.ring`.

    Returns:
        The attention [rows, queries, heads, head_dim] over these and the earlier keys, and its
        logsumexp [rows, heads, queries], in float32, or in float64 for float64. 0 and -inf for a
        query that has seen no key yet.
    """
    if earlier is None or earlier_lse is None:
        out, lse = _empty_state(q)
        out.zero_()
        lse.fill_(float("-inf"))
    else:
        out, lse = (x.clone(memory_format=torch.contiguous_format) for x in (earlier, earlier_lse))
    library = cpu.kernel() if q.device.type == "cpu" else None
    if library is None:
        plain_part(out, lse, q, k, v, seen, scale)
    else:
        cpu.kernel_forward_onto(library, out, lse, q, k, v, seen, scale)
    return out, lse


@torch.library.custom_op("omnistep::attention_part_backward", mutates_args=(), tags=ANY_STRIDES)
def attention_part_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    scale: float,
    in_flight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """What some of the keys give to the gradients, when `out` and `lse` are those over all keys.

    Returns the gradient of q, and those of k and v stacked, in float32 or float64.
    """
    q_grad, kv_grad = _empty_grads(q, k)
    q_grad.zero_()
    kv_grad.zero_()
    grads = (q_grad, kv_grad[0], kv_grad[1])
    library = cpu.kernel() if q.device.type == "cpu" else None
    if library is None:
        plain_part_backward(grads, grad, q, k, v, out, lse, seen, scale)
    else:
        cpu.kernel_backward_onto(library, grads, grad, q, k, v, out, lse, seen, scale)
    return q_grad, kv_grad


@attention_part.register_fake
def _(q, k, v, seen, scale, earlier, earlier_lse, in_flight):
    return _empty_state(q)


@attention_part_backward.register_fake
def _(grad, q, k, v, out, lse, seen, scale, in_flight):
    return _empty_grads(q, k)


def _empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, queries, heads, _ = q.shape
    dtype = compute_dtype(q)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((rows, heads, queries), dtype=dtype)


def _empty_grads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q)
    return q.new_empty(q.shape, dtype=dtype), k.new_empty((2, *k.shape), dtype=dtype)


def attention_in_ring(
    q: Float[Tensor, "rows local heads head_dim"],
    k: Float[Tensor, "rows local kv_heads head_dim"],
    v: Float[Tensor, "rows local kv_heads head_dim"],
    seen: tuple[Int[Tensor, "2 rows local"], ...],
    group: Group,
    scale: float,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows local heads head_dim"]:
    """See `omnistep.models.attention.ring_attention`; `seen` is what seen_at_hops returns."""

    def part(q, k, v, seen, state, in_flight):
        return attention_part(q, k, v, seen, scale, *(state or (None, None)), in_flight)

    def part_backward(grad, q, k, v, out, lse, seen, in_flight):
        return attention_part_backward(grad, q, k, v, out, lse, seen, scale, in_flight)

    return ring(part, part_backward, group, q, k, v, seen, sinks)


def seen_at_hops(
    first: Int[Tensor, "rows seq"], group: Group
) -> tuple[Int[Tensor, "2 rows local"], ...]:
    """At each hop, which keys of the block that is here each of this rank's tokens sees.

    first: the first token of its row that each token sees; the last is the token itself.
    """
    seq, size = first.shape[1], group.size
    end = torch.arange(1, seq + 1, dtype=first.dtype, device=first.device).expand_as(first)
    bounds = take_local(torch.stack([first, end]), group, 2)
    blocks = (chunks_of(seq, size, holder(hop, size, group.index)) for hop in range(size))
    return tuple(tokens_before(bounds, block) for block in blocks)

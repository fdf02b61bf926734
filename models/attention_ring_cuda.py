"""Attention of a ring's rank by FlashAttention, for half precision on CUDA.

Samples are told apart by cumulative lengths that stay on the device. Of another rank's keys, all
queries that see any (they belong to one sample, which began before) see the same ones: that is
attention without a mask, from a run of queries to a run of keys. Never run on a GPU yet: the tests
put a stand-in in the place of the two kernels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.models.attention_cuda import alone, cumulative_lengths
from omnistep.parallel.mesh import Group
from omnistep.parallel.ring import ring, take_local


@torch.library.custom_op("omnistep::flash_part", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def flash_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Tensor,
    scale: float,
    earlier: Tensor | None,
    earlier_lse: Tensor | None,
    in_flight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """See `omnistep.models.attention_ring.attention_part`.

    Args:
        where: for this rank's own keys, the int32 [samples + 1] cumulative lengths of its samples;
            for those of another, `seen` of attention_part, without a window.
    """
    out, lse = _flash_forward(q, k, v, *_lengths(where, k.shape[1]), scale)
    if earlier is None or earlier_lse is None:
        return out.float(), lse
    both = torch.logaddexp(earlier_lse, lse)
    kept, added = (_of_tokens((x - both).exp()) for x in (earlier_lse, lse))
    return earlier * kept + out * added, both


@torch.library.custom_op(
    "omnistep::flash_part_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def flash_part_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    where: Tensor,
    scale: float,
    in_flight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """See `omnistep.models.attention_ring.attention_part_backward`."""
    lengths = _lengths(where, k.shape[1])
    q_grad, k_grad, v_grad = _flash_backward(grad, q, k, v, out, lse, *lengths, scale)
    kv_grad = torch.stack([k_grad, v_grad])
    if where.dim() == 3:  # what stands in no pair of runs may not have been written
        first, end = where
        key = torch.arange(k.shape[1], device=k.device)
        run = rectangle(where)
        q_grad = q_grad.masked_fill((first >= end)[..., None, None], 0)
        unseen = (key < run[:, 2:3]) | (key >= run[:, 3:4])
        kv_grad = kv_grad.masked_fill(unseen[..., None, None], 0)
    return q_grad.float(), kv_grad.float()


@flash_part.register_fake
def _(q, k, v, where, scale, earlier, earlier_lse, in_flight):
    rows, queries, heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=torch.float32)
    return out, out.new_empty((rows, heads, queries))


@flash_part_backward.register_fake
def _(grad, q, k, v, out, lse, where, scale, in_flight):
    return q.new_empty(q.shape, dtype=torch.float32), k.new_empty(
        (2, *k.shape), dtype=torch.float32
    )


def rectangle(seen: Int[Tensor, "2 rows queries"]) -> Int[Tensor, "rows 4"]:
    """(first query, end, first key, end) of the queries of each row that see any keys, and those.

    All zero where there are none. Without a window, and for another rank's keys, they are runs.
    """
    first, end = seen
    sees = first < end
    begin = sees.to(torch.int32).argmax(1, keepdim=True)
    count = sees.sum(1, keepdim=True, dtype=torch.int32)
    run = [begin, begin + count, first.gather(1, begin), end.gather(1, begin)]
    return torch.cat(run, 1).to(torch.int32).masked_fill(count == 0, 0)


def _lengths(where: Tensor, keys: int) -> tuple[Tensor, Tensor, bool]:
    """Cumulative lengths of queries and of keys over all rows, and whether it is causal."""
    if where.dim() == 1:
        return where, where, True
    _, rows, queries = where.shape
    q_first, q_end, k_first, k_end = rectangle(where).unbind(1)
    # Five samples to a row: queries that see nothing; keys that nothing sees; the pair of runs;
    # and again such queries, and such keys.
    row = torch.arange(rows, dtype=torch.int32, device=where.device)
    zero = torch.zeros_like(row)
    of_queries = torch.stack([zero, q_first, q_first, q_end, zero + queries], 1)
    of_keys = torch.stack([zero, zero, k_first, k_end, k_end], 1)
    of_rows = [(of_queries, queries), (of_keys, keys)]
    lengths = [(x + row[:, None] * n).flatten() for x, n in of_rows]
    totals = [torch.full_like(row[:1], rows * n) for _, n in of_rows]
    of_queries, of_keys = (torch.cat(x) for x in zip(lengths, totals, strict=True))
    return of_queries, of_keys, False


def _of_tokens(x: Float[Tensor, "rows heads queries"]) -> Float[Tensor, "rows queries heads 1"]:
    return x.transpose(1, 2)[..., None]


def _tokens(x: Float[Tensor, "rows seq heads head_dim"]) -> Float[Tensor, "tokens heads head_dim"]:
    return x.flatten(0, 1).contiguous()


def _flash_forward(q, k, v, lengths_q, lengths_k, causal: bool, scale: float):
    """Output in q's dtype, and logsumexp [rows, heads, queries] in float32."""
    rows, queries, heads, _ = q.shape
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(_tokens, (q, k, v)), lengths_q, lengths_k,
        queries, k.shape[1], 0.0, causal, False, scale=scale,
    )  # fmt: skip
    lse = lse.view(heads, rows, queries).transpose(0, 1)
    # the kernel says +inf where there are no keys
    return out.view(q.shape), lse.masked_fill(lse == float("inf"), float("-inf")).contiguous()


def _flash_backward(grad, q, k, v, out, lse, lengths_q, lengths_k, causal: bool, scale: float):
    grads = torch.ops.aten._flash_attention_backward(
        *map(_tokens, (grad, q, k, v, out)), lse.transpose(0, 1).flatten(1).contiguous(),
        lengths_q, lengths_k, q.shape[1], k.shape[1], 0.0, causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # no dropout, so no random state
        torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip
    return [g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True)]


def flash_in_ring(
    q: Float[Tensor, "rows local heads head_dim"],
    k: Float[Tensor, "rows local kv_heads head_dim"],
    v: Float[Tensor, "rows local kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    seen: tuple[Int[Tensor, "2 rows local"], ...],
    group: Group,
    scale: float,
    max_samples: int,
) -> Float[Tensor, "rows local heads head_dim"]:
    """See `omnistep.models.attention.ring_attention`; seen as seen_at_hops makes it of `starts`."""

    def part(q, k, v, where, state, in_flight):
        return flash_part(q, k, v, where, scale, *(state or (None, None)), in_flight)

    def part_backward(grad, q, k, v, out, lse, where, in_flight):
        return flash_part_backward(grad, q, k, v, out, lse, where, scale, in_flight)

    padding = take_local(alone(starts), group)
    lengths = cumulative_lengths(seen[0][0], max_samples, padding)
    out = ring(part, part_backward, group, q, k, v, (lengths, *seen[1:]))
    # As in varlen_attention: a run of padding went as one sample, but each sees itself alone.
    own = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.where(padding[:, :, None, None], own, out)

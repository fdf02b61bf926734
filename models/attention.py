"""Causal attention within the samples of packed rows: one function, a kernel for each device.

A token sees itself and what came before it in its own sample, at most `window` tokens in all. Where
samples begin is a tensor (`omnistep.core.batch.segment_starts`), so one compiled step serves every
packing. Key/value heads may be fewer than query heads and are never repeated in memory.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.models.attention_cpu import attention_cpu
from omnistep.models.attention_cuda import attention_cuda, first_seen, flash_takes
from omnistep.models.attention_ring import attention_in_ring, seen_at_hops
from omnistep.models.attention_ring_cuda import flash_in_ring
from omnistep.models.layers import at_least_fp32
from omnistep.parallel.mesh import ALONE, Group
from omnistep.parallel.ring import local_chunks

SAVED_OPS = frozenset(
    {
        torch.ops.omnistep.attention_cpu.default,
        torch.ops.omnistep.attention_part.default,
        torch.ops.omnistep.flash_part.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""What a checkpointing policy should save rather than compute a second time."""


def attention(
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    *,
    scale: float,
    window: int | None,
    max_samples: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows seq heads head_dim"]:
    """softmax(scale q k^T) v, token i over tokens max(starts[i], i - window + 1) .. i of its row.

    Args:
        starts: int32; for each token the index in its row at which its sample begins.
        scale: usually head_dim ** -0.5.
        window: how many tokens a token sees, itself included; None for its whole sample.
        max_samples: a bound on the samples of a row (a run of padding counts as one), where one is
            known. It lets half-precision CUDA tensors use varlen_attn, whose cost grows with it;
            without it they use flex_attention. No meaning on other devices.
        sinks: a score that every token of a head has besides, of a key without a value (gpt-oss).
            On CUDA attention with sinks computes every score in plain operators.

    Raises:
        ValueError: shapes, dtypes or the window do not fit together; on CPU also where `starts` is
            not the start of any sample.
    """
    _check(q, k, v, starts, window)
    if sinks is not None:
        seen = seen_at_hops(first_seen(starts, window), ALONE)
        return attention_in_ring(q, k, v, seen, ALONE, scale, sinks)
    if q.device.type == "cuda":
        return attention_cuda(q, k, v, starts, scale=scale, window=window, max_samples=max_samples)
    return attention_cpu(q, k, v, starts, scale, window)[0]


def ring_attention(
    q: Float[Tensor, "rows local heads head_dim"],
    k: Float[Tensor, "rows local kv_heads head_dim"],
    v: Float[Tensor, "rows local kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    group: Group,
    *,
    scale: float,
    window: int | None,
    max_samples: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows local heads head_dim"]:
    """`attention` of rows that are cut over the ranks of `group`; on one rank it is `attention`.

    Differentiable; all ranks of the group must call it. See omnistep.parallel.ring for which tokens
    a rank holds (`take_local`) and for what is sent. Balanced for one long sample; where samples
    are short, ranks do different work and wait for each other.

    Args:
        q, k, v: of this rank's tokens, local = seq / group.size, in the order of `local_chunks`.
        starts: as for `attention`, of the whole rows in their natural order, on every rank.
        max_samples: as for `attention`. On CUDA only half precision with it and without a window
            or sinks is fast; the rest computes every score in plain operators.
        sinks: as for `attention`; their gradient is this rank's tokens' part.

    Raises:
        ValueError: as `attention` does; also where seq is not a multiple of 2 * group.size.
    """
    if group.size == 1:
        return attention(
            q, k, v, starts, scale=scale, window=window, max_samples=max_samples, sinks=sinks
        )
    local_chunks(starts.shape[1], group)
    _check(q, k, v, starts, window, group.size)
    seen = seen_at_hops(first_seen(starts, window), group)
    plain = window is not None or sinks is not None or max_samples is None or not flash_takes(q)
    if q.device.type == "cuda" and not plain:
        assert max_samples is not None
        return flash_in_ring(q, k, v, starts, seen, group, scale, max_samples)
    return attention_in_ring(q, k, v, seen, group, scale, sinks)


def decode_attention(
    q: Float[Tensor, "rows 1 heads head_dim"],
    k_cache: Float[Tensor, "rows max_len kv_heads head_dim"],
    v_cache: Float[Tensor, "rows max_len kv_heads head_dim"],
    first: Int[Tensor, "rows"],
    last: Int[Tensor, ""] | Int[Tensor, "rows"],
    *,
    scale: float,
    window: int | None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows 1 heads head_dim"]:
    """One new token's attention over a cache of static length, for generation.

    Sees the entries max(first, last - window + 1) .. last. Plain operators with static shapes: one
    compiled graph serves every step, on every device. Entries outside may hold anything finite.

    Args:
        first: index of each row's first valid entry (rows padded on the left begin late).
        last: index of the newest entry, the token's own, for all rows or for each.
        sinks: as for `attention`.
    """
    rows, one, heads, head_dim = q.shape
    _, max_len, kv_heads, _ = k_cache.shape
    if one != 1 or heads % kv_heads:
        raise ValueError(
            f"decode_attention takes one query per row and a multiple of {kv_heads} heads; "
            f"q is {tuple(q.shape)}"
        )
    index = torch.arange(max_len, device=q.device)
    newest = last.expand(rows)[:, None]
    oldest = first[:, None]
    if window is not None:
        oldest = torch.maximum(oldest, newest - (window - 1))
    seen = (index >= oldest) & (index <= newest)
    # The group of query heads that share a key/value head takes the place of the query sequence:
    # nothing is repeated, and the caches are read where they lie.
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    if sinks is not None:
        scores = torch.einsum("rkgd,rlkd->rkgl", grouped, k_cache) * scale
        scores = at_least_fp32(scores).masked_fill(~seen[:, None, None], float("-inf"))
        sink = sinks.to(scores.dtype).view(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(q.dtype)
        out = torch.einsum("rkgl,rlkd->rkgd", weights, v_cache)
        return out.reshape(rows, 1, heads, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped,
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=seen[:, None, None].expand(-1, -1, heads // kv_heads, -1),
        scale=scale,
    )
    return out.reshape(rows, 1, heads, head_dim)


def _check(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None, ranks: int = 1
) -> None:
    rows, seq, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (rows, seq) or k.shape[3] != head_dim:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be [{rows}, {seq}, kv_heads, "
            f"{head_dim}] for q {tuple(q.shape)}"
        )
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must have one floating dtype; they have {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if starts.shape != (rows, seq * ranks) or starts.dtype != torch.int32:
        raise ValueError(
            f"starts must be int32 [{rows}, {seq * ranks}], as segment_starts makes it, of whole "
            f"rows; it is {starts.dtype} {tuple(starts.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None for no window")

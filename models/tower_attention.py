"""Attention of a tower's patches: each to the patches of its frame or window, without causality.

Which these are is a tensor, so one compiled step serves every mix of images. The queries may be
some of the patches only, those of one rank, and the keys all of them.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from omnistep.models.attention_cuda import MASK_BLOCK, ordered_blocks
from omnistep.models.attention_ring import attention_in_ring
from omnistep.parallel.mesh import ALONE


def attend_within(
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys heads head_dim"],
    v: Float[Tensor, "rows keys heads head_dim"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> Float[Tensor, "rows queries heads head_dim"]:
    """softmax(scale q k^T) v.

    seen: int32; query i of a row sees the keys seen[0, row, i] .. seen[1, row, i] - 1, one at
    least. Neither bound decreases along a row.

    On CUDA it is flex_attention, in half precision too: varlen_attn would need a bound on how many
    frames there are, and launch blocks for that many as long as all patches together.
    """
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return _block_attention(q, k, v, seen, scale)
    return attention_in_ring(q, k, v, (seen,), ALONE, scale)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """flex_attention, compiled also when called outside of a compiled function."""
    if torch.compiler.is_compiling():
        return flex(q, k, v, seen, scale)
    return _compiled_flex()(q, k, v, seen, scale)


@functools.cache
def _compiled_flex():
    return torch.compile(flex, fullgraph=True)


def flex(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """flex_attention over the blocks that exist."""
    mask = seen_mask(seen, k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, block_mask=mask, scale=scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def seen_mask(seen: Int[Tensor, "2 rows queries"], keys: int) -> BlockMask:
    """The mask of `attend_within`, made from the first and last query of each block: as bounds do
    not decrease, a block of keys exists where it begins before the last query's end and ends after
    the first query's beginning, and is full where it lies between the other two bounds (and there
    are as many queries as a block has)."""
    begin, end = seen
    queries = begin.shape[1]
    first = torch.arange(-(-queries // MASK_BLOCK), device=seen.device) * MASK_BLOCK
    last = (first + MASK_BLOCK - 1).clamp(max=queries - 1)
    key = torch.arange(-(-keys // MASK_BLOCK), device=seen.device) * MASK_BLOCK
    key_end = key + MASK_BLOCK
    exists = (key < end[:, last, None]) & (key_end > begin[:, first, None])
    full = (key >= begin[:, last, None]) & (key_end <= end[:, first, None])
    full = full & (first + MASK_BLOCK <= queries)[:, None]

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= begin[row, query]) & (key < end[row, query])

    return BlockMask.from_kv_blocks(
        *ordered_blocks(exists & ~full),
        *ordered_blocks(exists & full),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=is_seen,
        seq_lengths=(queries, keys),
    )

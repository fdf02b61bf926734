"""Attention on CUDA: varlen_attn for half precision, flex_attention for the rest.

Neither waits for the device: cumulative lengths and block masks are made from `starts` by
operators of static shape.
"""

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

MASK_BLOCK = 128
"""flex_attention's block size, in queries and in keys."""


def attention_cuda(
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    *,
    scale: float,
    window: int | None,
    max_samples: int | None,
) -> Float[Tensor, "rows seq heads head_dim"]:
    """See `omnistep.models.attention.attention`."""
    if max_samples is not None and flash_takes(q):
        return varlen_attention(q, k, v, starts, scale, window, max_samples)
    if q.dtype == torch.float64:
        return dense_attention(q, k, v, starts, scale, window)
    return block_attention(q, k, v, starts, scale, window)


def flash_takes(q: Tensor) -> bool:
    """Whether FlashAttention computes in this dtype, head_dim and on this device."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _has_flash(q.device)


@torch.compiler.assume_constant_result
def _has_flash(device: torch.device) -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None,
    max_samples: int,
) -> Tensor:
    """FlashAttention over all rows as one, samples told apart by cumulative lengths."""
    rows, seq, heads, head_dim = q.shape
    lengths = cumulative_lengths(starts, max_samples)
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        lengths,
        lengths,
        seq,
        seq,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=heads != k.shape[2],
    )
    assert isinstance(out, Tensor)
    # Padding went as one sample per run; a sample of one token is its own value, nothing else.
    group = heads // k.shape[2]
    own = v.unsqueeze(3).expand(-1, -1, -1, group, -1).reshape(rows, seq, heads, head_dim)
    return torch.where(alone(starts)[:, :, None, None], own, out.view(q.shape))


def alone(starts: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
    """Tokens that are a whole sample."""
    index = torch.arange(starts.shape[1], dtype=starts.dtype, device=starts.device)
    begins = starts == index
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], 1)
    return begins & ends


def cumulative_lengths(
    starts: Int[Tensor, "rows seq"],
    max_samples: int,
    padding: Bool[Tensor, "rows seq"] | None = None,
) -> Int[Tensor, "rows*max_samples+1"]:
    """int32: where samples begin in the flattened rows, filled up with the number of tokens.

    A run of padding is one entry: of samples of one token, unless `padding` says which they are
    (a rank of a ring may hold one token of a longer sample). More than `max_samples` samples in a
    row on average is an assertion on the device: nothing is read back to check it here.
    """
    rows, seq = starts.shape
    index = torch.arange(seq, dtype=starts.dtype, device=starts.device)
    padding = alone(starts) if padding is None else padding
    after_padding = torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], 1)
    opens = ((starts == index) & ~(padding & after_padding)).flatten()
    slot = opens.cumsum(0) - 1
    bound = rows * max_samples
    torch._assert_async(slot[-1] < bound, f"more than {max_samples} samples per row: raise it")
    # Tokens that open nothing all write to one slot behind the end, which is then cut off.
    target = torch.where(opens, slot, bound + 1).clamp(max=bound + 1)
    token = torch.arange(rows * seq, dtype=torch.int32, device=starts.device)
    lengths = torch.full((bound + 2,), rows * seq, dtype=torch.int32, device=starts.device)
    return lengths.scatter(0, target, token)[: bound + 1]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    """flex_attention, compiled also when called outside of a compiled function."""
    if torch.compiler.is_compiling():
        return flex(q, k, v, starts, scale, window)
    return _compiled_flex()(q, k, v, starts, scale, window)


@functools.cache
def _compiled_flex():
    return torch.compile(flex, fullgraph=True)


def flex(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    """flex_attention over the blocks of the band that exist."""
    out = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=band_mask(starts, window),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def first_seen(starts: Int[Tensor, "rows seq"], window: int | None) -> Int[Tensor, "rows seq"]:
    """The first key each query sees: its sample's or its window's, whichever is later."""
    if window is None:
        return starts
    index = torch.arange(starts.shape[1], dtype=starts.dtype, device=starts.device)
    return torch.maximum(starts, index - (window - 1))


def band_mask(starts: Int[Tensor, "rows seq"], window: int | None) -> BlockMask:
    """The mask of `attention`, made from the corners of blocks, not from seq x seq masks.

    The first key seen does not decrease along a row, so a block's first and last query decide: it
    exists if its corner nearest the diagonal does, and is full if both of the others are seen.
    """
    seq = starts.shape[1]
    lo = first_seen(starts, window)
    blocks = -(-seq // MASK_BLOCK)
    first = torch.arange(blocks, device=lo.device) * MASK_BLOCK
    last = (first + MASK_BLOCK - 1).clamp(max=seq - 1)
    below = first[None, :] <= last[:, None]
    exists = below & (lo[:, first, None] <= last[None, None, :])
    full = (first[:, None] >= (first + MASK_BLOCK - 1)[None, :]) & (
        lo[:, last, None] <= first[None, None, :]
    )

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (key <= query) & (key >= starts[row, query])
        return inside if window is None else inside & (key > query - window)

    return BlockMask.from_kv_blocks(
        *ordered_blocks(exists & ~full),
        *ordered_blocks(exists & full),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=seen,
        seq_lengths=(seq, seq),
    )


def ordered_blocks(
    blocks: Bool[Tensor, "rows queries keys"],
) -> tuple[Int[Tensor, "rows 1 queries"], Int[Tensor, "rows 1 queries keys"]]:
    """How many key blocks each query block has, and which, those first; as BlockMask wants it."""
    chosen = blocks.to(torch.int32)[:, None]
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    """All seq x seq scores, for float64, which no CUDA kernel takes: for checks only."""
    seq, heads = q.shape[1:3]
    index = torch.arange(seq, device=q.device)
    lo = first_seen(starts, window)
    seen = (index <= index[:, None]) & (index >= lo[:, :, None])
    grouped = q.unflatten(2, (k.shape[2], heads // k.shape[2]))
    scores = torch.einsum("rihgd,rjhd->rhgij", grouped, k) * scale
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("rhgij,rjhd->rihgd", weights, v).flatten(2, 3)

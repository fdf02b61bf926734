"""The batch schema: where data and models meet.

One micro-batch is `rows` rows of `seq` tokens. A row holds one sample (padded mode) or
several, one after another (packed mode); attention never crosses from one into another.
Where the samples begin travels in one of two ways, which give the same numbers:
`positions` that restart at 0 (rmpad_with_pos_ids, and padded rows), or `cu_seqlens` (rmpad).
"""

import torch
from attrs import frozen
from jaxtyping import Bool, Float, Int
from torch import Tensor

from omnistep.core.tree import pytree


@pytree
@frozen(eq=False)
class Batch:
    """One micro-batch. With accumulation every leaf has a leading axis `accumulate`.

    A token without a target (a sample's last token, a prompt, padding) has weight 0 and any
    target inside the vocabulary. Exactly one of `positions` and `cu_seqlens` is given.
    """

    tokens: Int[Tensor, "rows seq"]
    targets: Int[Tensor, "rows seq"]
    weights: Float[Tensor, "rows seq"]
    positions: Int[Tensor, "rows seq"] | None = None
    """Index of each token in its sample; padding counts as samples of length 1 (position 0)."""
    cu_seqlens: Int[Tensor, "rows samples+1"] | None = None
    """int32 starts of the row's samples, the first 0, filled up with `seq` at the end."""


def segment_starts(batch: Batch) -> Int[Tensor, "rows seq"]:
    """int32: for each token, the index in its row at which its sample begins."""
    seq = batch.tokens.shape[-1]
    index = torch.arange(seq, dtype=torch.int32, device=batch.tokens.device)
    if batch.positions is not None:
        return index - batch.positions.to(torch.int32)
    if batch.cu_seqlens is None:
        raise ValueError("a Batch needs `positions` or `cu_seqlens`; it has neither")
    every = index.expand(batch.tokens.shape).contiguous()
    sample = torch.searchsorted(batch.cu_seqlens, every, right=True)
    return batch.cu_seqlens.gather(-1, sample - 1).to(torch.int32)


def positions(batch: Batch) -> Int[Tensor, "rows seq"]:
    """int32: for each token, its index in its sample."""
    index = torch.arange(batch.tokens.shape[-1], dtype=torch.int32, device=batch.tokens.device)
    return index - segment_starts(batch)


def padding(batch: Batch) -> Bool[Tensor, "rows seq"]:
    """True for padding: tokens that are a sample of their own. (A real sample of one token looks
    the same; it has no target.)"""
    first = positions(batch) == 0
    return first & torch.nn.functional.pad(first[:, 1:], (0, 1), value=True)

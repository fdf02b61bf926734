"""The batch schema: where data and models meet.

One micro-batch is `rows` rows of `seq` tokens. A row holds one sample (padded mode) or
several, one after another (packed mode); attention never crosses from one into another.
Where the samples begin travels in one of two ways, which give the same numbers:
`positions` that restart at 0 (rmpad_with_pos_ids, and padded rows), or `cu_seqlens` (rmpad).
"""

import torch
from attrs import frozen
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from omnistep.core.tree import pytree


@pytree
@frozen(eq=False)
class Patches:
    """The images and videos of a batch's rows, cut into patches: as many a row as the budget says
    (data.max_patches), whatever their sizes, so that one compiled step serves every mix.

    The patches of a frame stand together, and of a frame those of a window, and of these the
    `unit` of them that become one token. What fills the budget up has pixels 0, the grid 1 x 1, is
    a frame and a window of its own, and becomes no token.
    """

    pixels: UInt8[Tensor, "rows patches values"]
    """channels x frames x height x width, 0 to 255."""
    places: Int[Tensor, "rows patches 4"]
    """int32: row, column, and how many rows and columns its frame has, in patches. A class token is
    at -1, -1."""
    frames: Int[Tensor, "rows patches 2"]
    """int32: which patches of the row are of the same frame: the first, and the one after the
    last."""
    units: Int[Tensor, "rows seq"]
    """int32: for each token of the row, which unit of patches it stands for; -1 for text."""
    windows: Int[Tensor, "rows patches 2"] | None = None
    """The same of the same window; None where the tower has no windows."""


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
    rope: Int[Tensor, "rows seq 3"] | None = None
    """int32: each token's positions in time, height and width, for models that have three
    (Config.rope_axes); of padding 0."""
    patches: Patches | None = None
    """For models with a tower, also where no sample has an image: shapes stay the same."""


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

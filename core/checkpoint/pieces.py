"""Tensors that lie in pieces on several ranks, brought together where each is needed.

A piece goes straight to the one rank that needs it; of equal copies the nearest is sent. Nothing
is gathered on all ranks: a rank holds at most one whole tensor at a time, and one piece on its
way.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a part of a tensor."""


@frozen(eq=False)
class Pieces:
    """Which rank holds which part of a tensor; the same on every rank."""

    shape: tuple[int, ...]
    """Of the whole, as it is cut."""
    holders: Mapping[Box, tuple[int, ...]]
    """The parts, which together are the whole, and the ranks that have a copy of each."""
    device: torch.device
    """Where every rank has its part."""

    def senders(self, to: int) -> dict[int, Box]:
        """The ranks from which rank `to` gets the parts, itself included. Neighbours share a
        machine, so they are asked first."""
        return {min(ranks, key=lambda r: abs(r - to)): box for box, ranks in self.holders.items()}


@frozen(eq=False)
class LazyTensor:
    """A tensor to be made when its turn comes; its size is known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor; where it lies in pieces, this rank's."""
    pieces: Pieces | None = None
    """None where each rank can read the whole. Their shape may have more dimensions than the
    tensor's, of as many elements: heads and head_dim are one dimension in a file."""


def outgoing(rank: int, wanted: Mapping[int, LazyTensor]) -> dict[int, Tensor]:
    """The pieces that `rank` gives to others or itself, by their receiver, when each rank of
    `wanted` is to get its tensor."""
    return {
        to: tensor.read().detach()
        for to, tensor in wanted.items()
        if tensor.pieces is not None and rank in tensor.pieces.senders(to)
    }


def exchange(
    rank: int, size: int, wanted: LazyTensor | None, pieces: Mapping[int, Tensor]
) -> Tensor | None:
    """Sends `pieces` to their receivers; returns the tensor that this rank wants, on the CPU, or
    None where it lies in no pieces.

    Collective: `size` ranks of torch.distributed take part, each with its `outgoing` pieces. In
    turn i a rank sends to the i-th after it and hears from the i-th before it.
    """
    place = None if wanted is None else wanted.pieces
    senders = {} if place is None else place.senders(rank)
    whole = torch.empty(() if place is None else place.shape, dtype=wanted and wanted.dtype)
    for turn in range(size):
        to, by = (rank + turn) % size, (rank - turn) % size
        arriving = pieces.get(rank) if turn == 0 else None
        operations = []
        if turn > 0 and place is not None and by in senders:
            arriving = torch.empty(senders[by][1], dtype=whole.dtype, device=place.device)
            operations.append(dist.P2POp(dist.irecv, _bytes(arriving), by))
        if turn > 0 and to in pieces:
            operations.append(dist.P2POp(dist.isend, _bytes(pieces[to]), to))
        for pending in dist.batch_isend_irecv(operations) if operations else ():
            pending.wait()
        if arriving is not None:
            whole[tuple(slice(o, o + n) for o, n in zip(*senders[by], strict=True))] = arriving
    return whole.reshape(wanted.shape) if wanted is not None and place is not None else None


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory, if it is contiguous; backends do not know every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)

"""From a stream of blocks to a stream of rows: what workers left over is packed here."""

from collections.abc import Iterable, Iterator, Sequence

from attrs import frozen

from omnistep.data.blocks import Block, PackLimits, Piece
from omnistep.data.pack import pack

WAIT_BLOCKS = 8
"""A piece that found no full row in so many blocks is given in a row that is not full."""


@frozen(eq=False)
class Arrival:
    """The rows that could be planned when a block arrived."""

    epoch: int
    block: int
    held: tuple[Piece, ...]
    """what waited before"""
    rows: list[list[Piece]]
    pieces: int
    """new in this block"""


def arrivals(
    blocks: Iterable[Block], held: Sequence[Piece], limits: PackLimits, per_epoch: int
) -> Iterator[Arrival]:
    """Pure: the same blocks and held pieces give the same rows, wherever the blocks were packed.

    First the rows with pieces that have waited, then the block's own. Where the blocks end, what
    is still held comes in a last arrival. `per_epoch`: blocks of an epoch.
    """
    epoch = block_number = 0
    for block in blocks:
        new = block.pieces()
        full, left = block.plan or pack([len(p.ids) for p in new], limits.budget, limits.most)
        epoch, block_number = block.task.epoch or 0, block.task.block
        oldest = epoch * per_epoch + block_number - WAIT_BLOCKS
        due = sum(piece.at[0] * per_epoch + piece.at[1] <= oldest for piece in held)
        rows, still = _repack([*held, *(new[i] for i in left)], limits, due)
        rows += [[new[i] for i in row] for row in full]
        yield Arrival(epoch, block_number, tuple(held), rows, len(new))
        held = still
    if held:
        rows, _ = _repack(held, limits, due=len(held))
        yield Arrival(epoch, block_number + 1, tuple(held), rows, 0)


def _repack(
    pieces: Sequence[Piece], limits: PackLimits, due: int
) -> tuple[list[list[Piece]], list[Piece]]:
    rows, left = pack([len(piece.ids) for piece in pieces], limits.budget, limits.most, due)
    return [[pieces[i] for i in row] for row in rows], [pieces[i] for i in left]

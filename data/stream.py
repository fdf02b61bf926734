"""From a stream of blocks to a stream of rows: what workers left over is packed here."""

from collections.abc import Iterable, Iterator, Sequence

from attrs import frozen

from omnistep.data.blocks import Block, Losses, Piece
from omnistep.data.pack import PackLimits, pack

WAIT_BLOCKS = 8
"""A piece that found no full row in so many blocks is given in a row that is not full."""


@frozen(eq=False)
class Arrival:
    """The rows that could be planned when a block arrived."""

    epoch: int
    shard: int
    block: int
    number: int
    """of blocks that arrived before"""
    held: tuple[Piece, ...]
    """what waited before"""
    rows: list[list[Piece]]
    pieces: int
    """new in this block"""
    losses: Losses


def arrivals(
    blocks: Iterable[Block], held: Sequence[Piece], limits: PackLimits, number: int = 0
) -> Iterator[Arrival]:
    """Pure: the same blocks and held pieces give the same rows, wherever the blocks were packed.

    First the rows with pieces that have waited, then the block's own. Where the blocks end, what
    is still held comes in a last arrival. `number`: of the first block in the run.
    """
    epoch = 0
    for number, block in enumerate(blocks, number):  # noqa: B020 (it starts at the number given)
        new = block.pieces(number)
        full, left = block.plan or pack([piece.size for piece in new], limits)
        due = sum(piece.at[0] <= number - WAIT_BLOCKS for piece in held)
        rows, still = _repack([*held, *(new[i] for i in left)], limits, due)
        rows += [[new[i] for i in row] for row in full]
        task, epoch = block.task, block.task.epoch or 0
        place = (epoch, task.shard, task.block, number)
        yield Arrival(*place, tuple(held), rows, len(new), block.losses)
        held = [piece.alone() for piece in still]
    if held:
        rows, _ = _repack(held, limits, due=len(held))
        yield Arrival(epoch, 0, 0, number + 1, tuple(held), rows, 0, Losses())


def _repack(
    pieces: Sequence[Piece], limits: PackLimits, due: int
) -> tuple[list[list[Piece]], list[Piece]]:
    rows, left = pack([piece.size for piece in pieces], limits, due)
    return [[pieces[i] for i in row] for row in rows], [pieces[i] for i in left]

"""The unit of work: one block of successive samples, read, tokenised and planned in a worker."""

from collections.abc import Sequence

import attrs
import numpy as np
from attrs import frozen

from omnistep.data.errors import DataError
from omnistep.data.order import permuted
from omnistep.data.pack import pack
from omnistep.data.source import Source
from omnistep.data.state import PieceId
from omnistep.data.transform import Tokens, Transform


@frozen
class Task:
    """What a worker is asked for."""

    epoch: int | None
    """None: the samples as they stand in the source."""
    block: int
    count: bool = False
    """Only the number of pieces is wanted."""


@frozen(eq=False)
class Piece(Tokens):
    """Tokens, and which sample they are from."""

    at: PieceId = attrs.field(kw_only=True)


@frozen(eq=False)
class Block:
    """The pieces of a block in few flat arrays, which are cheap to send between processes."""

    task: Task
    ids: np.ndarray
    """int32 [tokens]"""
    learn: np.ndarray | None
    """bool [tokens]"""
    ends: np.ndarray
    """int64 [pieces]: where in `ids` each piece ends"""
    at: np.ndarray
    """int64 [pieces, 2]: sample, piece of that sample"""
    plan: tuple[list[list[int]], list[int]] | None = None
    """Full rows and leftovers, as indices of pieces; None: not packed yet."""

    def pieces(self) -> list[Piece]:
        """Views of the arrays."""
        pieces, start, epoch = [], 0, self.task.epoch or 0
        for end, (sample, number) in zip(self.ends.tolist(), self.at.tolist(), strict=True):
            learn = None if self.learn is None else self.learn[start:end]
            at = (epoch, self.task.block, sample, number)
            pieces.append(Piece(self.ids[start:end], learn, at=at))
            start = end
        return pieces


@frozen
class Failure:
    """A DataError on its way to the main process, which raises it there with its own message."""

    message: str


@frozen
class PackLimits:
    """What a row holds. Padded rows are rows of one piece."""

    budget: int
    """tokens"""
    most: int
    """pieces"""


@frozen(eq=False)
class BlockReader:
    """Task → Block, by random access: the data set the PyTorch DataLoader sees."""

    source: Source
    transform: Transform
    samples: int
    """of one block"""
    seed: int
    limits: PackLimits
    packs: bool
    """Plan the rows here (dyn_bsz_runtime: worker)."""
    longest: int
    """tokens a piece may have"""

    def __len__(self) -> int:
        """Blocks of an epoch; the last may be short."""
        return -(-len(self.source) // self.samples)

    def __getitem__(self, task: Task) -> Block | int | Failure:
        try:
            block = self.read(task)
        except DataError as error:
            return Failure(str(error))
        return len(block.ends) if task.count else block

    def read(self, task: Task) -> Block:
        start = task.block * self.samples
        stop = min(start + self.samples, len(self.source))
        if task.epoch is None:
            order = list(range(start, stop))
        else:
            order = permuted(len(self.source), self.seed, task.epoch, start, stop).tolist()
        made = {sample: self.pieces_of(sample) for sample in sorted(order)}  # disk order
        pieces = [piece for sample in order for piece in made[sample]]
        at = [(sample, number) for sample in order for number in range(len(made[sample]))]
        lengths = [len(piece.ids) for piece in pieces]
        return Block(
            task=task,
            ids=np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)]),
            learn=_joined_learn(pieces),
            ends=np.cumsum(lengths, dtype=np.int64),
            at=np.array(at, np.int64).reshape(-1, 2),
            plan=pack(lengths, self.limits.budget, self.limits.most) if self.packs else None,
        )

    def pieces_of(self, sample: int) -> list[Tokens]:
        record = self.source[sample]
        pieces = self.transform(record)
        for piece in pieces:
            if not 0 < len(piece.ids) <= self.longest:
                raise DataError(
                    f"{record.where}: a piece of {len(piece.ids)} tokens; the transform must make "
                    f"pieces of 1 to {self.longest} tokens (data.max_seq_len, less the margin)"
                )
        return pieces


def _joined_learn(pieces: Sequence[Tokens]) -> np.ndarray | None:
    if all(piece.learn is None for piece in pieces):
        return None
    masks = [np.ones(len(p.ids), bool) if p.learn is None else p.learn for p in pieces]
    return np.concatenate(masks)

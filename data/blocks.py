"""The unit of work: one block of samples, read, tokenised and planned in a worker."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import attrs
import numpy as np
from attrs import frozen

from omnistep.data.errors import DataError, NothingToLearn
from omnistep.data.files.records import Record
from omnistep.data.pack import PackLimits, pack
from omnistep.data.patches import ImageRules, Vision, joined, part_of
from omnistep.data.state import PieceId
from omnistep.data.transform import Tokens, Transform

REASONS = 10
"""Of so many skipped records a block says why."""


@frozen
class Task:
    """What a worker is asked for: a block of a shard of an epoch. All of a source that is read by
    random access is one shard; of a stream, each file."""

    epoch: int | None
    """None: the samples as they stand in the source."""
    shard: int
    """In the epoch's order."""
    block: int
    count: bool = False
    """Only the number of pieces is wanted."""


@frozen(eq=False)
class Piece(Tokens):
    """Tokens, and which sample they are from."""

    at: PieceId = attrs.field(kw_only=True)

    def alone(self) -> "Piece":
        """The same with pixels of its own, so that it does not keep those of its whole block."""
        if self.vision is None or self.vision.pixels.base is None:
            return self
        vision = attrs.evolve(self.vision, pixels=self.vision.pixels.copy())
        return attrs.evolve(self, vision=vision)


@frozen
class Losses:
    """What was not taken as it stands."""

    skipped: int = 0
    """records that could not be read as training data"""
    unlearnt: int = 0
    """records of which nothing is to be learnt"""
    cut: int = 0
    """samples cut to the length of a piece"""
    reasons: tuple[str, ...] = ()
    """why the first were skipped"""
    why_unlearnt: str = ""
    """what the first of these says"""


@frozen(eq=False)
class Block:
    """The pieces of a block in few flat arrays, which are cheap to send between processes."""

    task: Task
    last: bool
    """The shard ends with it."""
    ids: np.ndarray
    """int32 [tokens]"""
    learn: np.ndarray | None
    """bool [tokens]"""
    ends: np.ndarray
    """int64 [pieces]: where in `ids` each piece ends"""
    at: np.ndarray
    """int64 [pieces, 2]: sample, piece of that sample"""
    losses: Losses
    vision: tuple[Vision, np.ndarray] | None = None
    """What all pieces bring beside tokens, and int64 [pieces], where each ends among the patches;
    None: nothing."""
    plan: tuple[list[list[int]], list[int]] | None = None
    """Full rows and leftovers, as indices of pieces; None: not packed yet."""

    def pieces(self, arrival: int) -> list[Piece]:
        """Views of the arrays; `arrival` counts the blocks of a run."""
        pieces, start, first = [], 0, 0
        for i, (sample, number) in enumerate(self.at.tolist()):
            tokens = slice(start, int(self.ends[i]))
            learn = None if self.learn is None else self.learn[tokens]
            vision = None
            if self.vision is not None:
                whole, ends = self.vision
                vision = part_of(whole, tokens, slice(first, int(ends[i])))
                first = int(ends[i])
            ids, at = self.ids[tokens], (arrival, sample, number)
            pieces.append(Piece(ids, learn, vision=vision, at=at))
            start = tokens.stop
        return pieces


@frozen
class Counted:
    """The number of pieces of a block."""

    task: Task
    last: bool
    pieces: int
    losses: Losses


@frozen
class Failure:
    """A DataError on its way to the main process, which raises it there with its own message."""

    message: str


@frozen
class BlockRules:
    """What all blocks of a run have in common."""

    limits: PackLimits
    packs: bool
    """Plan the rows here (dyn_bsz_runtime: worker)."""
    longest: int
    """tokens a piece may have"""
    skips: bool = False
    """Skip a record that cannot be read as training data, and count it."""
    images: ImageRules | None = None
    """None: the model has no tower."""


Answer = Block | Counted | Failure


class Reader(Protocol):
    """Task → Block: the data set the PyTorch DataLoader sees. Picklable; a copy in each worker."""

    @property
    def rules(self) -> BlockRules: ...
    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources that are mixed."""
        ...

    @property
    def shards(self) -> int:
        """Of an epoch."""
        ...

    @property
    def blocks(self) -> int | None:
        """Of a shard; None: known when its last block was read."""
        ...

    @property
    def text(self) -> str:
        """How much there is, for a person."""
        ...

    def __getitem__(self, task: Task | None) -> Answer | None:
        """None is answered with None: a rank has nothing to do while others read."""
        ...

    def pieces_of(self, samples: Iterable[int]) -> dict[int, list[Tokens]]:
        """The pieces of these samples."""
        ...

    def part_of(self, sample: int) -> int:
        """Which of the sources that are mixed a sample is from."""
        ...

    def made_of(self) -> dict[str, int | float | str]:
        """What a position in this data holds for, besides the content of the samples."""
        ...


def answer(task: Task, last: bool, samples: "Samples", rules: BlockRules) -> Answer:
    """What a Reader gives back for a task of these samples."""
    try:
        block = make_block(task, last, samples, rules)
    except DataError as error:
        return Failure(str(error))
    except (OSError, MemoryError) as error:
        return Failure(f"the data can't be read: {str(error) or type(error).__name__}")
    return Counted(task, last, len(block.ends), block.losses) if task.count else block


Samples = Iterable[tuple[int, "list[Tokens] | DataError"]]
"""Numbers of samples, each with its pieces, or why it has none."""


def make_block(task: Task, last: bool, samples: Samples, rules: BlockRules) -> Block:
    """Raises the first DataError among the samples, unless the rules skip them."""
    pieces: list[Tokens] = []
    at: list[tuple[int, int]] = []
    skipped, unlearnt, cut = 0, 0, 0
    reasons, why_unlearnt = [], ""
    for sample, made in samples:
        if isinstance(made, NothingToLearn):
            unlearnt += 1
            why_unlearnt = why_unlearnt or str(made)
            continue
        if isinstance(made, DataError):
            if not rules.skips:
                raise made
            skipped += 1
            reasons += [str(made)] if len(reasons) < REASONS else []
            continue
        pieces += made
        at += [(sample, number) for number in range(len(made))]
        cut += sum(piece.cut > 0 for piece in made)
    lengths = [len(piece.ids) for piece in pieces]
    return Block(
        task=task,
        last=last,
        ids=np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)]),
        learn=_joined_learn(pieces),
        ends=np.cumsum(lengths, dtype=np.int64),
        at=np.array(at, np.int64).reshape(-1, 2),
        losses=Losses(skipped, unlearnt, cut, tuple(reasons), why_unlearnt),
        vision=joined([piece.vision for piece in pieces], lengths),
        plan=pack([piece.size for piece in pieces], rules.limits) if rules.packs else None,
    )


def pieces_of(read: Callable[[], Record], transform: Transform, longest: int) -> list[Tokens]:
    """What the transform makes of a record. Raises DataError where it is bad, ValueError (it is
    the transform that is wrong then) for a piece too long."""
    record = read()
    pieces = transform(record)
    for piece in pieces:
        if not 0 < len(piece.ids) <= longest:
            raise ValueError(
                f"{record.where}: a piece of {len(piece.ids)} tokens; the transform must make "
                f"pieces of 1 to {longest} tokens (data.max_seq_len, less the margin)"
            )
    return pieces


def tried(make: Callable[[], list[Tokens]]) -> list[Tokens] | DataError:
    """What `make` gives, or why it has nothing to give."""
    try:
        return make()
    except DataError as error:
        return error


def _joined_learn(pieces: Sequence[Tokens]) -> np.ndarray | None:
    if all(piece.learn is None for piece in pieces):
        return None
    masks = [np.ones(len(p.ids), bool) if p.learn is None else p.learn for p in pieces]
    return np.concatenate(masks)

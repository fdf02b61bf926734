"""Blocks of sources that can only be read from the front, file by file."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Protocol

from attrs import define, field

from omnistep.data.blocks import Answer, BlockRules, Failure, Task, answer, pieces_of, tried
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.order import permuted
from omnistep.data.source import left_out_text
from omnistep.data.transform import Tokens, Transform

Unread = Callable[[], Record]
"""A record that is parsed when it is called; raises DataError."""

RECORDS = 1 << 40
"""More than a file has: a sample's number is RECORDS * file + record."""


class Stream(Protocol):
    """Files, or whatever else is read from the front. Picklable."""

    @property
    def files(self) -> int: ...
    def open(self, file: int) -> Iterator[Unread]: ...


@define(eq=False)
class StreamReader:
    """A blocks.Reader. The files are read in a seeded order of each epoch; a block's records, one
    stretch of a file, are shuffled among each other.

    A copy keeps its place in the file it reads: it goes forward over what others read, without
    parsing it, and reads a file from the front when it has to go back.
    """

    stream: Stream
    transform: Transform
    samples: int
    """of a block: the shuffle buffer"""
    seed: int
    rules: BlockRules
    names: tuple[str, ...] = field(default=("data",), init=False)
    blocks: None = field(default=None, init=False)
    pieces: None = field(default=None, init=False)
    _open: tuple[int, int, Iterator[Unread]] | None = field(default=None, init=False)
    """File, records read of it, the rest."""

    @property
    def shards(self) -> int:
        return self.stream.files

    @property
    def text(self) -> str:
        left_out = left_out_text(getattr(self.stream, "left_out", ()))
        return f"{self.shards} file{'s' * (self.shards > 1)}, streamed{left_out}"

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamReader, (self.stream, self.transform, self.samples, self.seed, self.rules)

    def __getitem__(self, task: Task | None) -> Answer | None:
        if task is None:
            return None
        file, start = self._file(task), task.block * self.samples
        try:
            unread = self._records(file, start)
        except (DataError, OSError) as error:
            self._open = None
            return Failure(str(error))
        order = list(range(len(unread)))
        if task.epoch is not None:
            seed = self.seed + 1 + file * 1_000_003 + task.block
            order = permuted(len(unread), seed, task.epoch, 0, len(unread)).tolist()
        pairs = (
            (RECORDS * file + start + i, tried(partial(self._pieces, unread[i]))) for i in order
        )
        return answer(task, len(unread) < self.samples, pairs, self.rules)

    def pieces_of(self, samples: Iterable[int]) -> dict[int, list[Tokens]]:
        """Reads each file once, as far as it has to."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for sample in samples:
            wanted[sample // RECORDS].add(sample % RECORDS)
        found = {}
        for file, records in wanted.items():
            for number, unread in enumerate(islice(self.stream.open(file), max(records) + 1)):
                if number in records:
                    found[RECORDS * file + number] = self._pieces(unread)
        return found

    def part_of(self, sample: int) -> int:
        return 0

    def made_of(self) -> dict[str, int | float | str]:
        return {"the number of files": self.shards, "data.shuffle_buffer": self.samples}

    def _file(self, task: Task) -> int:
        if task.epoch is None:
            return task.shard
        return int(permuted(self.shards, self.seed, task.epoch, task.shard, task.shard + 1)[0])

    def _records(self, file: int, start: int) -> list[Unread]:
        """Up to a block of records from `start` on."""
        if self._open is None or self._open[0] != file or self._open[1] > start:
            self._open = (file, 0, self.stream.open(file))
        _, read, rest = self._open
        for _ in islice(rest, start - read):
            pass
        unread = list(islice(rest, self.samples))
        self._open = (file, start + len(unread), rest)
        return unread

    def _pieces(self, unread: Unread) -> list[Tokens]:
        return pieces_of(unread, self.transform, self.rules.longest)

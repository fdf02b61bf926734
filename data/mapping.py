"""Blocks of sources with random access, in a seeded order."""

from bisect import bisect_right
from collections.abc import Iterable
from functools import partial
from itertools import accumulate

from attrs import field, frozen

from omnistep.data.blocks import Answer, BlockRules, Task, answer, pieces_of, tried
from omnistep.data.order import Mixed, Order
from omnistep.data.source import Source, left_out_text
from omnistep.data.transform import Tokens, Transform


@frozen(eq=False)
class Part:
    """A source, and what makes pieces of its records."""

    name: str
    source: Source
    transform: Transform


@frozen(eq=False)
class MappingReader:
    """A blocks.Reader. The samples are numbered one part after another."""

    parts: tuple[Part, ...]
    order: Order
    samples: int
    """of a block"""
    rules: BlockRules
    shards: int = field(default=1, init=False)
    _firsts: tuple[int, ...] = field(init=False)
    """The number of each part's first sample, and of all samples."""

    @_firsts.default
    def _(self) -> tuple[int, ...]:
        return tuple(accumulate((len(part.source) for part in self.parts), initial=0))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def blocks(self) -> int:
        return -(-len(self.order) // self.samples)

    @property
    def text(self) -> str:
        several = len(self.parts) > 1
        counts = [f"{len(p.source)} of {p.name}" for p in self.parts] if several else []
        mixed = f" ({', '.join(counts)})" if several else ""
        left_out = [name for p in self.parts for name in getattr(p.source, "left_out", ())]
        return f"{self._firsts[-1]} samples{mixed}{left_out_text(left_out)}"

    def __getitem__(self, task: Task | None) -> Answer | None:
        if task is None:
            return None
        start = task.block * self.samples
        if task.epoch is None:
            order = list(range(start, min(start + self.samples, self._firsts[-1])))
        else:
            stop = min(start + self.samples, len(self.order))
            order = self.order(task.epoch, start, stop).tolist()
        # in the order of the disk
        made = {sample: tried(partial(self._pieces, sample)) for sample in sorted(order)}
        pairs = ((sample, made[sample]) for sample in order)
        return answer(task, task.block + 1 == self.blocks, pairs, self.rules)

    def pieces_of(self, samples: Iterable[int]) -> dict[int, list[Tokens]]:
        return {sample: self._pieces(sample) for sample in set(samples)}

    def part_of(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1

    def made_of(self) -> dict[str, int | float | str]:
        several = len(self.parts) > 1
        found: dict[str, int | float | str] = {
            f"the number of samples{f' of {part.name}' if several else ''}": len(part.source)
            for part in self.parts
        }
        if isinstance(self.order, Mixed):
            found["the shares of the sources"] = " ".join(map(str, self.order.counts))
        if sizes := [size for part in self.parts if (size := getattr(part.source, "bytes", None))]:
            found["the bytes of the data"] = sum(sizes)
        return {**found, "samples of a block": self.samples}

    def _pieces(self, sample: int) -> list[Tokens]:
        number = self.part_of(sample)
        part, index = self.parts[number], sample - self._firsts[number]
        return pieces_of(lambda: part.source[index], part.transform, self.rules.longest)

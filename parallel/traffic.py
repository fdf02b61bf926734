"""What is sent between ranks, message by message, counted where nothing can pass unseen.

`counted` stands in for a job of any number of ranks, in one process: this process is one of the
ranks, whose messages are written down and go nowhere. It counts at the process group, the one
door through which every message leaves: those of compiled graphs, of eager code, and sends between
stages of a pipeline alike. A call of the process group that it does not know raises.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnistep.parallel.mesh import AXES, Mesh, destroy_groups, make_mesh

Kind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "send", "receive"
]


@frozen(order=True)
class Message:
    """One call of a collective on this rank, or one message to or from another stage."""

    kind: Kind
    axes: tuple[str, ...]
    """Along which the ranks that take part differ, in the order of AXES."""
    ranks: int
    """How many take part."""
    elements: int
    """That this rank puts in; for a receive that it gets."""
    dtype: str
    """`float32`"""

    @property
    def bytes(self) -> float:
        """That leave this rank, by the best known algorithm for large messages (a ring).

        A gather passes on the pieces of all ranks but one, a reduction likewise the partial sums
        of all pieces but one, an all-reduce is both; an exchange keeps its own piece.
        """
        others = self.ranks - 1
        share = {
            "all_gather": others,
            "reduce_scatter": others / self.ranks,
            "all_reduce": 2 * others / self.ranks,
            "all_to_all": others / self.ranks,
            "permute": 1,
            "send": 1,
            "receive": 0,
        }[self.kind]
        return share * self.elements * getattr(torch, self.dtype).itemsize


Traffic = Counter[Message]
"""How often each message goes out."""


@frozen
class Total:
    messages: int
    bytes: float


def totals(traffic: Traffic) -> dict[tuple[tuple[str, ...], Kind], Total]:
    """Number of messages and bytes that leave, by axes and kind."""
    out: dict[tuple[tuple[str, ...], Kind], Total] = {}
    for message, count in sorted(traffic.items()):
        key = message.axes, message.kind
        old = out.get(key, Total(0, 0.0))
        out[key] = Total(old.messages + count, old.bytes + count * message.bytes)
    return out


@contextmanager
def counted(sizes: dict[str, int], rank: int = 0) -> Iterator[tuple[Mesh, list[Message]]]:
    """A mesh on CPU of which this process is one rank, and the list of what it sends, which grows
    (clear it to start again). What should arrive from others is whatever lies in memory.

    Sizes of 1 throughout give a job of one rank, with a process group nevertheless: what is sent
    over no axis would be seen. Messages between ranks that share experts (ep above 1) go by the
    axes of AXES in which these differ. Raises RuntimeError in a process that is part of a job.
    """
    if dist.is_initialized():
        raise RuntimeError("messages can only be counted in a process that is not part of a job")
    shared, sizes = sizes.get("ep", 1), {axis: sizes[axis] for axis in AXES if axis in sizes}
    messages: list[Message] = []
    world = 1
    for size in sizes.values():
        world *= size

    def make(options: Any, _: Any) -> dist.ProcessGroup:
        return _Counting(options, sizes, messages)

    # torch keeps backends by name for the life of a process; the last one of a name wins
    dist.Backend.register_backend(_NAME, make, extended_api=True, devices=["cpu"])
    dist.init_process_group(_NAME, store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = make_mesh({**sizes, "ep": shared}, torch.device("cpu"))
        messages.clear()
        yield mesh, messages
    finally:
        destroy_groups()


_NAME = "counted"


def axes_of(ranks: Iterable[int], sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes along which ranks differ."""
    ranks, axes, inner = list(ranks), [], 1
    for axis, size in reversed(sizes.items()):
        if len({rank // inner % size for rank in ranks}) > 1:
            axes.insert(0, axis)
        inner *= size
    return tuple(axes)


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future:
        future = Future()
        future.set_result([])
        return future


class _Counting(dist.ProcessGroup):
    """torch calls the methods by these names; it raises for those that are not here."""

    def __init__(self, options: Any, sizes: dict[str, int], messages: list[Message]):
        super().__init__(options.group_rank, options.group_size)
        members = list(options.global_ranks_in_group) or list(range(options.group_size))
        self._axes, self._size, self._messages = axes_of(members, sizes), len(members), messages

    def getBackendName(self) -> str:
        return _NAME

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def _count(self, kind: Kind, tensors: Iterable[Tensor]) -> dist.Work:
        for x in tensors:
            dtype = str(x.dtype).removeprefix("torch.")
            self._messages.append(Message(kind, self._axes, self._size, x.numel(), dtype))
        return _Done()

    def all_gather_single_coalesced(self, _out: Any, inputs: list[Tensor], _options: Any):
        return self._count("all_gather", inputs)

    def reduce_scatter_single_coalesced(self, _out: Any, inputs: list[Tensor], _options: Any):
        return self._count("reduce_scatter", inputs)

    def allreduce(self, tensors: list[Tensor], _options: Any):
        return self._count("all_reduce", tensors)

    def all_to_all_single(
        self, _out: Tensor, x: Tensor, _receives: Any, sends: list[int], _options: Any
    ):
        return self._count("permute" if sum(map(bool, sends)) == 1 else "all_to_all", [x])

    def send(self, tensors: list[Tensor], _to: int, _tag: int):
        return self._count("send", tensors)

    def recv(self, tensors: list[Tensor], _source: int, _tag: int):
        return self._count("receive", tensors)

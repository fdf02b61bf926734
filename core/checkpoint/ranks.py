"""The processes that save and restore together, and how they agree."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from attrs import frozen
from torch.distributed import distributed_c10d as _c10d

from omnistep.core.checkpoint.protocol import CheckpointError, DamagedError


@frozen
class Ranks:
    """This process among the others; `name` is None when it is alone."""

    rank: int
    size: int
    name: str | None
    """Of the process group. The group itself is held by torch.distributed alone: one that is held
    when the interpreter ends aborts the process."""

    @property
    def _group(self) -> Any:
        return _c10d._resolve_process_group(self.name or "")

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.name is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def together(self, action: Callable[[], None]) -> None:
        """Runs `action` on every rank; if it fails on one, raises CheckpointError on all: a
        DamagedError where the first rank that failed met one."""
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        mine = None
        if failure is not None:
            mine = str(failure) or type(failure).__name__, isinstance(failure, DamagedError)
        reasons = [(rank, why) for rank, why in enumerate(self.gather(mine)) if why is not None]
        if not reasons:
            return
        rank, (text, is_damage) = reasons[0]
        where = f"rank {rank}: " if self.size > 1 else ""
        others = f" (and {len(reasons) - 1} more ranks failed)" if len(reasons) > 1 else ""
        raise (DamagedError if is_damage else CheckpointError)(where + text + others) from failure

    def ask_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0, on every rank; CheckpointError on all if it fails."""
        answer: list[Any] = []
        self.together(lambda: answer.append(action()) if self.rank == 0 else None)
        return self.broadcast(answer[0] if answer else None)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.name is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        if self.name is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)


ALONE = Ranks(0, 1, None)


def all_ranks() -> Ranks:
    """All of the initialised process group, on a gloo group of its own; without one, one rank.

    The group is the caller's alone, so that a background thread may use it beside the step's
    collectives. Collective where torch.distributed is initialised.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    group = dist.new_group(backend="gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), group.group_name)

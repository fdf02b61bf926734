"""The checkpoints of one directory: all that does not depend on how a step lies there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from omnistep.core.checkpoint.fit import check_fit, put
from omnistep.core.checkpoint.place import Place, committed, is_committed, make, set_aside
from omnistep.core.checkpoint.protocol import CheckpointError, Saved
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.saving import Leaves, Saving, bytes_of, snapshots
from omnistep.core.checkpoint.shards import HostCopies, local_extent, slices_at
from omnistep.core.tree import Tree, leaves_with_names, map_with_name

LEAVES_IN_FLIGHT = 4
"""How many leaves are read at once: bounds the memory beyond the restored state itself."""


class Writer(Protocol):
    """Writes steps in one format."""

    def commit(self, step: int, leaves: Leaves) -> None:
        """Collective: returns when the step has its name, and steps that are not kept are gone.
        Deletes what killed saves left. Raises on every rank when one of them fails."""
        ...

    def close(self) -> None:
        """Forgets the directory; a later commit looks at it anew."""
        ...


class Stored(Protocol):
    """One committed step, opened by one rank."""

    def leaves(self) -> dict[str, Any]:
        """By name: meta tensors, "" for texts, 0 for ints."""
        ...

    def value(self, name: str) -> str | int:
        """Raises DamagedError naming it."""
        ...

    def part(self, name: str, slices: Sequence[slice]) -> Tensor:
        """What `slices` cut of a tensor: one per dimension, whole numbers, step 1; on the CPU.
        Raises DamagedError naming it."""
        ...


class DirectoryStore:
    """A CheckpointStore. Every method is collective: all ranks call it.

    A state is a tree (core/tree.py) of Tensor, DTensor, Streamed, str and int leaves. Leaves are
    stored and found by their dotted names, so the classes that hold them may change between runs.
    """

    def __init__(
        self, directory: Place, ranks: Ranks, writer: Writer, open_step: Callable[[Place], Stored]
    ):
        """open_step: opens a committed step, whatever its format."""
        self.directory = directory
        self._ranks, self._writer, self._open_step = ranks, writer, open_step
        self._copies, self._saving = HostCopies(), Saving()

    @property
    def saved(self) -> Sequence[Saved]:
        """The saves that were committed so far; to read it waits for nothing."""
        return tuple(self._saving.done)

    def save(self, step: int, state: Tree) -> None:
        """Copies this rank's shards and returns; the copy is written in the background.

        The state's buffers may be overwritten as soon as this returns. An earlier save is
        waited for first, and raises here when it failed. Raises CheckpointError on every rank
        when the step exists, the directory cannot be made, or a leaf cannot be stored.
        """
        began = time.perf_counter()
        self.wait()
        leaves: dict[str, Any] = {}

        def prepare() -> None:
            if self._ranks.rank == 0:
                self._admit(step)
            leaves.update(snapshots(state, self._ranks, self._copies))

        def commit() -> None:  # the ranks talk to each other here only, until wait() joined it
            self._copies.wait()
            self._writer.commit(step, leaves)

        self._ranks.together(prepare)
        what = f"saving step {step} to {self.directory}"
        self._saving.start(what, step, bytes_of(leaves), began, commit)

    def wait(self) -> None:
        """Returns when the save in flight is committed. Raises CheckpointError when it is not."""
        self._saving.wait()

    def steps(self) -> list[int]:
        """The committed steps, ascending. A save in flight is waited for."""
        self.wait()
        return self._ranks.ask_first(lambda: committed(self.directory))

    def latest(self) -> int | None:
        """The last committed step, or None. A save in flight is waited for."""
        return max(self.steps(), default=None)

    def stored(self, step: int | None = None) -> dict[str, Any]:
        """What a step (the latest by default) holds: leaf names to meta tensors, "" and 0.

        Fit for `restore`, whole or in part.
        """
        place = self._place(step)
        leaves: dict[str, Any] = {}
        self._ranks.together(lambda: leaves.update(self._open_step(place).leaves()))
        return leaves

    def opened(self, step: int | None = None) -> Stored:
        """A step (the latest by default), to be read part by part by this rank alone."""
        return self._open_step(self._place(step))

    def restore(
        self, abstract: Tree, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> Tree:
        """A tree like `abstract` with the stored values of a step (the latest by default).

        abstract: tensors (meta or real) and DTensors on any mesh, which give shape, dtype and
        placement, and any str and int where such a leaf is wanted. It may hold a part of what
        is stored. Meta tensors go to `device`, others where they are, DTensors to their mesh.
        Raises CheckpointError naming every leaf that is missing or differs, DamagedError naming
        one that cannot be read.
        """
        place = self._place(step)
        values: dict[str, Any] = {}

        def read() -> None:
            wanted, stored = leaves_with_names(abstract), self._open_step(place)
            check_fit(wanted, stored.leaves(), str(place))

            def one(name: str, like: Any) -> Any:
                if not isinstance(like, Tensor):
                    return stored.value(name)
                shape, offset = local_extent(like)
                return put(stored.part(name, slices_at(offset, shape)), like, device)

            with ThreadPoolExecutor(LEAVES_IN_FLIGHT) as pool:
                values.update(zip(wanted, pool.map(one, wanted, wanted.values()), strict=True))

        self._ranks.together(read)
        return map_with_name(lambda name, _: values[name], abstract)

    def set_aside(self, step: int) -> str:
        """Makes a committed step one that is not offered any more; where it lies then.

        For one that cannot be restored: it keeps its bytes, and gives the step's name free.
        Locally it is renamed to `<step>.damaged`; in a bucket it is marked and stays until its
        step is saved again.
        """
        self._place(step)
        self._writer.close()  # which knows the steps by now
        return self._ranks.ask_first(lambda: set_aside(self.directory, step))

    def close(self) -> None:
        """Waits for the save in flight, then gives back what the store holds."""
        try:
            self.wait()
        finally:
            self._writer.close()
            self._copies = HostCopies()
            self._ranks.close()

    def _admit(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}; it is a whole number, at least 0")
        make(self.directory)
        if is_committed(self.directory, step):
            raise FileExistsError(f"step {step} is already saved in {self.directory}")

    def _place(self, step: int | None) -> Place:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no committed checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no step {step}; it holds {steps}")
        return self.directory / str(steps[-1] if step is None else step)

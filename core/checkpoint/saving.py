"""A save up to its format: what is copied, and the thread that writes the copy."""

import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from omnistep.core.checkpoint.protocol import CheckpointError, Saved
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.shards import HostCopies, Shard, Streamed, snapshot
from omnistep.core.tree import Tree, leaves_with_names

Leaves = Mapping[str, Any]
"""By dotted name: str and int, and for each tensor this rank's copied Shard."""


def snapshots(state: Tree, ranks: Ranks, copies: HostCopies) -> Leaves:
    """Raises ValueError naming a leaf that no store holds."""
    named = leaves_with_names(state)
    if not named:
        raise ValueError("the state to be saved has no leaves")
    inner = {name[:i] for name in named for i, letter in enumerate(name) if letter == "."}
    for name, leaf in named.items():
        if not all(name.split(".")) or "/" in name or "~" in name:
            raise ValueError(f"{name!r} cannot name a leaf: a key is empty or holds '/' or '~'")
        if isinstance(leaf, bool) or not isinstance(leaf, Tensor | Streamed | str | int):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}; a checkpoint holds tensors, ints and str "
                "(JSON text for anything else)"
            )
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise ValueError(f"{name} is {leaf}, which does not fit 64 bits")
        if name in inner:
            raise ValueError(f"{name} is a leaf and also a part of other leaves' names")
    return {
        name: snapshot(name, leaf, ranks.rank, ranks.size, copies)
        if isinstance(leaf, Tensor | Streamed)
        else leaf
        for name, leaf in named.items()
    }


def bytes_of(leaves: Leaves) -> int:
    """Of all tensors together, over all ranks."""
    shards = [leaf for leaf in leaves.values() if isinstance(leaf, Shard)]
    return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in shards)


class Saving:
    """The save in flight, in a thread of its own, and how it ended."""

    def __init__(self) -> None:
        self.done: list[Saved] = []
        """The saves that were committed; to read it waits for nothing."""
        self._thread: threading.Thread | None = None
        self._what = ""
        self._failure: Exception | None = None
        # A script that ends without close() must not lose its last save: orbax needs executors,
        # which refuse work from the moment the interpreter ends. Only this hook comes earlier;
        # concurrent.futures uses it too.
        threading._register_atexit(_wait_if_alive, weakref.ref(self))  # pyright: ignore

    def start(
        self, what: str, step: int, size: int, began: float, commit: Callable[[], None]
    ) -> None:
        """Runs `commit` in the background. what: `saving step 3 to ...`, for the error; size: in
        bytes; began: the perf_counter when the save was asked for, which stalled since."""
        stall = time.perf_counter() - began

        def run() -> None:
            try:
                commit()
                self.done.append(Saved(step, size, stall, time.perf_counter() - began))
            except Exception as error:
                self._failure = error

        self._what = what
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the save in flight is committed. Raises CheckpointError when it is not."""
        if self._thread is None:
            return
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if failure is not None:
            raise CheckpointError(f"{self._what} failed: {failure}") from failure


def _wait_if_alive(reference: "weakref.ref[Saving]") -> None:
    if (saving := reference()) is not None:
        saving.wait()

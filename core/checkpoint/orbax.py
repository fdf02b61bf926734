"""A CheckpointStore over orbax: asynchronous, complete or absent, read back on any mesh.

Rank 0 runs orbax as catalogue and commit layer; every rank writes and reads its own shards.
The ranks agree through torch.distributed alone; without an initialised process group there is
one rank and no communication. The result is an ordinary orbax checkpoint, which plain orbax
restores without this code.

Orbax and jax are imported at the first save, in its thread, on rank 0 only; reading needs
neither. Forking a process after that is unsafe: start data-loader workers before, or by spawn.
"""

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnistep.core.checkpoint.place import (
    Bucket,
    Place,
    committed,
    is_committed,
    make,
    open_place,
    set_aside,
)
from omnistep.core.checkpoint.protocol import CheckpointError, Saved
from omnistep.core.checkpoint.ranks import Ranks, all_ranks
from omnistep.core.checkpoint.shards import (
    HostCopies,
    Shard,
    Streamed,
    snapshot,
    write_shards,
)
from omnistep.core.checkpoint.stored import checksums, open_stored
from omnistep.core.tree import Tree, leaves_with_names, map_with_name


class OrbaxStore:
    """Checkpoints of one directory. Every method is collective: all ranks call it.

    A state is a tree (core/tree.py) of Tensor, DTensor, Streamed, str and int leaves. Leaves are
    stored and found by their dotted names, so the classes that hold them may change between runs.
    """

    def __init__(
        self, directory: str | Path, *, keep: int | None = None, keep_every: int | None = None
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; it is the number of steps kept, at least 1, or None")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is {keep_every}; it is a number of steps, at least 1")
        self.directory = open_place(directory)
        self.last_saved: Saved | None = None
        """The last save that was committed; to read it waits for nothing."""
        self._keep, self._keep_every = keep, keep_every
        self._ranks = all_ranks()
        self._copies = HostCopies()
        self._catalogue: Any = None
        self._saving: threading.Thread | None = None
        self._step = 0
        self._telling = threading.Lock()
        """Held by the one thread of rank 0 that talks to the other ranks."""
        self._over = False
        self._failure: Exception | None = None
        # A script that ends without close() must not lose its last save: orbax needs executors,
        # which refuse work from the moment the interpreter ends. Only this hook comes earlier;
        # concurrent.futures uses it too.
        threading._register_atexit(_wait_if_alive, weakref.ref(self))  # pyright: ignore

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
            leaves.update(_snapshots(state, self._ranks, self._copies))

        self._ranks.together(prepare)
        self._step = step
        stall = time.perf_counter() - began
        started = (step, leaves, began, stall)
        self._saving = threading.Thread(target=self._run, args=started, name="checkpoint")
        self._saving.start()

    def wait(self) -> None:
        """Returns when the save in flight is committed. Raises CheckpointError when it is not."""
        if self._saving is None:
            return
        self._saving.join()
        failure, self._saving, self._failure = self._failure, None, None
        if failure is not None:
            raise CheckpointError(
                f"saving step {self._step} to {self.directory} failed: {failure}"
            ) from failure

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
        return open_stored(self._arrays_of(step)).leaves()

    def restore(
        self, abstract: Tree, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> Tree:
        """A tree like `abstract` with the stored values of a step (the latest by default).

        abstract: tensors (meta or real) and DTensors on any mesh, which give shape, dtype and
        placement, and any str and int where such a leaf is wanted. It may hold a part of what
        is stored. Meta tensors go to `device`, others where they are, DTensors to their mesh.
        Raises CheckpointError naming every leaf that is missing or differs, or is damaged.
        """
        directory = self._arrays_of(step)
        values: dict[str, Any] = {}

        def read() -> None:
            values.update(open_stored(directory).read(leaves_with_names(abstract), device))

        self._ranks.together(read)
        return map_with_name(lambda name, _: values[name], abstract)

    def set_aside(self, step: int) -> str:
        """Makes a committed step one that is not offered any more; where it lies then.

        For one that cannot be restored: it keeps its bytes, and gives the step's name free.
        Locally it is renamed to `<step>.damaged`; in a bucket it is marked and stays until its
        step is saved again.
        """
        self._arrays_of(step)
        self._forget_catalogue()  # it has read the steps already
        return self._ranks.ask_first(lambda: set_aside(self.directory, step))

    def close(self) -> None:
        """Waits for the save in flight, then gives back what the store holds."""
        try:
            self.wait()
        finally:
            self._forget_catalogue()
            self._copies = HostCopies()
            self._ranks.close()

    # --- the save's thread; the ranks talk to each other there only, until wait() joined it ---

    def _run(self, step: int, leaves: dict[str, Any], began: float, stall: float) -> None:
        try:
            self._copies.wait()
            if self._ranks.rank == 0:
                self._lead(step, leaves)
            else:
                self._follow([leaf for leaf in leaves.values() if isinstance(leaf, Shard)])
            seconds = time.perf_counter() - began
            self.last_saved = Saved(step, _size(leaves), stall, seconds)
        except Exception as error:
            self._failure = error

    def _lead(self, step: int, leaves: dict[str, Any]) -> None:
        """Rank 0: orbax saves, calling `_write` for the arrays; then all hear how it went."""
        self._over = False
        try:
            if self._catalogue is None:
                self._catalogue = _open_catalogue(
                    self.directory, self._keep, self._keep_every, self._write
                )
            self._catalogue.save(step, _nested(leaves), checksums(leaves))
        except Exception as error:
            self._forget_catalogue()  # it counts the failed step; the next one cleans up after it
            with self._telling:  # orbax does not wait for the arrays where a text has failed
                self._over = True
                self._ranks.broadcast(("done", str(error) or type(error).__name__))
            raise
        self._ranks.broadcast(("done", None))

    def _write(self, directory: str, shards: list[Shard]) -> None:
        with self._telling:
            if self._over:
                raise RuntimeError("the save has failed before its arrays were written")
            self._ranks.broadcast(("write", directory))
            self._ranks.together(lambda: write_shards(directory, self._ranks.rank, shards))

    def _follow(self, shards: list[Shard]) -> None:
        """The other ranks: write where rank 0 says, until it says how the save ended."""
        while True:
            message, content = self._ranks.broadcast(None)
            if message == "done" and content is not None:
                raise CheckpointError(content)
            if message == "done":
                return
            with contextlib.suppress(CheckpointError):  # raised on rank 0 too, whose "done" tells
                self._ranks.together(lambda to=content: write_shards(to, self._ranks.rank, shards))

    def _forget_catalogue(self) -> None:
        catalogue, self._catalogue = self._catalogue, None
        if catalogue is not None:
            with contextlib.suppress(Exception):  # it repeats the failure of the save, if any
                catalogue.close()

    # --- the directory ---

    def _admit(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}; it is a whole number, at least 0")
        make(self.directory)
        if is_committed(self.directory, step):
            raise FileExistsError(f"step {step} is already saved in {self.directory}")

    def _arrays_of(self, step: int | None) -> Place:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no committed checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no step {step}; it holds {steps}")
        return self.directory / str(steps[-1] if step is None else step) / "state"


def _open_catalogue(directory: Place, *rest: Any) -> Any:
    """Of its kind. Imports jax and orbax."""
    if isinstance(directory, Bucket):
        from omnistep.core.checkpoint.bucket import BucketCatalogue

        return BucketCatalogue(directory, *rest)
    from omnistep.core.checkpoint.catalogue import Catalogue

    return Catalogue(str(directory), *rest)


def _wait_if_alive(reference: "weakref.ref[OrbaxStore]") -> None:
    if (store := reference()) is not None:
        store.wait()


def _snapshots(state: Tree, ranks: Ranks, copies: HostCopies) -> dict[str, Any]:
    """Every leaf by its name, tensors as this rank's copied Shard."""
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


def _size(leaves: Mapping[str, Any]) -> int:
    shards = [leaf for leaf in leaves.values() if isinstance(leaf, Shard)]
    return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in shards)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts by the parts of the dotted names: what orbax takes for a tree."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree

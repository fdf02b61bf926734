"""What a trainer asks of a checkpoint store, and the one that answers."""

from pathlib import Path
from typing import Protocol

import torch

from omnistep.core.checkpoint.orbax import OrbaxStore
from omnistep.core.tree import Tree


class CheckpointStore(Protocol):
    """Saves and restores one tree that holds all: state, data position, meters.

    A step is complete or absent, never half. Every method is collective: all ranks call it.
    """

    def save(self, step: int, state: Tree) -> None:
        """Returns when the state may be overwritten; the rest happens in the background."""
        ...

    def wait(self) -> None:
        """Returns when the last save is committed; raises on every rank if it was not."""
        ...

    def latest(self) -> int | None:
        """The last committed step, or None."""
        ...

    def restore(
        self, abstract: Tree, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> Tree:
        """The stored values in `abstract`'s structure, on any mesh; meta tensors on `device`."""
        ...

    def close(self) -> None:
        """Waits, then gives back what the store holds."""
        ...


def open_store(directory: str | Path, *, keep: int | None = None) -> OrbaxStore:
    """The checkpoints under `directory`, which is made by the first save.

    keep: how many of the latest steps stay on disk; None keeps all. With several ranks this is
    collective and comes after torch.distributed is initialised. Reading changes nothing on
    disk; the first save deletes what killed saves left behind, so only one run saves there.
    """
    return OrbaxStore(directory, keep=keep)

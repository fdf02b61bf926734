"""What a trainer asks of a checkpoint store, and how it is told that something is wrong."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import frozen

from omnistep.core.checkpoint.place import Place
from omnistep.core.tree import Tree


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or restored; the message says which and why."""


class DamagedError(CheckpointError):
    """A committed step cannot be read as it was written; the message names the leaf. Another step
    may well be sound."""


@frozen
class Saved:
    """A save that is committed."""

    step: int
    size: int
    """Of all its tensors together, in bytes."""
    stall: float
    """Seconds in which `save` held its caller up: to end an earlier save, and to copy."""
    seconds: float
    """From the call of `save` to the commit."""


class CheckpointStore(Protocol):
    """Saves and restores one tree that holds all: state, data position, meters.

    A step is complete or absent, never half. Every method is collective: all ranks call it.
    """

    @property
    def directory(self) -> Place:
        """Where the steps lie: an absolute path, or a directory in a bucket."""
        ...

    @property
    def saved(self) -> Sequence[Saved]:
        """The saves of this store that were committed so far; to read it waits for nothing."""
        ...

    def save(self, step: int, state: Tree) -> None:
        """Returns when the state may be overwritten; the rest happens in the background."""
        ...

    def wait(self) -> None:
        """Returns when the last save is committed; raises on every rank if it was not."""
        ...

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        ...

    def latest(self) -> int | None:
        """The last committed step, or None."""
        ...

    def stored(self, step: int | None = None) -> dict[str, Any]:
        """What a step (the latest by default) holds: leaf names to meta tensors, "" and 0."""
        ...

    def restore(
        self, abstract: Tree, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> Tree:
        """The stored values in `abstract`'s structure, on any mesh; meta tensors on `device`."""
        ...

    def set_aside(self, step: int) -> str:
        """Makes a damaged step one that is not offered any more; where it lies then."""
        ...

    def close(self) -> None:
        """Waits, then gives back what the store holds."""
        ...

"""How a directory of checkpoints is opened."""

from pathlib import Path

from omnistep.core.checkpoint.orbax import OrbaxStore


def open_store(
    directory: str | Path, *, keep: int | None = None, keep_every: int | None = None
) -> OrbaxStore:
    """The checkpoints under `directory`, which is made by the first save.

    keep: how many of the latest steps stay on disk; None keeps all. keep_every: steps that are
    multiples of it stay too. With several ranks this is collective and comes after
    torch.distributed is initialised. Reading changes nothing on disk; the first save deletes what
    killed saves left behind, so only one run saves there.
    """
    return OrbaxStore(directory, keep=keep, keep_every=keep_every)

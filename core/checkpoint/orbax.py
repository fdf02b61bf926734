"""Steps in orbax's format, complete or absent: an ordinary orbax checkpoint, which plain orbax
restores without this code.

Rank 0 runs orbax as catalogue and commit layer; every rank writes its own shards. The ranks agree
through torch.distributed alone. Orbax and jax are imported at the first save, in its thread, on
rank 0 only; reading needs neither. Forking a process after that is unsafe: start data-loader
workers before, or by spawn.
"""

import contextlib
import threading
from typing import Any

from omnistep.core.checkpoint.arrays import write_shards
from omnistep.core.checkpoint.place import Bucket, Place
from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.saving import Leaves
from omnistep.core.checkpoint.shards import Shard
from omnistep.core.checkpoint.stored import checksums


class OrbaxWriter:
    """Writes the steps of one directory."""

    def __init__(self, directory: Place, ranks: Ranks, keep: int | None, keep_every: int | None):
        self._directory, self._ranks = directory, ranks
        self._keep, self._keep_every = keep, keep_every
        self._catalogue: Any = None
        self._telling = threading.Lock()
        """Held by the one thread of rank 0 that talks to the other ranks."""
        self._over = False

    def commit(self, step: int, leaves: Leaves) -> None:
        if self._ranks.rank == 0:
            self._lead(step, leaves)
        else:
            self._follow([leaf for leaf in leaves.values() if isinstance(leaf, Shard)])

    def close(self) -> None:
        catalogue, self._catalogue = self._catalogue, None
        if catalogue is not None:
            with contextlib.suppress(Exception):  # it repeats the failure of the save, if any
                catalogue.close()

    def _lead(self, step: int, leaves: Leaves) -> None:
        """Rank 0: orbax saves, calling `_write` for the arrays; then all hear how it went."""
        self._over = False
        try:
            if self._catalogue is None:
                self._catalogue = _open_catalogue(
                    self._directory, self._keep, self._keep_every, self._write
                )
            self._catalogue.save(step, _nested(leaves), checksums(leaves))
        except Exception as error:
            self.close()  # it counts the failed step; the next one cleans up after it
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


def _open_catalogue(directory: Place, *rest: Any) -> Any:
    """Of its kind. Imports jax and orbax."""
    if isinstance(directory, Bucket):
        from omnistep.core.checkpoint.bucket import BucketCatalogue

        return BucketCatalogue(directory, *rest)
    from omnistep.core.checkpoint.catalogue import Catalogue

    return Catalogue(str(directory), *rest)


def _nested(leaves: Leaves) -> dict[str, Any]:
    """Nested dicts by the parts of the dotted names: what orbax takes for a tree."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree

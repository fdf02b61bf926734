"""Orbax's part of a save: step directories, tree metadata, merge, atomic rename, retention.

Importing this module imports jax and orbax (about a second, 140 MB): do it late, on rank 0 only.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Orbax needs a jax backend for its bookkeeping only: it must not take the accelerator's memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import orbax.checkpoint as ocp
from orbax.checkpoint import future, type_handlers

from omnistep.core.checkpoint.shards import Shard
from omnistep.core.checkpoint.stored import open_stored

ITEM = "state"
"""The one item of every step; its directory holds the arrays."""

THREADS = os.path.join("orbax", "checkpoint", "_src", "futures", "future.py")
"""Where orbax runs its threads."""

RETIRED = "retired"
"""Where a step is moved that need not be kept, before it is deleted: a kill in the middle of that
leaves nothing that looks like a step."""


# Orbax does not wait for all its threads when one has failed. What another meets it keeps, and logs
# with a traceback, also when `_silent` is over: so these logs are dropped for good.
logging.getLogger("absl").addFilter(lambda record: not record.pathname.endswith(THREADS))


class ShardHandler(type_handlers.NumpyHandler):
    """Hands the step's temporary directory to `write`, in which every rank writes its shards.

    The rest is inherited: the files are what orbax itself writes for numpy arrays.
    """

    def __init__(self, write: Callable[[str, list[Shard]], None]):
        super().__init__()
        self._write = write

    async def serialize(
        self, values: Sequence[Shard], infos: Sequence[Any], args: Any = None
    ) -> list[Any]:
        async def background() -> None:
            for info in infos:
                await info.await_path_creation()
            await asyncio.to_thread(self._write, str(infos[0].parent_dir), list(values))

        return [future.CommitFutureAwaitingContractedSignals(background(), name="shards")]


def check_before_commit(
    handler: ocp.PyTreeCheckpointHandler, check: Callable[[Path], object]
) -> ocp.PyTreeCheckpointHandler:
    """Has the directory of a step's arrays checked before the step is committed.

    Orbax merges what the databases of the ranks hold; where the directory cannot be listed it finds
    none, merges nothing, and commits. (Of a subclass, orbax would not know the arguments.)
    """
    merge = handler.finalize

    def finalize(directory: Any) -> None:
        merge(directory)
        check(Path(directory))

    handler.finalize = finalize
    return handler


class Catalogue:
    """The committed steps of one directory, as orbax keeps them.

    Opening one deletes what killed saves left behind. Saves are synchronous: the store runs
    them in a thread of its own.
    """

    def __init__(
        self,
        directory: str,
        keep: int | None,
        keep_every: int | None,
        write: Callable[[str, list[Shard]], None],
        check: Callable[[Path], object] = open_stored,
    ):
        """check: of the directory of a step's arrays, raises where one cannot be opened."""
        registry = type_handlers.create_type_handler_registry(
            (int, type_handlers.ScalarHandler()),
            (str, type_handlers.StringHandler()),
            (Shard, ShardHandler(write)),
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            todelete_subdir=RETIRED,
            cleanup_tmp_directories=True,
            # orbax's own asynchrony hangs for minutes on a directory that cannot be made
            enable_async_checkpointing=False,
        )
        self._retired = os.path.join(directory, RETIRED)
        self._delete_retired()
        with _silent():
            handler = ocp.PyTreeCheckpointHandler(
                use_zarr3=True, use_ocdbt=True, type_handler_registry=registry
            )
            self._manager = ocp.CheckpointManager(
                directory,
                item_handlers={ITEM: check_before_commit(handler, check)},
                options=options,
            )

    def save(self, step: int, tree: Mapping[str, Any], custom: Mapping[str, Any]) -> None:
        """Writes nested dicts of Shard, int and str leaves; committed when it returns."""
        items = {ITEM: ocp.args.PyTreeSave(dict(tree), custom_metadata=dict(custom))}
        with _silent():
            if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
                raise RuntimeError(f"orbax declined to save step {step}")
            self._manager.wait_until_finished()
        self._delete_retired()

    def close(self) -> None:
        with _silent():
            self._manager.close()

    def _delete_retired(self) -> None:
        # the save is committed: what cannot be deleted now is the next one's to delete
        shutil.rmtree(self._retired, ignore_errors=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Orbax logs every failure several times, with tracebacks, and raises it; once is enough."""
    logger = logging.getLogger("absl")

    def by_others(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger.addFilter(by_others)
    try:
        yield
    finally:
        logger.removeFilter(by_others)

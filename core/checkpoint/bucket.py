"""The saves of a directory in a bucket: orbax's files, put together without orbax's file system.

Orbax 0.12.8 would need gcsfs and Google's client for gs://, and refuses s3://. So it saves the tree
into a local scratch directory, all but the arrays: these every rank writes straight into the
bucket. The files of the scratch directory follow, the ranks' databases are merged into that of the
step, and `commit_success.txt` commits it. What results is the checkpoint orbax would have written.

Importing this module imports jax and orbax: do it late, on rank 0 only.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from omnistep.core.checkpoint.catalogue import ITEM, Catalogue
from omnistep.core.checkpoint.place import (
    BUCKETS,
    COMMITTED,
    DAMAGED,
    Bucket,
    committed,
    kvstore,
    outdated,
)
from omnistep.core.checkpoint.shards import Shard
from omnistep.core.checkpoint.stored import open_stored


class BucketCatalogue:
    """The committed steps of one directory in a bucket; Catalogue's twin.

    Opening one deletes what killed saves left behind.
    """

    def __init__(
        self,
        directory: Bucket,
        keep: int | None,
        keep_every: int | None,
        write: Callable[[str, list[Shard]], None],
    ):
        self._directory, self._keep, self._keep_every = directory, keep, keep_every
        self._write = write
        for step in _leftovers(directory.names()):
            (directory / step).delete_all()

    def save(self, step: int, tree: Mapping[str, Any], custom: Mapping[str, Any]) -> None:
        """Writes nested dicts of Shard, int and str leaves; committed when it returns."""
        place = self._directory / str(step)
        arrays = place / ITEM
        place.delete_all()  # of an earlier try of this step, or a damaged one
        with tempfile.TemporaryDirectory(prefix="omnistep-") as scratch:
            catalogue = Catalogue(
                scratch,
                None,
                None,
                lambda _, shards: self._write(str(arrays), shards),
                check=lambda _: None,  # they are not there
            )
            try:
                catalogue.save(step, tree, custom)
            finally:
                catalogue.close()
            _upload(Path(scratch) / str(step), place)
        _merge(arrays)
        open_stored(arrays)
        place.write(COMMITTED, f"committed: {place}\n".encode())
        for old in outdated(committed(self._directory), self._keep, self._keep_every):
            (self._directory / str(old)).delete_all()

    def close(self) -> None:
        """Nothing is held between saves."""


def _leftovers(names: Sequence[str]) -> list[str]:
    """The steps with neither of the marks that end them."""
    steps = {name.split("/")[0] for name in names}
    held = set(names)
    return [
        step
        for step in sorted(steps)
        if step.isdecimal() and not held & {f"{step}/{COMMITTED}", f"{step}/{DAMAGED}"}
    ]


def _upload(source: Path, target: Bucket) -> None:
    """Copies the small files that orbax made, except its own mark of the commit."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and name != COMMITTED:
            target.write(name, path.read_bytes())


def _merge(arrays: Bucket) -> None:
    """Enters what the ranks' databases hold into the step's own, which points to their data."""
    heads = {name.split("/")[0] for name in arrays.names()}
    parts = [f"{arrays}/{head}" for head in sorted(heads) if head.startswith("ocdbt.process_torch")]
    context = ts.Context(BUCKETS)  # one for all: only within it can entries be copied

    def database(directory: str) -> ts.KvStore:
        spec = {"driver": "ocdbt", "base": kvstore(directory)}
        return ts.KvStore.open(spec, context=context).result()

    transaction = ts.Transaction(atomic=True)
    whole = database(str(arrays)).with_transaction(transaction)
    for part in parts:
        database(part).experimental_copy_range_to(whole).result()
    transaction.commit_sync()

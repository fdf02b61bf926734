"""How a directory of checkpoints is opened."""

from pathlib import Path
from typing import Literal

from omnistep.core.checkpoint.dcp_weights import METADATA
from omnistep.core.checkpoint.directory import DirectoryStore, Stored, Writer
from omnistep.core.checkpoint.orbax import OrbaxWriter
from omnistep.core.checkpoint.place import Bucket, Place, committed, open_place
from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.ranks import Ranks, all_ranks
from omnistep.core.checkpoint.stored import open_orbax

Format = Literal["orbax", "dcp"]


def open_store(
    directory: str | Path | Bucket,
    *,
    format: Format | None = None,
    keep: int | None = None,
    keep_every: int | None = None,
) -> DirectoryStore:
    """The checkpoints under `directory`, a path or URL (gs://, s3://), made by the first save.

    format: of the files, which the methods do not show; by default what the directory holds, orbax
    where it is empty. keep: how many of the latest steps stay on disk; None keeps all. keep_every:
    steps that are multiples of it stay too. With several ranks this is collective and comes after
    torch.distributed is initialised. Reading changes nothing on disk; the first save deletes what
    killed saves left behind, so only one run saves there.

    Raises CheckpointError where the directory holds another format than `format`, or cannot.
    """
    for name, value in (("keep", keep), ("keep_every", keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it is a number of steps, at least 1, or None")
    place, ranks = open_place(str(directory)), all_ranks()
    if isinstance(place, Bucket) and format == "dcp":
        raise CheckpointError(f"{directory}: a bucket takes checkpoints of the format orbax alone")
    held = ranks.ask_first(lambda: held_format(place))
    if held and format and format != held:
        raise CheckpointError(
            f"{directory} holds checkpoints of the format {held}; {format} cannot be saved beside "
            f"them: choose another directory, or the format {held}"
        )
    if isinstance(place, Path) and (held or format) == "dcp":
        writer = _dcp_writer(place, ranks, keep, keep_every)
    else:
        writer = OrbaxWriter(place, ranks, keep, keep_every)
    return DirectoryStore(place, ranks, writer, _open_step)


def held_format(directory: Place) -> Format | None:
    """Of the newest local step that has one; None where there is none."""
    if isinstance(directory, Bucket):
        return None
    formats = (step_format(directory / str(step)) for step in reversed(committed(directory)))
    return next((format for format in formats if format), None)


def step_format(place: Path) -> Format | None:
    """By a step's files, of which some may be missing; None where it has those of no format."""
    names = {path.name for path in place.iterdir()}
    if METADATA in names or any(name.endswith(".distcp") for name in names):
        return "dcp"
    return "orbax" if {"state", "_CHECKPOINT_METADATA"} & names else None


# Importing torch.distributed.checkpoint takes half a second: only who needs it does so.


def _dcp_writer(place: Path, ranks: Ranks, keep: int | None, keep_every: int | None) -> Writer:
    from omnistep.core.checkpoint.dcp import DcpWriter

    return DcpWriter(place, ranks, keep, keep_every)


def _open_step(place: Place) -> Stored:
    if isinstance(place, Bucket) or step_format(place) != "dcp":
        return open_orbax(place)
    from omnistep.core.checkpoint.dcp import open_dcp

    return open_dcp(place)

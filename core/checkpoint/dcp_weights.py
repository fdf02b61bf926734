"""A torch.distributed.checkpoint as named tensors, read one at a time, on one rank.

Read by torch's own reader, without a process group: whatever torch can write, it reads. (dcp.py
reads what a store may have written, in part, and checks it.)
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.dcp_metadata import read_metadata
from omnistep.core.checkpoint.safetensors import nearest

METADATA = ".metadata"
METADATA_SUM = ".metadata.crc32"
"""Written by our own stores beside it."""
NAMES_SHOWN = 5


@frozen(eq=False)
class DcpWeights:
    """The tensors whose names begin with `prefix`, by the rest of their names."""

    path: Path
    prefix: str
    reader: Any
    metadata: Any
    """torch's Metadata."""

    def names(self) -> list[str]:
        """Of the tensors; other values are not listed."""
        held = self.metadata.state_dict_metadata
        names = [name for name in held if hasattr(held[name], "properties")]
        return [n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where there is no such tensor."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).properties.dtype

    def _entry(self, name: str) -> Any:
        entry = self.metadata.state_dict_metadata.get(self.prefix + name)
        if not hasattr(entry, "properties"):
            near = nearest(self.prefix + name, self.metadata.state_dict_metadata)
            raise ValueError(f"{self.path} holds no tensor {self.prefix + name!r}{near}")
        return entry

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """The tensor, or the part of it that `slices` cut; all of it is read. On the CPU."""
        from torch.distributed.checkpoint import DefaultLoadPlanner

        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({self.prefix + name: whole}, self.metadata, True)
        try:
            self.reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever the reader, zipfile and pickle raise
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ValueError(
                f"{self.path}: tensor {self.prefix + name!r} cannot be read: {reason}"
            ) from error
        return whole if slices is None else whole[tuple(slices)]


def open_dcp_weights(path: str | Path, prefix: str = "") -> DcpWeights:
    """Opens the directory; reads no tensor. Raises ValueError or FileNotFoundError where its
    metadata cannot be read, or a file is missing."""
    from torch.distributed.checkpoint import FileSystemReader

    path = Path(path)
    reader = FileSystemReader(path)
    try:
        metadata = read_metadata(path / METADATA)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        files = {str(info.relative_path) for info in reader.storage_data.values()}
    except Exception as error:  # an unreadable pickle raises anything
        raise ValueError(
            f"{path / METADATA} is no metadata of a torch.distributed.checkpoint: "
            f"{type(error).__name__}: {error}"
        ) from error
    if missing := sorted(file for file in files if not (path / file).is_file()):
        raise FileNotFoundError(
            f"{path} is made of {len(files)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:NAMES_SHOWN])}{', …' * (len(missing) > NAMES_SHOWN)}"
        )
    return DcpWeights(path, prefix, reader, metadata)


def common_prefix(held: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before the `wanted` names among the names that are `held`: nothing, or
    something that ends with a dot. Where not all are there, that of most.

    Raises ValueError where they are complete behind several prefixes.
    """
    names, found = set(wanted), Counter[str]()
    for name in held:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                found["".join(f"{part}." for part in parts[:i])] += 1
    complete = sorted(prefix for prefix, count in found.items() if count == len(names))
    if len(complete) > 1:
        raise ValueError(f"the model's tensors are there behind each of the prefixes {complete}")
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")

"""Reading one step in orbax's format: what it holds, and the values.

Needs tensorstore and json only. Arrays are guarded by crc32c, texts by a crc32 in the metadata.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts
import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.arrays import open_arrays, read_array, unreadable
from omnistep.core.checkpoint.place import Place, read_file
from omnistep.core.checkpoint.shards import torch_dtype


def checksums(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What a save adds to the tree's metadata, which orbax keeps in JSON files without a sum: one
    of the leaves' names and kinds, one of each text."""
    texts = {name: zlib.crc32(v.encode()) for name, v in leaves.items() if isinstance(v, str)}
    kinds = {name: _kind(leaf) for name, leaf in leaves.items()}
    return {"crc32": texts, "names": _names_checksum(kinds)}


def _kind(leaf: Any) -> str:
    """As orbax's metadata calls it."""
    return {str: "string", int: "scalar"}.get(type(leaf), "np.ndarray")


def _names_checksum(kinds: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(sorted(kinds.items())).encode())


@frozen(eq=False)
class OrbaxStep:
    """One step's leaves: arrays opened but not read, texts, and which of the arrays are ints."""

    directory: str
    arrays: Mapping[str, ts.TensorStore]
    texts: Mapping[str, str]
    ints: frozenset[str]

    def leaves(self) -> dict[str, Any]:
        """By name: meta tensors, "" for texts, 0 for ints."""
        meta = {
            name: torch.empty(array.shape, dtype=torch_dtype(array.dtype.name), device="meta")
            for name, array in self.arrays.items()
            if name not in self.ints
        }
        return meta | dict.fromkeys(self.ints, 0) | dict.fromkeys(self.texts, "")

    def value(self, name: str) -> str | int:
        if name in self.texts:
            return self.texts[name]
        return int(read_array(self.arrays[name], name, self.directory, ()))

    def part(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Only the chunks that it touches are read."""
        return read_array(self.arrays[name], name, self.directory, slices)


def open_orbax(place: Place) -> OrbaxStep:
    """Opens a committed step. Raises DamagedError, naming what cannot be read."""
    return open_stored(place / "state")


def open_stored(place: Place) -> OrbaxStep:
    """Opens the directory of a step's arrays."""
    directory = str(place)
    metadata = _read_json(directory, "_METADATA")
    try:
        kinds = {
            ".".join(str(part["key"]) for part in entry["key_metadata"]): str(
                entry["value_metadata"]["value_type"]
            )
            for entry in metadata["tree_metadata"].values()
        }
        sums = metadata.get("custom_metadata") or {}  # plain orbax writes none
        if sums.get("names", expected := _names_checksum(kinds)) != expected:
            raise ValueError("the names of its leaves are altered")
        text_sums = dict(sums.get("crc32", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable("_METADATA", directory, error) from error
    texts = [name for name, kind in kinds.items() if kind == "string"]
    return OrbaxStep(
        directory,
        open_arrays(directory, [name for name in kinds if kinds[name] != "string"]),
        _read_texts(directory, texts, text_sums) if texts else {},
        frozenset(name for name, kind in kinds.items() if kind == "scalar"),
    )


def _read_json(directory: str, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(read_file(directory, name)))
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(name, directory, error) from error


def _read_texts(directory: str, names: list[str], sums: Mapping[str, int]) -> dict[str, str]:
    held = _read_json(directory, "_strings.json")
    for name in names:
        text, checksum = held.get(name), sums.get(name)  # no sum: plain orbax wrote it
        if not isinstance(text, str) or checksum not in (None, zlib.crc32(text.encode())):
            raise unreadable(name, directory, ValueError("its text is missing or altered"))
    return {name: held[name] for name in names}

"""Reading one step: what it holds, whether that fits what is asked for, and the values.

Needs tensorstore and json only. Arrays are guarded by crc32c, texts by a crc32 in the metadata.
"""

import difflib
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorstore as ts
import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.place import Place, read_file
from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.shards import (
    as_dtensor,
    open_arrays,
    read_array,
    torch_dtype,
    unreadable,
)

LEAVES_IN_FLIGHT = 4
"""How many leaves are read at once: bounds the memory beyond the restored state itself."""
MISFITS_SHOWN = 8


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
class Stored:
    """One step's leaves: arrays opened but not read, texts, and which of the arrays are ints."""

    directory: str
    arrays: Mapping[str, ts.TensorStore]
    texts: Mapping[str, str]
    ints: frozenset[str]

    def describe(self, name: str) -> str:
        """`float32[4, 8]`, `str`, `int`; or that there is no such leaf, and the nearest one."""
        if name in self.texts:
            return "str"
        if name in self.ints:
            return "int"
        if name in self.arrays:
            return f"{self.arrays[name].dtype.name}{list(self.arrays[name].shape)}"
        near = difflib.get_close_matches(name, [*self.arrays, *self.texts], n=1)
        return "nothing" + "".join(f" (the nearest name is {n}: {self.describe(n)})" for n in near)

    def leaves(self) -> dict[str, Any]:
        """By name: meta tensors, "" for texts, 0 for ints."""
        meta = {
            name: torch.empty(array.shape, dtype=torch_dtype(array.dtype.name), device="meta")
            for name, array in self.arrays.items()
            if name not in self.ints
        }
        return meta | dict.fromkeys(self.ints, 0) | dict.fromkeys(self.texts, "")

    def read(self, wanted: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
        """The values of the `wanted` names, each as its example asks; meta tensors on `device`.

        Raises CheckpointError naming all that is missing or differs before anything is read.
        """
        self._check(wanted)

        def read(name: str, like: Any) -> Any:
            if isinstance(like, str):
                return self.texts[name]
            if isinstance(like, Tensor):
                return _place(
                    read_array(self.arrays[name], name, self.directory, like), like, device
                )
            return int(read_array(self.arrays[name], name, self.directory, None))

        with ThreadPoolExecutor(LEAVES_IN_FLIGHT) as pool:
            return dict(zip(wanted, pool.map(read, wanted, wanted.values()), strict=True))

    def _check(self, wanted: Mapping[str, Any]) -> None:
        pairs = [(name, _asked(name, leaf), self.describe(name)) for name, leaf in wanted.items()]
        misfits = [f"{name}: asked for {a}, stored is {s}" for name, a, s in pairs if a != s]
        if misfits:
            more = len(misfits) - MISFITS_SHOWN
            shown = misfits[:MISFITS_SHOWN] + [f"… and {more} more"] * (more > 0)
            raise CheckpointError(
                f"the checkpoint {self.directory} does not hold what is to be restored:\n  "
                + "\n  ".join(shown)
            )


def open_stored(place: Place) -> Stored:
    """Opens the arrays' directory of a committed step. Raises CheckpointError where damaged."""
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
    return Stored(
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


def _asked(name: str, leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    if isinstance(leaf, str | int) and not isinstance(leaf, bool):
        return "str" if isinstance(leaf, str) else "int"
    raise ValueError(
        f"{name} is a {type(leaf).__name__}; a tensor, an int or a str can be restored"
    )


def _place(local: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    if (whole := as_dtensor(like)) is None:
        return local.to(device if like.device.type == "meta" else like.device)
    return type(whole).from_local(
        local.to(whole.device_mesh.device_type),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )

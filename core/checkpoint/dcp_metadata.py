"""The `.metadata` of a torch.distributed.checkpoint, read without running it.

torch writes it as a pickle, and a pickle may name any function to be called. This one may only
name what torch's own writer puts there (torch/distributed/checkpoint/metadata.py, filesystem.py).
"""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    _METADATA: {
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
"""By module. Beside these: torch's dtypes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def load_metadata(content: bytes) -> Any:
    """Reads torch's Metadata (torch.distributed.checkpoint.metadata) from the bytes of `.metadata`;
    of whatever else they say nothing happens.

    Raises pickle.UnpicklingError where they name something else, ValueError where a tensor's file
    would lie outside the checkpoint's directory; bytes that were altered raise nearly anything.
    """
    from torch.distributed.checkpoint.metadata import Metadata  # takes seconds

    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    for info in (metadata.storage_data or {}).values():
        path = PurePosixPath(str(info.relative_path))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names {str(path)!r}, outside of the checkpoint")
    return metadata


def read_metadata(path: Path) -> Any:
    """Reads a file `.metadata`. Raises as `load_metadata`, and OSError."""
    return load_metadata(path.read_bytes())

"""Checkpoints: the CheckpointStore protocol, orbax and torch behind it, safetensors in and out."""

from omnistep.core.checkpoint.protocol import CheckpointError, CheckpointStore, DamagedError, Saved
from omnistep.core.checkpoint.store import open_store

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "DamagedError",
    "Saved",
    "open_store",
]

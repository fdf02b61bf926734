"""Checkpoints: the CheckpointStore protocol, orbax behind it, safetensors in and out."""

from omnistep.core.checkpoint.orbax import OrbaxStore
from omnistep.core.checkpoint.shards import CheckpointError
from omnistep.core.checkpoint.store import CheckpointStore, open_store

__all__ = ["CheckpointError", "CheckpointStore", "OrbaxStore", "open_store"]

"""One rank of a store on two. `main([DIRECTORY, [URL,] RANK])`.

Saves DTensors in many placements, restores them in others, and fails on one rank on purpose: in
DIRECTORY/<format> of each format, or in the bucket under URL.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import omnistep.core.checkpoint.orbax as orbax
from omnistep.core.checkpoint import dcp
from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.store import Format, open_store
from omnistep.core.tree import Tree

WRITES: dict[str, tuple[Any, str]] = {
    "orbax": (orbax, "write_shards"),
    "dcp": (dcp.FileSystemWriter, "write_data"),
}
"""The function that writes a rank's arrays, for tests in which it fails."""
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
SHAPES = {"even": (4, 6), "uneven": (5, 3), "one": (1, 1), "large": (1026, 2050)}


def whole_state(scale: int) -> dict[str, torch.Tensor]:
    return {
        f"{placement}_{shape}": torch.arange(n * m, dtype=torch.float32).reshape(n, m) * scale
        for placement in PLACEMENTS
        for shape, (n, m) in SHAPES.items()
    }


def placed(state: dict[str, torch.Tensor], mesh: DeviceMesh, shift: int = 0) -> Tree:
    kinds = list(PLACEMENTS)
    chosen = {n: kinds[(kinds.index(n.split("_")[0]) + shift) % len(kinds)] for n in state}
    return {n: distribute_tensor(t, mesh, [PLACEMENTS[chosen[n]]]) for n, t in state.items()}


@contextlib.contextmanager
def texts_that_fail_while_arrays_are_written(rank: int) -> Iterator[None]:
    """On rank 0 orbax fails while the ranks write arrays, which takes a while and fails too."""
    with pytest.MonkeyPatch.context() as patch:

        def slowly(*_: object) -> None:
            time.sleep(0.5)
            raise OSError("nor arrays")

        patch.setattr(orbax, "write_shards", slowly)
        if rank == 0:
            from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals
            from orbax.checkpoint.type_handlers import StringHandler

            async def fail() -> None:
                raise OSError("no texts today")

            async def serialize(*_: object, **__: object) -> list[object]:
                return [CommitFutureAwaitingContractedSignals(fail(), name="texts")]

            patch.setattr(StringHandler, "serialize", serialize)
        yield


def main(argv: list[str]) -> None:
    directory, places, rank = Path(argv[0]), argv[1:-1], int(argv[-1])
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    for format in get_args(Format) if not places else ():
        run(directory / format, format, mesh)
    for place in places:
        run(place, "orbax", mesh)
    assert (rank == 0) == ("jax" in sys.modules)
    dist.destroy_process_group()


def run(place: str | Path, format: Format, mesh: DeviceMesh) -> None:
    store, rank = open_store(place, format=format), dist.get_rank()
    assert store.latest() is None
    saved = {"params": placed(whole_state(1), mesh), "plain": torch.arange(7), "data": "{}", "n": 3}
    store.save(1, saved)
    saved["params"]["rows_even"].to_local().zero_()
    assert store.latest() == 1

    abstract = {
        "params": placed({n: torch.zeros_like(t) for n, t in whole_state(1).items()}, mesh, 1),
        "plain": torch.empty(7, dtype=torch.int64, device="meta"),
        "data": "",
        "n": 0,
    }
    restored = store.restore(abstract)
    for name, tensor in whole_state(1).items():
        leaf = restored["params"][name]
        assert isinstance(leaf, DTensor)
        assert leaf.placements == abstract["params"][name].placements
        assert torch.equal(leaf.full_tensor(), tensor), name
    assert torch.equal(restored["plain"], torch.arange(7))
    assert (restored["data"], restored["n"]) == ("{}", 3)

    writes = WRITES[format]
    written = getattr(*writes)

    def fails_on_one(*args: object) -> object:
        if rank == 1:
            raise OSError("no space left")
        return written(*args)

    setattr(*writes, fails_on_one)
    store.save(2, saved)
    with pytest.raises(CheckpointError, match="rank 1: no space left"):
        store.wait()
    setattr(*writes, written)
    assert store.latest() == 1
    if format == "orbax" and "gs:" not in str(place) and "s3:" not in str(place):
        with texts_that_fail_while_arrays_are_written(rank):
            store.save(2, saved)
            with pytest.raises(CheckpointError, match="no texts today"):
                store.wait()
        assert store.latest() == 1
    store.save(2, saved)
    assert store.latest() == 2
    store.close()

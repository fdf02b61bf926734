"""Orbax's part of a store; what every store promises is in test_store_contract.py."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from omnistep.core.checkpoint import CheckpointError, CheckpointStore, open_store
from omnistep.core.checkpoint.shards import Streamed, chunk_shape, shard_offsets
from tests.core.checkpoint_states import assert_same_bits, folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with contextlib.closing(open_store(tmp_path)) as opened:
        yield opened


def test_a_step_that_is_half_deleted_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting is cut off at each of its files in turn, and caught up with by the next save."""
    unlink, left = os.unlink, 0

    def until_cut_off(path: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("cut off")
        unlink(path, **options)

    with contextlib.closing(open_store(tmp_path, keep=1)) as store:
        for step in range(1, 10):
            left = step - 2
            monkeypatch.setattr(os, "unlink", until_cut_off)
            store.save(step, {"a": torch.arange(step)})
            with contextlib.suppress(CheckpointError):
                store.wait()
            monkeypatch.undo()
            for there in store.steps():
                assert torch.equal(
                    store.restore(store.stored(there), there)["a"], torch.arange(there)
                )
            assert store.latest() == step
        store.save(10, {"a": torch.arange(10)})
        assert store.steps() == [10]
        assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_a_save_that_lost_its_arrays_is_not_committed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory could not be listed when the ranks' databases were to be merged."""
    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path()), "glob", lambda *_: iter(()))
        store.save(1, {"a": torch.arange(3)})
        with pytest.raises(CheckpointError, match="'a' in the checkpoint"):
            store.wait()
    assert store.steps() == []
    store.save(1, {"a": torch.arange(3)})
    assert store.steps() == [1]


def test_an_altered_name_is_no_other_leaf(store: CheckpointStore) -> None:
    """Of two leaves of one shape, one would else be restored as the other."""
    store.save(1, {"w": torch.ones(2), "v": torch.zeros(2)})
    store.wait()
    (metadata,) = folder(store).rglob("state/_METADATA")
    held = json.loads(metadata.read_text())
    for entry in held["tree_metadata"].values():
        for part in entry["key_metadata"]:
            part["key"] = {"w": "u"}.get(part["key"], part["key"])
    metadata.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match="the names of its leaves are altered"):
        store.restore(store.stored(1))


def test_an_altered_text_is_named(store: CheckpointStore) -> None:
    store.save(1, {"position": json.dumps({"sample": 1234}), "w": torch.ones(2)})
    store.wait()
    (texts,) = folder(store).rglob("_strings.json")
    texts.write_text(texts.read_text().replace("1234", "1235"))
    with pytest.raises(CheckpointError, match=r"'position' in .* is damaged"):
        store.restore({"position": ""})


def test_plain_orbax_restores_it(store: CheckpointStore) -> None:
    import numpy as np
    import orbax.checkpoint as ocp

    store.save(5, {"a": {"w": torch.ones(2, 3).bfloat16(), "n": 4}, "list": ["x", torch.arange(3)]})
    store.wait()
    with ocp.CheckpointManager(folder(store), item_names=("state",)) as manager:
        assert manager.latest_step() == 5
        tree = manager.restore(5, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    assert tree["a"]["n"] == 4
    assert tree["a"]["w"].dtype == "bfloat16"
    assert np.array_equal(tree["a"]["w"].astype(np.float32), np.ones((2, 3)))
    assert tree["list"]["0"] == "x"
    assert np.array_equal(tree["list"]["1"], np.arange(3))


SCRIPT = """
import sys
from omnistep.core.checkpoint import open_store
store = open_store(sys.argv[1])
assert store.restore({"n": 0}) == {"n": 1}
slow = {"jax", "orbax", "torch.distributed.tensor", "torch.distributed.checkpoint"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


@pytest.mark.slow
def test_reading_imports_neither_jax_nor_dcp(store: CheckpointStore) -> None:
    store.save(1, {"n": 1})
    store.wait()
    subprocess.run([sys.executable, "-c", SCRIPT, folder(store)], check=True, timeout=60)


@settings(max_examples=200, deadline=None)
@given(
    shape=some.lists(some.integers(0, 40), max_size=3),
    cuts=some.lists(some.lists(some.integers(1, 5), max_size=2), min_size=3, max_size=3),
    limit=some.integers(1, 400),
)
def test_every_shard_lies_on_the_chunk_grid(
    shape: list[int], cuts: list[list[int]], limit: int
) -> None:
    parts = cuts[: len(shape)]
    chunk = chunk_shape(shape, parts, itemsize=4, limit=limit)
    for size, cut, step in zip(shape, parts, chunk, strict=True):
        pieces = [torch.arange(size)]
        for n in cut:
            pieces = [part for piece in pieces for part in piece.chunk(n)]
        assert shard_offsets(size, cut) == [int(p[0]) for p in pieces if len(p)]
        assert all(offset % step == 0 for offset in shard_offsets(size, cut))
        assert 1 <= step <= max(1, size)
    assert torch.Size(chunk).numel() * 4 <= max(4, limit)


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("hf://user/run", {}, "local"),
        ("run", {"keep": 0}, "keep is 0; .* at least 1"),
        ("run", {"keep_every": 0}, "keep_every is 0; .* at least 1"),
    ],
)
def test_impossible_arguments_are_refused(
    directory: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(directory, **options)


def test_a_leaf_is_written_block_by_block(store: CheckpointStore) -> None:
    """Never whole: the next block is asked for when the one before is written."""
    whole = torch.arange(3 * 700 * 1000, dtype=torch.float32).reshape(3, 700, 1000)
    empty = Streamed((0, 2), torch.int32, lambda: ())

    def blocks() -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for layer in range(3):
            for row in (0, 300):
                block = whole[layer : layer + 1, row : row + 400 - 100 * (row == 0)].clone()
                yield (layer, row, 0), block
                block.fill_(-1)

    leaf = Streamed((3, 700, 1000), torch.float32, blocks)
    turned = Streamed((4, 2), torch.bfloat16, lambda: [((0, 0), torch.ones(2, 4).bfloat16().T)])
    store.save(1, {"w": leaf, "empty": empty, "turned": turned, "n": 5})
    restored = store.restore(store.stored(1))
    expected = {"empty": torch.empty(0, 2).int(), "turned": torch.ones(4, 2).bfloat16(), "n": 5}
    assert_same_bits(restored, {"w": whole, **expected})
    assert store.saved[-1].size == whole.nbytes + 16


def test_blocks_that_share_a_chunk_are_not_stored_twice(
    tmp_path: Path, store: CheckpointStore
) -> None:
    rows = 256  # of 64 kB: as many as lie in four chunks
    leaf = Streamed(
        (rows, 1 << 14),
        torch.float32,
        lambda: (((i, 0), torch.full((1, 1 << 14), float(i))) for i in range(rows)),
    )
    store.save(1, {"w": leaf})
    store.wait()
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written < 1.05 * rows * (1 << 16)


def test_a_leaf_whose_blocks_fail_is_not_saved(store: CheckpointStore) -> None:
    def blocks() -> Iterator[tuple[tuple[int, ...], Tensor]]:
        yield (0,), torch.ones(2)
        raise OSError("its source is gone")

    store.save(1, {"w": Streamed((4,), torch.float32, blocks)})
    with pytest.raises(CheckpointError, match="its source is gone"):
        store.wait()
    assert store.steps() == []


@pytest.mark.slow
def test_the_snippet_of_the_docs_opens_a_checkpoint_in_jax(store: CheckpointStore) -> None:
    weights = {"w": torch.arange(12.0).reshape(4, 3), "e": torch.ones(6, 2).bfloat16()}
    store.save(3, {"state": {"params": weights, "step": torch.tensor(3)}, "data": "{}", "n": 1})
    store.wait()
    docs = (Path(__file__).parent.parent.parent / "docs/checkpoints.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    check = """
assert tree["data"] == "{}" and tree["state"]["step"] == 3
for name, shape, sum in (("w", (4, 3), 66), ("e", (6, 2), 12)):
    for values in (params[name], sharded[name]):
        assert values.shape == shape and float(values.astype("float32").sum()) == sum
    assert len(sharded[name].addressable_shards) == 2
    assert sharded[name].addressable_shards[0].data.shape == (shape[0] // 2, shape[1])
"""
    two = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", snippet + check, str(folder(store) / "3/state")]
    done = subprocess.run(command, env=two, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

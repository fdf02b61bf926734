import contextlib
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from checkpoint_killed import state_of
from checkpoint_ranks import whole_state
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

import omnistep.core.checkpoint.orbax as orbax
from omnistep.core.checkpoint import CheckpointError, OrbaxStore, open_store
from omnistep.core.checkpoint.shards import Streamed, chunk_shape, shard_offsets
from omnistep.core.tree import Tree, leaves_with_names, pytree, tree_map

HERE = Path(__file__).parent
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytree
@attrs.frozen(eq=False)
class Moments:
    first: dict[str, Tensor]
    second: list[Tensor]
    absent: Tensor | None = None


@pytree
@attrs.frozen(eq=False)
class State:
    step: Tensor
    params: dict[str, Tensor]
    moments: Moments
    position: str
    saves: int


def folder(store: OrbaxStore) -> Path:
    assert isinstance(store.directory, Path)
    return store.directory


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    bytes_ = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bytes_.view(dtype).reshape(shape)


def example_state() -> State:
    torch.manual_seed(0)
    params = {str(dtype).split(".")[1]: random_bits(dtype, 3, 5) for dtype in DTYPES}
    params["strided"] = torch.randn(6, 4).T
    params["empty"] = torch.empty(0, 3)
    params["zeros"] = torch.zeros(2, 2)
    return State(
        step=torch.tensor(7),
        params=params,
        moments=Moments({"w": torch.randn(2)}, [torch.tensor(True), torch.randn(4).bfloat16()]),
        position='{"epoch": 1, "text": "ä\\n"}',
        saves=-3,
    )


def assert_same_bits(got: Tree, expected: Tree) -> None:
    got, expected = leaves_with_names(got), leaves_with_names(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        if not isinstance(leaf, Tensor):
            assert got[name] == leaf
            continue
        assert (got[name].dtype, got[name].shape) == (leaf.dtype, leaf.shape), name
        pair = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], leaf)]
        assert torch.equal(*pair), name


def abstract_of(state: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, state)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[OrbaxStore]:
    with contextlib.closing(open_store(tmp_path / "run" / "checkpoints")) as opened:
        yield opened


def test_every_dtype_and_structure_comes_back_bit_for_bit(store: OrbaxStore) -> None:
    state = example_state()
    assert store.latest() is None
    store.save(7, state)
    restored = store.restore(abstract_of(state))
    assert isinstance(restored, State)
    assert restored.moments.absent is None
    assert_same_bits(restored, state)
    # real tensors as examples do as well, and are not written to
    assert_same_bits(store.restore(state, 7), state)
    assert_same_bits(store.restore(store.stored()), leaves_with_names(state))


def test_buffers_may_be_overwritten_as_soon_as_save_returns(store: OrbaxStore) -> None:
    state = {"big": torch.zeros(4 << 20), "scalar": torch.tensor(0)}
    for step in (1, 2, 3):  # the copies of one save must not reach into another's either
        for tensor in state.values():
            tensor.fill_(step)
        store.save(step, state)
    state["big"].fill_(-1)
    store.save(4, {"big": torch.full((3,), 4, dtype=torch.int32)})  # another shape under the name
    for step in (1, 2, 3):
        expected = {"big": torch.full((4 << 20,), float(step)), "scalar": torch.tensor(step)}
        assert_same_bits(store.restore(abstract_of(state), step), expected)
    assert store.restore(store.stored(4))["big"].tolist() == [4, 4, 4]


def test_only_the_latest_steps_are_kept(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path, keep=2)) as store:
        for step in (1, 2, 10):
            store.save(step, {"n": step})
        assert store.steps() == [2, 10]
        assert store.latest() == 10
    with contextlib.closing(open_store(tmp_path, keep=2)) as store:  # also those of earlier runs
        store.save(11, {"n": 11})
        assert store.steps() == [10, 11]
        assert store.restore({"n": 0}, 10) == {"n": 10}


def test_multiples_are_kept_beside_the_latest(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path, keep=2, keep_every=10)) as store:
        for step in (5, 10, 15, 20, 25, 30, 35):
            store.save(step, {"n": step})
        assert store.steps() == [10, 20, 30, 35]


def test_a_step_set_aside_is_offered_no_more_and_can_be_saved_again(store: OrbaxStore) -> None:
    for n in (1, 2):
        store.save(7, {"n": n})
        place = Path(store.set_aside(7))
        assert (store.steps(), place.parent, place.is_dir()) == ([], folder(store), True)
        store.save(8 + n, {"n": n})
        assert store.steps() == [8 + n]
        assert place.is_dir()  # nor does the next save clean it away
        Path(store.set_aside(8 + n))
    store.save(7, {"n": 3})
    assert store.restore({"n": 0}) == {"n": 3}
    names = {path.name for path in folder(store).iterdir()}
    assert {"7", "7.damaged", "7.damaged1"} <= names


def test_a_save_tells_what_it_took(store: OrbaxStore) -> None:
    assert store.last_saved is None
    store.save(3, {"w": torch.ones(1000), "b": torch.ones(2, 5).bfloat16(), "n": 1, "t": "x"})
    store.wait()
    saved = store.last_saved
    assert saved is not None
    assert (saved.step, saved.size) == (3, 4020)
    assert 0 < saved.stall < saved.seconds < 60


def test_a_leaf_is_written_block_by_block(store: OrbaxStore) -> None:
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
    assert store.last_saved is not None
    assert store.last_saved.size == whole.nbytes + 16


def test_a_leaf_whose_blocks_fail_is_not_saved(store: OrbaxStore) -> None:
    def blocks() -> Iterator[tuple[tuple[int, ...], Tensor]]:
        yield (0,), torch.ones(2)
        raise OSError("its source is gone")

    store.save(1, {"w": Streamed((4,), torch.float32, blocks)})
    with pytest.raises(CheckpointError, match="its source is gone"):
        store.wait()
    assert store.steps() == []


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


def test_a_step_is_saved_once(store: OrbaxStore) -> None:
    store.save(1, {"n": 1})
    with pytest.raises(CheckpointError, match="step 1 is already saved in"):
        store.save(1, {"n": 2})
    assert store.restore({"n": 0}) == {"n": 1}


def test_a_failed_save_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    def save_fails(store: OrbaxStore, step: int) -> None:
        store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(orbax, "write_shards", fails)
            store.save(step, {"w": torch.zeros(3)})
            with pytest.raises(
                CheckpointError, match=f"saving step {step} to .*: the disk is gone"
            ):
                store.wait()

    with contextlib.closing(open_store(tmp_path, keep=2)) as store:
        store.save(1, {"w": torch.ones(3)})
        save_fails(store, 2)
        assert store.latest() == 1
        store.save(2, {"w": torch.full((3,), 2.0)})
        assert store.steps() == [1, 2]
        assert store.restore({"w": torch.empty(3)})["w"].tolist() == [2, 2, 2]
        save_fails(store, 3)
        store.save(4, {"w": torch.ones(3)})
        assert store.steps() == [2, 4]  # the failed step does not count among the kept
        assert sorted(path.name for path in folder(store).iterdir()) == ["2", "4"]


def test_a_save_that_lost_its_arrays_is_not_committed(
    store: OrbaxStore, monkeypatch: pytest.MonkeyPatch
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


def test_what_a_killed_save_left_is_ignored_then_deleted(store: OrbaxStore) -> None:
    (folder(store) / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        store.restore({"n": 0})
    store.save(1, {"n": 1})
    assert store.latest() == 1
    assert [path.name for path in folder(store).iterdir()] == ["1"]


def test_a_full_disk_is_an_error_of_wait(store: OrbaxStore) -> None:
    store.save(1, {"w": torch.ones(3)})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # a write beyond fails: EFBIG
    try:
        store.save(2, {"w": torch.ones(1 << 20)})
        with pytest.raises(CheckpointError, match=r"saving step 2 .*[Ff]ile too large"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.steps() == [1]


@pytest.mark.parametrize("place", ["/proc/omnistep", "a file"])
def test_a_directory_that_cannot_be_made_is_an_error_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with contextlib.closing(open_store(tmp_path / place / "checkpoints")) as store:
        assert store.latest() is None
        with pytest.raises(CheckpointError, match=place):
            store.save(1, {"n": 1})
        with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
            store.restore({"n": 1})


def test_a_directory_lost_during_the_run_is_an_error(store: OrbaxStore, tmp_path: Path) -> None:
    store.save(1, {"n": 1})
    store.wait()
    moved = tmp_path / "moved"
    folder(store).rename(moved)
    folder(store).touch()
    with pytest.raises(CheckpointError, match="checkpoints"):
        store.save(2, {"n": 2})
    folder(store).unlink()
    moved.rename(folder(store))
    store.save(2, {"n": 2})
    assert store.steps() == [1, 2]


def test_what_does_not_fit_is_named_with_both_sides(store: OrbaxStore) -> None:
    store.save(1, {"params": {"wq": torch.ones(2, 3), "b": torch.ones(4)}, "data": "x", "n": 1})
    abstract = {
        "params": {"w_q": torch.empty(2, 3), "b": torch.empty(5), "wq": torch.empty(2, 3).half()},
        "data": 0,
        "n": "",
    }
    with pytest.raises(CheckpointError) as caught:
        store.restore(abstract)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "params.w_q: asked for float32[2, 3], stored is nothing "
        "(the nearest name is params.wq: float32[2, 3])",
        "params.b: asked for float32[5], stored is float32[4]",
        "params.wq: asked for float16[2, 3], stored is float32[2, 3]",
        "data: asked for int, stored is str",
        "n: asked for str, stored is int",
    ]
    with pytest.raises(CheckpointError, match=r"holds no step 3; it holds \[1\]"):
        store.restore({"n": 0}, 3)


def test_a_part_of_the_tree_can_be_listed_and_restored(store: OrbaxStore) -> None:
    state = example_state()
    store.save(1, state)
    stored = store.stored(1)
    assert stored["params.bfloat16"].is_meta
    assert stored["params.bfloat16"].shape == (3, 5)
    assert stored["params.bfloat16"].dtype == torch.bfloat16
    assert (stored["position"], stored["saves"]) == ("", 0)
    assert set(stored) == set(leaves_with_names(state))
    part = {"params": abstract_of(state.params)}
    assert_same_bits(store.restore(part), {"params": state.params})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": 1.5}, "a is a float"),
        ({"a": {"b": None}}, "a.b is a NoneType"),
        ({"a": True}, "a is a bool"),
        ({"a": 2**63}, "does not fit 64 bits"),
        ({}, "no leaves"),
        (torch.ones(2), "cannot name a leaf"),
        ({"a/b": 1}, "cannot name a leaf"),
        ({"a": 1, "a.b": 2}, "a is a leaf and also"),
        ({"a": {"b": 1}, "a.b": 2}, "share the name"),
        ({"a": torch.ones(2).to_sparse()}, "a"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(
    store: OrbaxStore, state: Tree, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        store.save(1, state)
    store.wait()
    assert store.latest() is None


def test_a_truncated_or_altered_array_is_named(store: OrbaxStore) -> None:
    state = {"params": {"w": torch.randn(1 << 18)}, "n": 1}
    store.save(1, state)
    store.wait()
    data = max(folder(store).rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (flipped, whole[:middle], b""):
        data.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"'params.w' in .* is damaged"):
            store.restore(abstract_of(state))
    data.unlink()
    with pytest.raises(CheckpointError, match=r"'params.w' in .* is damaged"):
        store.restore(abstract_of(state))


def test_an_altered_text_is_named(store: OrbaxStore) -> None:
    store.save(1, {"position": json.dumps({"sample": 1234}), "w": torch.ones(2)})
    store.wait()
    (texts,) = folder(store).rglob("_strings.json")
    texts.write_text(texts.read_text().replace("1234", "1235"))
    with pytest.raises(CheckpointError, match=r"'position' in .* is damaged"):
        store.restore({"position": ""})


def test_no_altered_byte_anywhere_is_restored_unnoticed(store: OrbaxStore) -> None:
    state = example_state()
    store.save(1, state)
    store.wait()
    draw, noticed = random.Random(0), 0
    files = [path for path in (folder(store) / "1" / "state").rglob("*") if path.is_file()]
    for path, _ in itertools.product(files, range(8)):
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        )
        try:
            assert_same_bits(store.restore(abstract_of(state)), state)
        except CheckpointError:
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= 8
    assert_same_bits(store.restore(abstract_of(state)), state)


def test_plain_orbax_restores_it(store: OrbaxStore) -> None:
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


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    )


def test_a_kill_in_the_middle_of_a_save_costs_that_save_only(tmp_path: Path) -> None:
    draw = random.Random(1)
    fractions = [(index + draw.random()) / 5 for index in range(5)]
    process = run("checkpoint_killed.py", tmp_path, *fractions)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    unfinished = 0
    for index in range(len(fractions)):
        with contextlib.closing(open_store(tmp_path / str(index))) as store:
            latest = store.latest()
            left = {path.name for path in folder(store).iterdir()} - {"1", "2", "3"}
            unfinished += bool(left)
            assert latest in (2, 3)
            for step in range(1, latest + 1):
                assert_same_bits(store.restore(abstract_of(state_of(step)), step), state_of(step))
            assert left <= {path.name for path in folder(store).iterdir()}  # reading is harmless
            store.save(latest + 1, state_of(latest + 1))
            assert store.latest() == latest + 1
            names = sorted(int(path.name) for path in folder(store).iterdir())
            assert names == list(range(1, latest + 2))
    assert unfinished  # else no kill came in the middle


def test_two_ranks_save_and_restore_in_any_placement(tmp_path: Path) -> None:
    processes = [
        run("checkpoint_ranks.py", tmp_path, rank, 2, tmp_path / "store") for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert outputs == ["", ""]  # orbax's own log of the failed save is kept quiet
    expected = {"params": whole_state(1), "plain": torch.arange(7), "data": "{}", "n": 3}
    with contextlib.closing(open_store(tmp_path / "store")) as store:  # and alone, on no mesh
        assert_same_bits(store.restore(abstract_of(expected), 1), expected)


SCRIPT = """
import sys
from omnistep.core.checkpoint import open_store
store = open_store(sys.argv[1])
assert store.restore({"n": 0}) == {"n": 1}
slow = {"jax", "orbax", "torch.distributed.tensor"} & set(sys.modules)
assert not slow, slow
store.save(2, {"n": 2})
"""


def test_reading_imports_no_jax_and_a_script_may_end_without_close(store: OrbaxStore) -> None:
    store.save(1, {"n": 1})
    store.wait()
    subprocess.run([sys.executable, "-c", SCRIPT, folder(store)], check=True, timeout=60)
    assert store.restore({"n": 0}) == {"n": 2}


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
    directory: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(directory, **options)


@pytest.mark.parametrize("step", [-1, True, "3"])
def test_a_step_is_a_whole_number(store: OrbaxStore, step: int) -> None:
    with pytest.raises(CheckpointError, match="whole number"):
        store.save(step, {"n": 1})


def test_restored_memory_is_aligned_as_torch_aligns_it(tmp_path: Path) -> None:
    """So that a resumed run differs in nothing a BLAS library could round by."""
    state = {f"w{n}": torch.randn(n, 7) for n in range(1, 40)}
    with contextlib.closing(open_store(tmp_path)) as store:
        store.save(1, state)
        restored = store.restore({name: leaf.to("meta") for name, leaf in state.items()})
    assert all(leaf.data_ptr() % 64 == 0 for leaf in restored.values())


def test_the_snippet_of_the_docs_opens_a_checkpoint_in_jax(store: OrbaxStore) -> None:
    weights = {"w": torch.arange(12.0).reshape(4, 3), "e": torch.ones(6, 2).bfloat16()}
    store.save(3, {"state": {"params": weights, "step": torch.tensor(3)}, "data": "{}", "n": 1})
    store.wait()
    docs = (HERE.parent.parent / "docs/checkpoints.md").read_text()
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
    command = [sys.executable, "-c", snippet + check, str(store.directory / "3/state")]
    done = subprocess.run(command, env=two, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

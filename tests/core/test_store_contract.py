"""What every CheckpointStore promises, whatever the format of its files."""

import contextlib
import itertools
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from omnistep.core.checkpoint import (
    CheckpointError,
    CheckpointStore,
    DamagedError,
    open_store,
)
from omnistep.core.checkpoint.store import Format
from omnistep.core.tree import Tree, leaves_with_names
from tests.core.checkpoint_killed import state_of
from tests.core.checkpoint_ranks import WRITES, whole_state
from tests.core.checkpoint_states import State, abstract_of, assert_same_bits, example_state, folder
from tests.forkserver.client import ForkServer, Result

LEFT_BY_KILLED = {"orbax": "7.orbax-checkpoint-tmp/state", "dcp": "7.tmp"}


@pytest.fixture(params=get_args(Format))
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def store(place: Path, format: Format) -> Iterator[CheckpointStore]:
    with contextlib.closing(open_store(place, format=format)) as opened:
        yield opened


def test_every_dtype_and_structure_comes_back_bit_for_bit(store: CheckpointStore) -> None:
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


def test_buffers_may_be_overwritten_as_soon_as_save_returns(store: CheckpointStore) -> None:
    state = {"big": torch.zeros(6 << 20), "scalar": torch.tensor(0)}
    for step in (1, 2, 3):  # the copies of one save must not reach into another's either
        for tensor in state.values():
            tensor.fill_(step)
        store.save(step, state)
    state["big"].fill_(-1)
    store.save(4, {"big": torch.full((3,), 4, dtype=torch.int32)})  # another shape under the name
    for step in (1, 2, 3):
        expected = {"big": torch.full((6 << 20,), float(step)), "scalar": torch.tensor(step)}
        assert_same_bits(store.restore(abstract_of(state), step), expected)
    assert store.restore(store.stored(4))["big"].tolist() == [4, 4, 4]


def test_what_was_saved_is_told(store: CheckpointStore) -> None:
    assert not store.saved
    store.save(3, {"w": torch.ones(1000), "b": torch.ones(10, dtype=torch.int8), "n": 1})
    store.wait()
    assert (store.saved[-1].step, store.saved[-1].size) == (3, 4010)
    assert 0 < store.saved[-1].stall < store.saved[-1].seconds


def test_only_the_latest_steps_are_kept(place: Path, format: Format) -> None:
    with contextlib.closing(open_store(place, format=format, keep=2)) as store:
        for step in (1, 2, 10):
            store.save(step, {"n": step})
        assert store.steps() == [2, 10]
        assert store.latest() == 10
    with contextlib.closing(open_store(place, keep=2)) as store:  # also those of earlier runs
        store.save(11, {"n": 11})
        assert store.steps() == [10, 11]
        assert store.restore({"n": 0}, 10) == {"n": 10}
        assert sorted(path.name for path in place.iterdir()) == ["10", "11"]


def test_multiples_of_keep_every_are_kept_too(place: Path, format: Format) -> None:
    with contextlib.closing(open_store(place, format=format, keep=2, keep_every=4)) as store:
        for step in (2, 4, 5, 8, 9, 10, 11):
            store.save(step, {"n": step})
        assert store.steps() == [4, 8, 10, 11]


def test_a_step_set_aside_is_offered_no_more_and_can_be_saved_again(store: CheckpointStore) -> None:
    for n in (1, 2):
        store.save(7, {"n": n})
        place = Path(store.set_aside(7))
        assert (store.steps(), place.parent, place.is_dir()) == ([], store.directory, True)
        store.save(8 + n, {"n": n})
        assert store.steps() == [8 + n]
        assert place.is_dir()  # nor does the next save clean it away
        Path(store.set_aside(8 + n))
    store.save(7, {"n": 3})
    assert store.restore({"n": 0}) == {"n": 3}
    names = {path.name for path in folder(store).iterdir()}
    assert {"7", "7.damaged", "7.damaged1"} <= names


def test_a_step_is_saved_once(store: CheckpointStore) -> None:
    store.save(1, {"n": 1})
    with pytest.raises(CheckpointError, match="step 1 is already saved in"):
        store.save(1, {"n": 2})
    assert store.restore({"n": 0}) == {"n": 1}


def test_a_failed_save_leaves_nothing_and_can_be_repeated(
    place: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    def save_fails(store: CheckpointStore, step: int) -> None:
        store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(*WRITES[format], fails)
            store.save(step, {"w": torch.zeros(3)})
            with pytest.raises(
                CheckpointError, match=f"saving step {step} to .*: the disk is gone"
            ):
                store.wait()

    with contextlib.closing(open_store(place, format=format, keep=2)) as store:
        store.save(1, {"w": torch.ones(3)})
        save_fails(store, 2)
        assert store.latest() == 1
        assert store.saved[-1].step == 1
        store.save(2, {"w": torch.full((3,), 2.0)})
        assert store.steps() == [1, 2]
        assert store.restore({"w": torch.empty(3)})["w"].tolist() == [2, 2, 2]
        save_fails(store, 3)
        store.save(4, {"w": torch.ones(3)})
        assert store.steps() == [2, 4]  # the failed step does not count among the kept
        assert sorted(path.name for path in place.iterdir()) == ["2", "4"]


def test_what_a_killed_save_left_is_ignored_then_deleted(
    store: CheckpointStore, place: Path, format: Format
) -> None:
    (place / LEFT_BY_KILLED[format]).mkdir(parents=True)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        store.restore({"n": 0})
    store.save(1, {"n": 1})
    assert store.latest() == 1
    assert [path.name for path in place.iterdir()] == ["1"]


def test_a_full_disk_is_an_error_of_wait(store: CheckpointStore) -> None:
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
    store.save(2, {"w": torch.ones(1 << 20)})
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("parent", ["/proc/omnistep", "a file"])
def test_a_directory_that_cannot_be_made_is_an_error_at_once(
    parent: str, tmp_path: Path, format: Format
) -> None:
    (tmp_path / "a file").touch()
    with contextlib.closing(open_store(tmp_path / parent / "checkpoints", format=format)) as store:
        assert store.latest() is None
        with pytest.raises(CheckpointError, match=parent):
            store.save(1, {"n": 1})
        with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
            store.restore({"n": 1})


def test_a_directory_lost_during_the_run_is_an_error(
    store: CheckpointStore, place: Path, tmp_path: Path
) -> None:
    store.save(1, {"n": 1})
    store.wait()
    moved = tmp_path / "moved"
    place.rename(moved)
    place.touch()
    with pytest.raises(CheckpointError, match="checkpoints"):
        store.save(2, {"n": 2})
    place.unlink()
    moved.rename(place)
    store.save(2, {"n": 2})
    assert store.steps() == [1, 2]


def test_what_does_not_fit_is_named_with_both_sides(store: CheckpointStore) -> None:
    store.save(1, {"params": {"wq": torch.ones(2, 3), "b": torch.ones(4)}, "data": "x", "n": 1})
    abstract = {
        "params": {"w_q": torch.empty(2, 3), "b": torch.empty(5), "wq": torch.empty(2, 3).half()},
        "data": 0,
        "n": "",
    }
    with pytest.raises(CheckpointError) as caught:
        store.restore(abstract)
    assert not isinstance(caught.value, DamagedError)
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


def test_a_part_of_the_tree_can_be_listed_and_restored(store: CheckpointStore) -> None:
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
    assert store.restore({}) == {}


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
    store: CheckpointStore, state: Tree, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        store.save(1, state)
    store.wait()
    assert store.latest() is None


@pytest.mark.parametrize("step", [-1, True, "3"])
def test_a_step_is_a_whole_number(store: CheckpointStore, step: int) -> None:
    with pytest.raises(CheckpointError, match="whole number"):
        store.save(step, {"n": 1})


def damaged_versions(whole: bytes) -> Iterator[bytes | None]:
    """Flipped in the middle, cut, empty, gone."""
    middle = len(whole) // 2
    yield whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    yield whole[:middle]
    yield b""
    yield None


def test_a_truncated_or_altered_array_is_named(store: CheckpointStore, place: Path) -> None:
    state = {"params": {"w": torch.randn(1 << 18)}, "n": 1}
    store.save(1, state)
    store.wait()
    files = [path for path in (place / "1").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    for content in damaged_versions(data.read_bytes()):
        data.unlink() if content is None else data.write_bytes(content)
        with pytest.raises(DamagedError, match=r"'(params.w|n)' in .* is damaged") as caught:
            store.restore(abstract_of(state))
        if content and len(content) > 1 << 20:
            assert "params.w" in str(caught.value)


def test_no_altered_byte_anywhere_is_restored_unnoticed(
    store: CheckpointStore, place: Path, format: Format
) -> None:
    state = example_state()
    store.save(1, state)
    store.wait()
    draw, noticed = random.Random(0), 0
    held = place / "1" / ("state" if format == "orbax" else "")
    files = sorted(path for path in held.rglob("*") if path.is_file())
    for path, _ in itertools.product(files, range(8 if format == "orbax" else 60)):
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        )
        try:
            assert_same_bits(store.restore(abstract_of(state)), state)
        except DamagedError:
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= 8
    assert_same_bits(store.restore(abstract_of(state)), state)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_costs_that_save_only(
    tmp_path: Path, format: Format, server: ForkServer
) -> None:
    draw = random.Random(1)
    fractions = [(index + draw.random()) / 5 for index in range(5)]
    done = server.run("tests.core.checkpoint_killed:main", [tmp_path, format, *fractions])
    assert done.code == 0, done.err
    unfinished = 0
    for index in range(len(fractions)):
        place = tmp_path / str(index)
        with contextlib.closing(open_store(place)) as store:
            latest = store.latest()
            left = {path.name for path in place.iterdir()} - {"1", "2", "3"}
            unfinished += bool(left)
            assert latest in (2, 3)
            for step in range(1, latest + 1):
                assert_same_bits(store.restore(abstract_of(state_of(step)), step), state_of(step))
            assert left <= {path.name for path in place.iterdir()}  # reading is harmless
            store.save(latest + 1, state_of(latest + 1))
            assert store.latest() == latest + 1
            names = sorted(int(path.name) for path in place.iterdir())
            assert names == list(range(1, latest + 2))
    assert unfinished  # else no kill came in the middle


@pytest.mark.slow
def test_two_ranks_save_and_restore_in_any_placement(
    tmp_path: Path, plain_server: ForkServer
) -> None:
    done = plain_server.run_ranks("tests.core.checkpoint_ranks:main", 2, [tmp_path])
    # and orbax's own log of the failed save is kept quiet
    assert done == [Result(0, "", "")] * 2
    expected = {"params": whole_state(1), "plain": torch.arange(7), "data": "{}", "n": 3}
    for format in get_args(Format):  # and alone, on no mesh
        with contextlib.closing(open_store(tmp_path / format)) as store:
            assert_same_bits(store.restore(abstract_of(expected), 1), expected)


@pytest.mark.slow
def test_memory_beside_state_and_copy_is_bounded(
    tmp_path: Path, format: Format, server: ForkServer
) -> None:
    done = server.run("tests.core.checkpoint_memory:main", [tmp_path, format])
    assert done.code == 0, done.err
    state, writing, reading = (int(text) for text in done.out.split())
    assert state == 384
    assert writing < 250  # whatever the size of the state, or of a leaf
    assert reading < 350


SCRIPT = """
import sys
from omnistep.core.checkpoint import open_store
store = open_store(sys.argv[1])
assert store.restore({"n": 0}) == {"n": 1}
store.save(2, {"n": 2})
"""


@pytest.mark.slow
def test_a_script_may_end_without_close(store: CheckpointStore, place: Path) -> None:
    store.save(1, {"n": 1})
    store.wait()
    subprocess.run([sys.executable, "-c", SCRIPT, place], check=True, timeout=60)
    assert store.restore({"n": 0}) == {"n": 2}


def test_restored_memory_is_aligned_as_torch_aligns_it(store: CheckpointStore) -> None:
    """So that a resumed run differs in nothing a BLAS library could round by."""
    state = {f"w{n}": torch.randn(n, 7) for n in range(1, 40)}
    store.save(1, state)
    restored = store.restore({name: leaf.to("meta") for name, leaf in state.items()})
    assert all(leaf.data_ptr() % 64 == 0 for leaf in restored.values())


def test_a_directory_holds_one_format(store: CheckpointStore, place: Path, format: Format) -> None:
    store.save(1, {"n": 1})
    store.wait()
    (other,) = set(get_args(Format)) - {format}
    with pytest.raises(CheckpointError, match=f"of the format {format}; {other} cannot be saved"):
        open_store(place, format=other)
    with contextlib.closing(open_store(place)) as reading:
        assert reading.restore({"n": 0}) == {"n": 1}
        reading.save(2, {"n": 2})
    with contextlib.closing(open_store(place, format=format)) as again:
        assert again.restore({"n": 0}) == {"n": 2}

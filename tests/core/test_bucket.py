"""Checkpoints under gs:// and s3://, in buckets on this machine."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnistep.core.checkpoint import CheckpointError, DamagedError, open_store
from omnistep.core.checkpoint.place import Bucket, OutOfReachError, open_place, try_to_write
from omnistep.core.checkpoint.shards import Streamed
from omnistep.core.checkpoint.stored import open_stored
from tests.core import buckets
from tests.core.buckets import Objects
from tests.core.checkpoint_ranks import whole_state
from tests.forkserver.client import ForkServer


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    with buckets.served(monkeypatch) as held:
        yield held


@pytest.fixture(params=["gs", "s3"])
def url(request: pytest.FixtureRequest, objects: Objects) -> str:
    """An empty directory in a bucket, by either protocol."""
    return f"{request.param}://bucket/run/checkpoints"


def state(step: int) -> dict[str, Tensor | str | int]:
    """Of a chunk and more, of every kind of leaf."""
    return {
        "w": torch.arange(3 << 19, dtype=torch.float32).reshape(3, -1) * step,
        "half": torch.full((5,), step).bfloat16(),
        "empty": torch.empty(0, 3),
        "text": f"position {step}",
        "n": step,
    }


def assert_holds(directory: str, step: int) -> None:
    """That this step is there, bit for bit."""
    with contextlib.closing(open_store(directory)) as store:
        found = store.restore(state(0), step)
    for name, leaf in state(step).items():
        same = torch.equal(leaf, found[name]) if isinstance(leaf, Tensor) else leaf == found[name]
        assert same, name


def test_save_restore_latest_and_retention(url: str) -> None:
    with contextlib.closing(open_store(f"{url}/", keep=2)) as store:
        assert (store.latest(), store.steps()) == (None, [])
        with pytest.raises(CheckpointError, match=f"{url} holds no committed checkpoint"):
            store.restore(state(0))
        for step in (2, 1, 30):
            store.save(step, state(step))
        assert (store.latest(), store.steps()) == (30, [2, 30])
        with pytest.raises(CheckpointError, match="step 30 is already saved"):
            store.save(30, state(30))
        stored = store.stored()
        assert stored["w"].shape == (3, 1 << 19)
        assert (stored["text"], stored["n"], stored["w"].device.type) == ("", 0, "meta")
    assert_holds(url, 2)
    assert_holds(url, 30)
    assert not [name for name in Bucket(url).names() if name.startswith("1/")]


@pytest.mark.parametrize(("keep", "every"), [(None, None), (1, None), (2, 4), (None, 3)])
def test_the_same_steps_stay_as_on_disk(
    keep: int | None, every: int | None, objects: Objects, tmp_path: Path
) -> None:
    left = []
    for place in (tmp_path, "gs://bucket/run"):
        with contextlib.closing(open_store(place, keep=keep, keep_every=every)) as store:
            for step in (0, 3, 4, 5, 8, 9):
                store.save(step, {"n": step, "w": torch.ones(3)})
            left.append(store.steps())
    assert left[0] == left[1]


def test_damage_is_found_named_and_set_aside(url: str) -> None:
    with contextlib.closing(open_store(url)) as store:
        store.save(1, state(1))
        store.save(2, state(2))
        store.wait()
        arrays = Bucket(url) / "2" / "state"
        (name,) = [n for n in arrays.names() if "process_torch0/d/" in n]
        whole = arrays.read(name)
        assert whole is not None
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for content in (flipped, whole[:middle], None):
            arrays.delete(name) if content is None else arrays.write(name, content)
            with pytest.raises(DamagedError, match=f"'w' in the checkpoint {arrays} is damaged"):
                store.restore(state(0), 2)
        arrays.write(name, whole)
        assert_holds(url, 2)
        for name in ("_strings.json", "_METADATA"):
            arrays.delete(name)
            with pytest.raises(DamagedError, match=name):
                store.restore(state(0), 2)
        assert store.set_aside(2) == f"{url}/2 (damaged.txt)"
        assert store.steps() == [1]
    with contextlib.closing(open_store(url)) as store:
        store.save(3, state(3))  # deletes leftovers, not what was set aside
        store.wait()
        assert arrays.read("manifest.ocdbt") is not None
        store.save(2, state(2))
        assert store.steps() == [1, 2, 3]
        assert "2/damaged.txt" not in Bucket(url).names()
    for step in (1, 2, 3):
        assert_holds(url, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "url", ["gs", pytest.param("s3", marks=pytest.mark.exhaustive)], indirect=True
)
def test_a_save_that_dies_at_any_moment_is_never_offered(url: str, objects: Objects) -> None:
    with contextlib.closing(open_store(url)) as store:
        store.save(1, state(1))
    before = dict(objects.held)
    outcomes = []
    for changes in itertools.count(1):
        objects.held, objects.changes_left = dict(before), changes
        with contextlib.closing(open_store(url, keep=1)) as store:
            store.save(2, state(2))
            with contextlib.suppress(CheckpointError):
                store.wait()
        died, objects.changes_left = objects.changes_left == 0, None
        with contextlib.closing(open_store(url, keep=1)) as store:
            outcomes.append(tuple(store.steps()))
            assert 1 not in outcomes[-1] or before.items() <= objects.held.items()
            for step in outcomes[-1]:
                assert_holds(url, step)
            if 2 not in outcomes[-1]:
                store.save(2, state(2))
            store.save(3, state(3))
            assert store.steps() == [3]
        assert_holds(url, 3)
        assert {name.split("/")[2] for name in objects.held} == {"3"}
        if not died:
            break
    assert outcomes.count((1,)) > 5
    assert sorted(set(outcomes), key=outcomes.index) == [(1,), (1, 2), (2,)]


def test_refused_is_not_the_same_as_empty_or_damaged(url: str, objects: Objects) -> None:
    """tensorstore takes a refused listing for an empty one: a run would start afresh."""
    with contextlib.closing(open_store(url)) as store:
        store.save(1, state(1))
        store.wait()
        objects.changes_left = 0
        for ask in (store.steps, store.latest, store.stored, lambda: store.save(2, state(2))):
            with pytest.raises(CheckpointError, match=rf"{url}.* is out of reach: PERM"):
                ask()
        with pytest.raises(OutOfReachError, match="out of reach: PERMISSION_DENIED"):
            try_to_write(store.directory)
        objects.changes_left = None
        opened = open_stored(store.directory / "1" / "state")
        objects.changes_left = 0
        for read in (
            lambda: opened.part("w", [slice(0, 3), slice(0, 1 << 19)]),
            lambda: open_stored(store.directory / "1" / "state"),
        ):
            with pytest.raises(CheckpointError, match="out of reach: PERMISSION_DENIED") as raised:
                read()
            assert not isinstance(raised.value, DamagedError)
        objects.changes_left = None
    assert_holds(url, 1)


def test_a_place_is_tried_before_a_run_and_left_clean(url: str) -> None:
    try_to_write(Bucket(url))
    assert Bucket(url).names() == []


@pytest.mark.slow
def test_two_ranks_write_at_once_and_restore_in_any_placement(
    url: str, tmp_path: Path, plain_server: ForkServer
) -> None:
    done = plain_server.run_ranks(
        "tests.core.checkpoint_ranks:main", 2, [tmp_path, url], environ=os.environ
    )
    assert [rank.code for rank in done] == [0, 0], "\n".join(rank.err for rank in done)
    names = Bucket(url).names()
    assert {n.split("/")[2] for n in names if "torch" in n} == {
        "ocdbt.process_torch0",
        "ocdbt.process_torch1",
    }
    with contextlib.closing(open_store(url)) as store:  # and alone, on no mesh
        found = store.restore({"params": whole_state(0)}, 1)["params"]
    assert all(torch.equal(found[name], leaf) for name, leaf in whole_state(1).items())


def test_a_leaf_that_is_made_while_it_is_written(url: str) -> None:
    whole = torch.arange(12.0).reshape(4, 3)

    def blocks() -> Iterator[tuple[tuple[int, ...], Tensor]]:
        yield (0, 0), whole[:3]
        yield (3, 0), whole[3:]

    with contextlib.closing(open_store(url)) as store:
        store.save(1, {"w": Streamed((4, 3), torch.float32, blocks)})
        assert torch.equal(store.restore({"w": torch.empty(4, 3)})["w"], whole)


def test_plain_orbax_restores_it(url: str, tmp_path: Path) -> None:
    """From a copy on disk: to read it in place, orbax needs gcsfs."""
    import numpy as np
    import orbax.checkpoint as ocp

    with contextlib.closing(open_store(url)) as store:
        store.save(5, state(5))
    for name in Bucket(url).names():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(Bucket(url).read(name) or b"")
    with ocp.CheckpointManager(tmp_path, item_names=("state",)) as manager:
        assert manager.latest_step() == 5
        tree = manager.restore(5, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    assert np.array_equal(tree["w"], np.asarray(state(5)["w"]))
    assert (tree["text"], tree["n"], tree["half"].dtype) == ("position 5", 5, "bfloat16")


SCRIPT = """
import sys
from omnistep.core.checkpoint import open_store
assert open_store(sys.argv[1]).restore({"n": 0}) == {"n": 1}
slow = {"jax", "orbax", "etils", "torch.distributed.tensor"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.slow
def test_reading_imports_neither_jax_nor_orbax(url: str) -> None:
    with contextlib.closing(open_store(url)) as store:
        store.save(1, {"n": 1})
    subprocess.run([sys.executable, "-c", SCRIPT, url], check=True, timeout=60)


@pytest.mark.parametrize("place", ["hf://user/model", "gs://", "gs:///run", "https://host/run"])
def test_other_urls_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"a local directory, gs://bucket/path or s3://bucket"):
        open_place(place)


def test_places_are_compared_and_taken_apart() -> None:
    place = open_place("s3://bucket//run/7/")
    assert place == Bucket("s3://bucket/run/7") == open_place("s3://bucket/run") / "7"
    assert (place.name, str(place.parent)) == ("7", "s3://bucket/run")


def test_s3_settings_come_from_the_usual_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from omnistep.core.checkpoint.place import kvstore

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    plain = {"driver": "s3", "bucket": "b", "path": "run/"}
    assert kvstore("s3://b/run") == plain
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert kvstore("s3://b/run") == plain | {
        "endpoint": "http://minio:9000",
        "aws_region": "eu-west-1",
    }

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnistep.core.checkpoint import CheckpointError
from omnistep.core.checkpoint.pieces import LazyTensor
from omnistep.core.checkpoint.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    open_weights,
    read_index,
)
from omnistep.core.checkpoint.weight_files import shard_bytes, write_weights


def example(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors = {
        f"layers.{name}": (torch.rand(5, 3) * 100).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(seed + 1.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["strided ä"] = torch.randn(4, 6).T
    return tensors


def assert_same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        pair = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*pair), name


def loaded(directory: Path) -> dict[str, Tensor]:
    weights = open_weights(directory)
    return {name: weights.read(name) for name in weights.infos}


def test_one_file_is_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    tensors = example()
    assert write_weights(tmp_path, tensors) == [tmp_path / SINGLE]
    assert_same_bits(load_file(tmp_path / SINGLE), tensors)
    with safe_open(str(tmp_path / SINGLE), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same_bits(loaded(tmp_path), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_shards_are_within_the_limit_and_indexed(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(10) for i in range(5)} | {"large": torch.randn(100)}
    paths = write_weights(tmp_path, tensors, max_shard_bytes=90, metadata={"step": "3"})
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [path.name for path in paths] == names
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 40 + 400
    assert [index["weight_map"][name] for name in tensors] == [
        names[0], names[0], names[1], names[1], names[2], names[3],
    ]  # fmt: skip
    parts = [load_file(path) for path in paths]
    assert_same_bits({n: t for part in parts for n, t in part.items()}, tensors)
    with safe_open(str(paths[0]), framework="pt") as file:
        assert file.metadata() == {"step": "3"}
    assert_same_bits(loaded(tmp_path), tensors)
    assert read_index(tmp_path) == read_index(tmp_path / INDEX)
    assert read_index(paths[0]) == {"w0": paths[0], "w1": paths[0]}


def test_lazy_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def make(value: int) -> Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.full((1000,), float(value)).as_subclass(Counted)

    sources = {f"w{i}": LazyTensor((1000,), torch.float32, lambda i=i: make(i)) for i in range(6)}
    write_weights(tmp_path, sources, max_shard_bytes=8000)
    assert most == 1
    assert [float(loaded(tmp_path)[f"w{i}"][0]) for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_slices_are_read_as_indexing_would_cut_them(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(6, 4, 3), "scalar": torch.tensor(2)}
    write_weights(tmp_path, tensors)
    weights = open_weights(tmp_path)
    info = weights.infos["w"]
    assert (info.file, info.shape, info.dtype) == (tmp_path / SINGLE, (6, 4, 3), torch.float32)
    whole = slice(None)
    cuts = [
        (slice(2, 4), whole, whole),
        (whole, slice(1, 3), slice(2, 3)),
        (slice(-2, None), slice(0, 99), whole),
        (slice(3, 3), whole, whole),
    ]
    for cut in cuts:
        part = weights.read("w", cut)
        assert torch.equal(part, tensors["w"][cut])
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes  # its own memory, and no more
    assert weights.read("scalar", ()) == 2
    with pytest.raises(ValueError, match="has a step"):
        weights.read("w", (slice(None, None, 2), whole, whole))
    with pytest.raises(ValueError, match=r"shorter|argument"):
        weights.read("w", (whole,))
    with pytest.raises(ValueError, match=r"holds no tensor 'scaler'; the nearest name is 'scalar'"):
        weights.read("scaler")


def test_what_is_read_does_not_change_the_file(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(6, 4)}
    write_weights(tmp_path, tensors)
    open_weights(tmp_path).read("w").zero_()
    assert_same_bits(loaded(tmp_path), tensors)


def test_reading_maps_no_more_than_it_reads(tmp_path: Path) -> None:
    """Pages of a mapped file count as memory of the process: those of a model would fill it."""
    write_weights(tmp_path, {f"w{i}": torch.zeros(1 << 20) for i in range(16)})
    weights = open_weights(tmp_path)
    maps = Path("/proc/self/maps")
    for name in weights.infos:
        weights.read(name)
        assert str(tmp_path) not in maps.read_text()


def sharded(directory: Path) -> Path:
    write_weights(directory, {f"w{i}": torch.randn(100) for i in range(3)}, max_shard_bytes=400)
    return directory / "model-00002-of-00003.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def no_header(path: Path) -> None:
    path.write_bytes(b"\x08\0\0\0\0\0\0\0not json")


def other_content(path: Path) -> None:
    save_file({"other": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, ValueError, r"model-00002-of-00003.safetensors \(\d+ bytes\) is no complete"),
        (no_header, ValueError, "model-00002-of-00003.safetensors .* is no complete"),
        (lambda path: path.write_bytes(b""), ValueError, "is no complete safetensors file"),
        (Path.unlink, FileNotFoundError, "lists 3 files, of which 1 are missing: model-00002"),
        (other_content, ValueError, "says 'w1' is in model-00002-of-00003.safetensors, which"),
    ],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(sharded(tmp_path))
    with pytest.raises(error, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000),
        '{"weight_map": {"w1": "../other/x.safetensors"}}',
        '{"weight_map": {"w1": "/etc/passwd"}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is no index of shards"):
        open_weights(tmp_path)


def test_missing_weights_say_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"neither {SINGLE} nor"):
        read_index(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin must first be converted"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is no weights file"):
        read_index(tmp_path / "pytorch_model.bin")
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds 3 shards .* but no"):
        read_index(tmp_path)


def fails() -> Tensor:
    raise RuntimeError("gone")


@pytest.mark.parametrize("limit", [5e9, 600])
def test_a_failed_write_leaves_the_older_export_whole(tmp_path: Path, limit: float) -> None:
    older = example(1)
    write_weights(tmp_path, older, max_shard_bytes=limit)
    (tmp_path / "config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = example(2) | {"last": LazyTensor((2,), torch.float32, fails)}
    with pytest.raises(CheckpointError, match="gone"):
        write_weights(tmp_path, broken, max_shard_bytes=limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_write_leaves_the_older_export_whole(tmp_path: Path) -> None:
    older, newer = example(1), example(2)
    export, killed = tmp_path / "export", tmp_path / "killed"

    def kill() -> Tensor:
        shutil.copytree(export, killed)  # what a kill at this moment would leave
        raise KeyboardInterrupt

    write_weights(export, older, max_shard_bytes=600)
    ending = newer | {"last": LazyTensor((), torch.int64, kill)}
    with pytest.raises(KeyboardInterrupt):
        write_weights(export, ending, max_shard_bytes=600)
    assert_same_bits(loaded(killed), older)
    assert len(list(killed.iterdir())) > len(list(export.iterdir()))  # it was in the middle
    write_weights(killed, newer, max_shard_bytes=600)
    assert_same_bits(loaded(killed), newer)
    assert all(path.name.startswith("model") for path in killed.iterdir())


@pytest.mark.parametrize("limits", [(5e9, 600), (600, 5e9), (600, 300), (600, 600)])
def test_the_new_export_alone_remains(tmp_path: Path, limits: tuple[float, float]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for seed, limit in enumerate(limits):
        paths = write_weights(tmp_path, example(seed), max_shard_bytes=limit)
    assert_same_bits(loaded(tmp_path), example(1))
    expected = {path.name for path in paths} | ({INDEX} if len(paths) > 1 else set())
    assert {path.name for path in tmp_path.iterdir()} == expected | {"config.json"}


@pytest.mark.parametrize("survived", range(8))  # 4 files move out, then 4 move in
def test_an_end_amid_the_final_renames_never_leaves_a_loadable_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    older, newer = ({f"w{i}": torch.full((100,), v) for i in range(3)} for v in (1.0, 2.0))
    export, killed = tmp_path / "export", tmp_path / "killed"
    write_weights(export, older, max_shard_bytes=400)
    renamed, replace = 0, Path.replace

    def ends_after_some(path: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += 1
        if renamed == survived + 1:
            shutil.copytree(export, killed)  # what a kill at this moment would leave
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", ends_after_some)
    with pytest.raises(KeyboardInterrupt):
        write_weights(export, newer, max_shard_bytes=400)
    assert_same_bits(loaded(export), older)
    if survived == 0:
        assert_same_bits(loaded(killed), older)
    else:
        with pytest.raises(FileNotFoundError, match=INDEX):
            open_weights(killed)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "no tensors"),
        ({"a": torch.ones(2)}, {"max_shard_bytes": 0}, "above 0"),
        ({"__metadata__": torch.ones(2)}, {}, "reserves"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, "a: torch.complex128 cannot be"),
        ({"a": LazyTensor((3,), torch.float32, lambda: torch.ones(2))}, {}, "a: announced as"),
        ({"a": LazyTensor((2,), torch.int64, lambda: torch.ones(2))}, {}, "a: announced as"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor | LazyTensor], options: dict, message: str
) -> None:
    with pytest.raises((ValueError, CheckpointError), match=message):
        write_weights(tmp_path, tensors, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("total", "most"),
    [(8, 1e9), (64e9, 1e9), (128e9, 2e9), (320e9, 5e9), (1400e9, 5e9)],
)
def test_how_large_a_file_may_be(total: float, most: float) -> None:
    assert shard_bytes(int(total)) == most

"""A checkpoint of a stranger runs nothing, whatever its `.metadata` says."""

import os
import pickle
from collections import OrderedDict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from omnistep.bin import convert
from omnistep.core.checkpoint import DamagedError, open_store
from omnistep.core.checkpoint.dcp_metadata import load_metadata, read_metadata
from omnistep.core.checkpoint.dcp_weights import open_dcp_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.call = (function, words)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint by torch itself, of all kinds of values."""
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    state: dict[str, Any] = {str(dtype): torch.zeros(3, 4).to(dtype) for dtype in dtypes}
    state |= {"text": "x", "nested": {"n": 3, "list": [1, OrderedDict(a=torch.ones(2))]}}
    dcp.save(state, checkpoint_id=tmp_path / "7")
    return tmp_path / "7"


def test_what_torch_wrote_is_read_as_torch_reads_it(written: Path) -> None:
    ours, theirs = read_metadata(written / ".metadata"), FileSystemReader(written).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def spoiled(written: Path, tmp_path: Path, how: str) -> Path:
    """The file that appears if its pickle is run."""
    trace = tmp_path / "trace"
    calls = {
        "os.system": Evil(os.system, f"touch {trace}"),
        "open": Evil(open, str(trace), "w"),
        "exec": Evil(exec, f"open({str(trace)!r}, 'w')"),
        "nested": Evil(getattr, Evil(__import__, "os"), "system"),
        "torch.load": Evil(torch.load, str(trace)),
        "in the metadata": None,
    }
    metadata = FileSystemReader(written).read_metadata()
    if how == "in the metadata":
        metadata.planner_data = calls["os.system"]
    evil = metadata if calls[how] is None else calls[how]
    (written / ".metadata").write_bytes(pickle.dumps(evil))
    return trace


@pytest.mark.parametrize(
    "how", ["os.system", "open", "exec", "nested", "torch.load", "in the metadata"]
)
def test_nothing_is_run(how: str, written: Path, tmp_path: Path, capsys: Any) -> None:
    trace = spoiled(written, tmp_path, how)
    with pytest.raises(pickle.UnpicklingError, match=r"it names .*no part of a checkpoint"):
        read_metadata(written / ".metadata")
    with pytest.raises(ValueError, match=r"\.metadata is no metadata .*it names"):
        open_dcp_weights(written)
    with closing(open_store(tmp_path)) as store, pytest.raises(DamagedError, match="it names"):
        store.stored(7)
    assert convert.main([str(written), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not trace.exists()


@pytest.mark.parametrize("path", ["../other.distcp", "/etc/passwd", "a/../../b"])
def test_files_outside_of_the_checkpoint_are_not_read(path: str, written: Path) -> None:
    metadata = FileSystemReader(written).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = path
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        load_metadata(pickle.dumps(metadata))

"""The files of the dcp format; what every store promises is in test_store_contract.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from omnistep.core.checkpoint import CheckpointError, CheckpointStore, DamagedError, open_store
from omnistep.core.checkpoint.dcp import PIECE_BYTES
from omnistep.core.checkpoint.shards import Streamed
from omnistep.core.tree import leaves_with_names, tree_map
from tests.core.checkpoint_states import abstract_of, assert_same_bits, example_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with contextlib.closing(open_store(tmp_path, format="dcp")) as opened:
        yield opened


def test_plain_dcp_loads_it(store: CheckpointStore, tmp_path: Path) -> None:
    state = {"a": {"w": torch.ones(2, 3).bfloat16(), "n": 4}, "list": ["x", torch.arange(3)]}
    store.save(5, state)
    store.wait()
    target = {"a": {"w": torch.empty(2, 3).bfloat16(), "n": 0}, "list": ["", torch.zeros(3).long()]}
    dcp.load(target, checkpoint_id=tmp_path / "5")
    assert_same_bits(target, state)


def test_plain_dcp_loads_every_dtype_by_its_dotted_name(
    store: CheckpointStore, tmp_path: Path
) -> None:
    state = leaves_with_names(example_state())
    store.save(1, state_of_names(state))
    store.wait()
    target = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, state)
    dcp.load(target, checkpoint_id=tmp_path / "1")
    assert_same_bits(target, state)


def state_of_names(state: dict) -> dict:
    nested: dict = {}
    for name, leaf in state.items():
        *parents, last = name.split(".")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def test_it_reads_what_plain_dcp_wrote(store: CheckpointStore, tmp_path: Path) -> None:
    """Whose pieces have checksums too: an altered byte is found there as well."""
    state = {"w": torch.randn(30, 40).T, "position": "3"}
    dcp.save(state, checkpoint_id=tmp_path / "2", no_dist=True)
    assert_same_bits(store.restore(abstract_of(state)), state)
    (data,) = (tmp_path / "2").glob("*.distcp")
    whole = bytearray(data.read_bytes())
    whole[len(whole) - 3000] ^= 1
    data.write_bytes(whole)
    with pytest.raises(DamagedError, match=r"'w' in .* is damaged"):
        store.restore(abstract_of(state))


def test_a_large_leaf_is_stored_in_pieces(store: CheckpointStore, tmp_path: Path) -> None:
    """So that to check one takes little memory; and no byte is stored twice."""
    state = {"w": torch.randn(3, PIECE_BYTES // 4 + 5), "thin": torch.randn(1, 1, PIECE_BYTES // 2)}
    store.save(1, state)
    store.wait()
    assert_same_bits(store.restore(abstract_of(state)), state)
    stored = sum(path.stat().st_size for path in (tmp_path / "1").iterdir())
    assert stored < sum(leaf.nbytes for leaf in state.values()) + 20_000


def test_a_streamed_leaf_is_refused(store: CheckpointStore) -> None:
    leaf = Streamed((2,), torch.float32, lambda: [((0,), torch.ones(2))])
    store.save(1, {"a": {"w": leaf}})
    with pytest.raises(CheckpointError, match="w is Streamed; the dcp format holds"):
        store.wait()
    assert store.steps() == []

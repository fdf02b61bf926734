"""States that the tests of checkpoints save, and how they compare them."""

from pathlib import Path

import attrs
import torch
from torch import Tensor

from omnistep.core.checkpoint import CheckpointStore
from omnistep.core.tree import Tree, leaves_with_names, pytree, tree_map

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


def folder(store: CheckpointStore) -> Path:
    """Of a store whose steps lie in a local directory."""
    assert isinstance(store.directory, Path)
    return store.directory

"""`Param`: what a model says of each of its weights, before any of them exists.

One tree of these per model. Abstract state, initial values, decay masks, parameter counts and
checkpoint targets are all derived from it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core import rng
from omnistep.core.tree import Tree, map_with_name, tree_leaves, tree_map
from omnistep.parallel.layout import Place, Strategy, extent, place, to_global
from omnistep.parallel.mesh import Mesh

Init = Callable[[Tensor, tuple[int, ...], torch.dtype, rng.Block], Tensor]
"""(key, shape, dtype, block) -> the values of a block of a tensor of this shape, on the key's
device: the same ones whatever the block."""


def normal(std: float) -> Init:
    """Independent normal values of mean 0."""
    return lambda key, shape, dtype, block: rng.normal(key, shape, dtype, block).mul_(std)


def constant(value: float) -> Init:
    return lambda key, shape, dtype, block: torch.full(
        block.shape, value, dtype=dtype, device=key.device
    )


@frozen
class Param:
    """One weight: its shape, the logical name of each of its axes, its initial values.

    `axes` are what layouts are written in ("layers", "embed", "heads", ...). `decay` says
    whether weight decay applies: to matrices and embeddings, not to norms and biases. What is
    `exact` is kept in fp32 or better, whatever the dtype of the others. What is not `learned` has
    no gradient and no optimizer state: it is frozen, or the loss sets it (core.grad.Stages.after).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool = True
    exact: bool = False
    learned: bool = True

    def dtype(self, of_others: torch.dtype) -> torch.dtype:
        return torch.promote_types(of_others, torch.float32) if self.exact else of_others

    def __attrs_post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"a Param of shape {self.shape} needs one axis name per dimension, not {self.axes}"
            )


def is_param(value: object) -> bool:
    return isinstance(value, Param)


def count(params: Tree) -> int:
    """Number of scalars in a tree of Params or tensors."""
    return sum(math.prod(leaf.shape) for leaf in tree_leaves(params))


@frozen(eq=False)
class Layout:
    """Where each parameter of a model lies on a mesh."""

    mesh: Mesh
    places: Tree
    """Of Place, like the tree of Params."""
    strategy: Strategy
    dtype: torch.dtype
    """In which weights are gathered and products computed."""
    bucket: bool = False
    """The weights of a layer travel as one message (fsdp1)."""

    def map(self, function: Callable[..., Any], *trees: Tree) -> Tree:
        """`function(leaf, its place, *leaves of the other trees)`."""
        first, *rest = trees
        return tree_map(function, first, self.places, *rest)


def make_layout(
    params: Tree,
    mesh: Mesh,
    strategy: Strategy,
    dtype: torch.dtype,
    *,
    bucket: bool = False,
) -> Layout:
    """Raises MeshError, naming the parameter, where a size does not divide."""

    def where(name: str, p: Param) -> Place:
        return place(name, p.shape, p.axes, mesh, strategy)

    places = map_with_name(where, params, is_leaf=is_param)
    return Layout(mesh, places, strategy, dtype, bucket)


def one_rank(params: Tree, dtype: torch.dtype) -> Layout:
    return make_layout(params, Mesh(torch.device("cpu")), "ddp", dtype)


def abstract(params: Tree, dtype: torch.dtype, layout: Layout | None = None) -> Tree:
    """Tensors (on a mesh: DTensors) of the right shape and dtype on the meta device: no memory."""

    def make(p: Param, at: Place | None = None) -> Tensor:
        if at is None or layout is None:
            return torch.empty(p.shape, dtype=p.dtype(dtype), device="meta")
        shape, _ = extent(at, layout.mesh)
        local = torch.empty(shape, dtype=p.dtype(dtype), device="meta")
        return to_global(local, at, layout.mesh)

    if layout is None:
        return tree_map(make, params, is_leaf=is_param)
    return tree_map(make, params, layout.places, is_leaf=is_param)


def decay_mask(params: Tree) -> Tree:
    """True where weight decay applies."""
    return tree_map(lambda p: p.decay, params, is_leaf=is_param)


def learned_mask(params: Tree) -> Tree:
    """True where a gradient moves the weight."""
    return tree_map(lambda p: p.learned, params, is_leaf=is_param)


def initialize(
    params: Tree,
    key: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
) -> Tree:
    """Initial values. Each is a function of (key, the parameter's dotted name) alone, the same
    whatever the other parameters, the mesh and the device the values are made on (`key.device`);
    they end up on `device`. A rank makes only its own pieces."""

    def make(name: str, p: Param, at: Place | None = None) -> Tensor:
        named, kept = rng.name_key(key, name), p.dtype(dtype)
        if at is None or layout is None:
            whole = rng.Block((0,) * len(p.shape), p.shape)
            return p.init(named, p.shape, kept, whole).to(device)
        shape, offset = extent(at, layout.mesh)
        piece = p.init(named, p.shape, kept, rng.Block(offset, shape)).to(device)
        return to_global(piece, at, layout.mesh)

    if layout is None:
        return map_with_name(make, params, is_leaf=is_param)
    return map_with_name(make, params, layout.places, is_leaf=is_param)

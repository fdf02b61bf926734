"""`Param`: what a model says of each of its weights, before any of them exists.

One tree of these per model. Abstract state, initial values, decay masks, parameter counts and
checkpoint targets are all derived from it.
"""

import math
from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core import rng
from omnistep.core.tree import Tree, map_with_name, tree_leaves, tree_map

Init = Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor]
"""(key, shape, dtype) -> values, on the key's device."""


def normal(std: float) -> Init:
    """Independent normal values of mean 0."""
    return lambda key, shape, dtype: rng.normal(key, shape, dtype).mul_(std)


def constant(value: float) -> Init:
    return lambda key, shape, dtype: torch.full(shape, value, dtype=dtype, device=key.device)


@frozen
class Param:
    """One weight: its shape, the logical name of each of its axes, its initial values.

    `axes` are what layouts are written in ("layers", "embed", "heads", ...). `decay` says
    whether weight decay applies: to matrices and embeddings, not to norms and biases.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool = True

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


def abstract(params: Tree, dtype: torch.dtype) -> Tree:
    """Tensors of the right shape and dtype on the meta device: no memory."""
    return tree_map(
        lambda p: torch.empty(p.shape, dtype=dtype, device="meta"), params, is_leaf=is_param
    )


def decay_mask(params: Tree) -> Tree:
    """True where weight decay applies."""
    return tree_map(lambda p: p.decay, params, is_leaf=is_param)


def initialize(params: Tree, key: Tensor, dtype: torch.dtype, device: torch.device) -> Tree:
    """Initial values. Each is a function of (key, the parameter's dotted name) alone, the same
    whatever the other parameters and whatever the device the values are made on (`key.device`);
    they end up on `device`."""
    return map_with_name(
        lambda name, p: p.init(rng.name_key(key, name), p.shape, dtype).to(device),
        params,
        is_leaf=is_param,
    )

"""Collectives on local tensors along named axes of the mesh, differentiable and traceable.

The rule of differentiation is that of jax's shard_map: what is differentiated is the *sum over all
ranks* of their results. So all_gather and reduce_scatter are each other's transpose, all_to_all is
its own with the dimensions exchanged, a permutation's is its inverse, a sum's is a sum. On a
group of one rank each is the identity, and nothing is sent.
"""

import torch
from torch import Tensor

from omnistep.parallel.mesh import Group

_c10d = torch.ops._c10d_functional
_wait = _c10d.wait_tensor


def _to_front(x: Tensor, size: int, dim: int) -> Tensor:
    """[size, ...]: equal pieces along `dim`, one after another in memory. (One copy: a torch.cat of
    pieces would be compiled to a kernel for each.)"""
    return x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()


def _from_front(pieces: Tensor, dim: int) -> Tensor:
    """The inverse of `_to_front`."""
    return pieces.movedim(0, dim).contiguous().flatten(dim, dim + 1)


def _gather(x: Tensor, size: int, name: str, dim: int) -> Tensor:
    out = _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, name))
    return _from_front(out.unflatten(0, (size, -1)), dim)


def _scatter(x: Tensor, size: int, name: str, dim: int) -> Tensor:
    x = _to_front(x, size, dim).flatten(0, 1)
    return _wait(_c10d.reduce_scatter_tensor(x, "sum", size, name))


def _exchange(x: Tensor, size: int, name: str, split: int, concat: int) -> Tensor:
    counts = [1] * size
    out = _wait(_c10d.all_to_all_single(_to_front(x, size, split), counts, counts, name))
    return _from_front(out, concat)


def _shift(x: Tensor, size: int, index: int, name: str, by: int) -> Tensor:
    x = x.contiguous()
    sends, receives = [0] * size, [0] * size
    sends[(index + by) % size] = receives[(index - by) % size] = x.numel()
    out = _wait(_c10d.all_to_all_single(x.view(-1), receives, sends, name))
    return out.view(x.shape)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, name, dim):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = (size, name, dim)
        return _gather(x, size, name, dim)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _scatter(grad, *ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, name, dim):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = (size, name, dim)
        return _scatter(x, size, name, dim)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(grad, *ctx.group), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, name, split, concat):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = (size, name, concat, split)
        return _exchange(x, size, name, split, concat)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad, *ctx.group), None, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, index, name, by):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = (size, index, name, -by)
        return _shift(x, size, index, name, by)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _shift(grad, *ctx.group), None, None, None, None


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """The group's tensors one after another along `dim`."""
    return x if group.size == 1 else _AllGather.apply(x, group.size, group.name, dim)  # pyright: ignore


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's piece along `dim` of the sum of the group's tensors; `dim` must divide."""
    _check_divides(x, group, dim, "reduce_scatter")
    return x if group.size == 1 else _ReduceScatter.apply(x, group.size, group.name, dim)  # pyright: ignore


def all_to_all(x: Tensor, group: Group, split: int, concat: int) -> Tensor:
    """Cuts `x` along `split`, sends piece i to rank i, joins what arrives along `concat`."""
    _check_divides(x, group, split, "all_to_all")
    return x if group.size == 1 else _AllToAll.apply(x, group.size, group.name, split, concat)  # pyright: ignore


def permute(x: Tensor, group: Group, by: int = 1) -> Tensor:
    """What rank (index - by) holds; all ranks of the group hold one shape."""
    if group.size == 1 or by % group.size == 0:
        return x
    return _Permute.apply(x, group.size, group.index, group.name, by)  # pyright: ignore


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The group's sum ("sum") or maximum ("max"). Not differentiable."""
    if group.size == 1:
        return x
    return _wait(_c10d.all_reduce(x.detach().contiguous(), op, group.name))


def _check_divides(x: Tensor, group: Group, dim: int, what: str) -> None:
    if x.shape[dim] % group.size:
        raise ValueError(
            f"{what} over {'+'.join(group.axes)} cuts dimension {dim} of {tuple(x.shape)} into "
            f"{group.size} equal pieces, but {x.shape[dim]} does not divide"
        )

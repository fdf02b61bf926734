"""A parameter is gathered for use: forward an all-gather in the compute dtype, backward a
reduce-scatter of the gradient in fp32 or better."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omnistep.parallel.collectives import _c10d, _wait, all_reduce
from omnistep.parallel.layout import Place

Shape = tuple[int, ...]


def _join(flat: Tensor, shape: Shape, dim: int) -> Tensor:
    """[ranks, numel] pieces -> the whole, cut along `dim`. (One copy: a torch.cat would be compiled
    to a kernel for each rank.)"""
    return flat.unflatten(1, shape).movedim(0, dim).contiguous().flatten(dim, dim + 1)


def _cut(whole: Tensor, ranks: int, dim: int) -> Tensor:
    """The inverse of `_join`: [ranks, numel]."""
    return whole.unflatten(dim, (ranks, -1)).movedim(dim, 0).contiguous().flatten(1)


def _concat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def gather_pieces(pieces: Sequence[Tensor], dims: Sequence[int], size: int, name: str, dtype):
    """The whole tensors, by one all-gather."""
    flat = _concat([piece.to(dtype).reshape(-1) for piece in pieces], 0)
    every = _wait(_c10d.all_gather_into_tensor(flat.contiguous(), size, name)).view(size, -1)
    counts = [piece.numel() for piece in pieces]
    return tuple(
        _join(part, tuple(piece.shape), dim)
        for part, piece, dim in zip(every.split(counts, 1), pieces, dims, strict=True)
    )


def scatter_sums(wholes: Sequence[Tensor], dims: Sequence[int], size: int, name: str):
    """This rank's pieces of the sums over the group, in fp32 or better, by one reduce-scatter."""
    exact = [w if w.dtype == torch.float64 else w.float() for w in wholes]
    flat = _concat([_cut(w, size, dim) for w, dim in zip(exact, dims, strict=True)], 1)
    flat = flat.contiguous().view(-1)
    mine = _wait(_c10d.reduce_scatter_tensor(flat, "sum", size, name))
    shapes = [_piece_shape(w.shape, size, dim) for w, dim in zip(wholes, dims, strict=True)]
    parts = mine.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _piece_shape(shape: Sequence[int], size: int, dim: int) -> Shape:
    return tuple(n // size if i == dim else n for i, n in enumerate(shape))


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, size, name, dims, dtype, *pieces):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group, ctx.dtypes = (dims, size, name), [piece.dtype for piece in pieces]
        return gather_pieces(pieces, dims, size, name, dtype)

    @staticmethod
    def backward(ctx, *grads):
        pieces = scatter_sums(grads, *ctx.group)
        return None, None, None, None, *(g.to(d) for g, d in zip(pieces, ctx.dtypes, strict=True))


def unshard(
    pieces: Mapping[str, Tensor],
    places: Mapping[str, Place],
    dtype: torch.dtype,
    *,
    bucket: bool = False,
) -> dict[str, Tensor]:
    """The weights that a function uses, in `dtype`, from their pieces at rest. Differentiable.

    Weights whose place is not `inside` are gathered by the step; they are only cast here.
    bucket: those that are cut over the same ranks travel as one message (fsdp1), not one by one
    (fsdp2).
    """
    out = {n: p.to(dtype) for n, p in pieces.items() if not places[n].inside}
    messages: dict[tuple[str, ...], list[str]] = {}
    for name in pieces:
        if places[name].inside:
            key = places[name].gather.axes if bucket else (name,)
            messages.setdefault(key, []).append(name)
    for names in messages.values():
        group = places[names[0]].gather
        dims = tuple(places[name].dim for name in names)
        wholes = _Unshard.apply(group.size, group.name, dims, dtype, *(pieces[n] for n in names))
        out |= dict(zip(names, wholes, strict=True))  # pyright: ignore
    return {name: out[name] for name in pieces}


def gather_once(piece: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """What the step hands to the loss in place of a parameter at rest: the whole of one that no
    function gathers for itself (zero1)."""
    if place.inside or place.dim is None:
        return piece
    group = place.gather
    return gather_pieces([piece], [place.dim], group.size, group.name, dtype)[0]


def reduce_once(grad: Tensor, place: Place) -> Tensor:
    """The gradient of a piece at rest from what the loss gave this rank: summed over all ranks
    whose data it depends on. Not differentiable."""
    if place.dim is not None and not place.inside:
        group = place.gather
        grad = scatter_sums([grad], [place.dim], group.size, group.name)[0]
    return all_reduce(grad, place.reduce)

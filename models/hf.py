"""Weights from and to files in Hugging Face's layout: what is cut here is one tensor there, what is
stacked here are many. Names and shapes are those of models/hf_names.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.pieces import Box, LazyTensor, Pieces
from omnistep.core.param import Layout, Param, is_param
from omnistep.core.tree import Tree, leaves_with_names, map_with_name
from omnistep.models.hf_names import Names, Part, Shape, fused
from omnistep.parallel.layout import Place, extent, to_global, to_local
from omnistep.parallel.mesh import Mesh

READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Source(Protocol):
    """Tensors by their Hugging Face names, read in part."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Sequence[slice]) -> Tensor: ...


@frozen
class InMemory:
    """A state_dict as a Source."""

    tensors: Mapping[str, Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        return self.tensors[name].detach()[tuple(slices)]


@frozen(eq=False)
class FusedExperts:
    """A Source by the names of transformers' modules, where the experts of a layer are one tensor,
    as one by the names of files."""

    source: Source
    whole: Callable[[str], Tensor]
    """Keeps the last tensor that was read: for its next expert."""

    @classmethod
    def of(cls, source: Source) -> "FusedExperts":
        def whole(name: str) -> Tensor:
            return source.read(name, [slice(0, n) for n in source.shape(name)])

        return cls(source, lru_cache(maxsize=1)(whole))

    def shape(self, name: str) -> Shape:
        there = fused(name)
        shape = self.source.shape(there.name)
        if there.expert is None:
            return shape
        return (shape[1] // (1 if there.half is None else 2), *shape[2:])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(fused(name).name)

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        there = fused(name)
        if there.expert is None:
            return self.source.read(there.name, slices)
        expert = self.whole(there.name)[there.expert]
        if there.half is not None:
            expert = expert.chunk(2)[there.half]
        return expert[tuple(slices)]


def import_weights(
    params: Tree,
    names: Names,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
) -> Tree:
    """Our tree, leaf by leaf, as `dtype` (what is exact: in fp32 or better); a rank of a mesh reads
    only its own pieces.

    Raises ValueError, naming the tensor, where a shape differs or values are quantized.
    """

    def load(name: str, param: Param, place: Place | None = None) -> Tensor:
        shape, offset = param.shape, (0,) * len(param.shape)
        if place is not None and layout is not None:
            shape, offset = extent(place, layout.mesh)
        piece = torch.empty(shape, dtype=param.dtype(dtype), device=device)
        for part in names.parts(name, param):
            stacked = len(part.at)
            here = tuple(i - o for i, o in zip(part.at, offset, strict=False))
            if all(0 <= i < n for i, n in zip(here, shape, strict=False)):
                _check(source, part)
                block = _read(source, part, shape[stacked:], offset[stacked:])
                piece[here].copy_(block)
        return piece if place is None or layout is None else to_global(piece, place, layout.mesh)

    if layout is None:
        return map_with_name(load, params, is_leaf=is_param)
    return map_with_name(load, params, layout.places, is_leaf=is_param)


def import_blocks(
    name: str, param: Param, names: Names, source: Source, dtype: torch.dtype
) -> Iterator[tuple[Shape, Tensor]]:
    """One of our leaves as `import_weights` makes it, in blocks of one tensor there: (offset,
    values).

    Raises ValueError, naming the tensor, where a shape differs or values are quantized.
    """
    for part in names.parts(name, param):
        _check(source, part)
        stacked = len(part.at)
        shape, rest = param.shape[stacked:], (0,) * (len(param.shape) - stacked)
        values = _read(source, part, shape, rest).to(param.dtype(dtype))
        yield (*part.at, *rest), values.reshape((1,) * stacked + shape)


def _check(source: Source, part: Part) -> None:
    name = part.theirs
    if source.shape(name) != part.shape:
        raise ValueError(
            f"{name} has shape {source.shape(name)}; the configuration asks for {part.shape}"
        )
    if source.dtype(name) not in READABLE:
        raise ValueError(
            f"{name} holds {source.dtype(name)}, but quantized weights can't be read: give a model "
            f"in one of {', '.join(map(str, READABLE))}"
        )


def _read(source: Source, part: Part, shape: Shape, offset: Shape) -> Tensor:
    """A block of a tensor, `shape` at `offset` in our dimensions. Of two of these that are one
    there, whole rows of the outer one are read."""
    stacked, param = len(part.at), part.param
    whole, axes = param.shape[stacked:], param.axes[stacked:]
    spans, joined = [], None
    for i, (axis, start, size) in enumerate(zip(axes, offset, shape, strict=True)):
        if axis == "head_dim" and spans:
            outer, joined = spans.pop(), i
            spans.append(slice(outer.start * whole[i], outer.stop * whole[i]))
        else:
            spans.append(slice(start, start + size))
    block = source.read(part.theirs, spans)
    if joined is None:
        return block
    block = block.unflatten(joined - 1, (shape[joined - 1], whole[joined]))
    return block.narrow(joined, offset[joined], shape[joined])


def relayed_weights(
    params: Tree, names: Names, source: Source, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The model's weights in `source`, to be read when their turn comes, in their own dtype or as
    `dtype`. Raises ValueError, naming the tensor, where one is missing, a shape differs or values
    are quantized."""

    def read(part: Part, kept: torch.dtype) -> Tensor:
        return source.read(part.theirs, [slice(0, n) for n in part.shape]).to(kept)

    lazy = {}
    for part in names.all_parts(params):
        _check(source, part)
        kept = part.param.dtype(dtype) if dtype else source.dtype(part.theirs)
        lazy[part.theirs] = LazyTensor(part.shape, kept, partial(read, part, kept))
    return lazy


def export_weights(
    params: Tree, names: Names, values: Tree, layout: Layout | None = None
) -> dict[str, LazyTensor]:
    """Every weight by its Hugging Face name; on a mesh in the pieces that its ranks hold."""
    local = {name: to_local(value) for name, value in leaves_with_names(values).items()}
    lazy = {}
    if layout is None or layout.mesh.device_mesh is None:
        for part in names.all_parts(params):
            value = local[part.ours]
            read = partial(_part, value, part.at, part.shape)
            lazy[part.theirs] = LazyTensor(part.shape, value.dtype, read)
        return lazy
    mesh, places = layout.mesh, leaves_with_names(layout.places)
    extents = {name: extent(place, mesh) for name, place in places.items()}
    cells = {}
    for part in names.all_parts(params):
        value, (shape, offset), stacked = local[part.ours], extents[part.ours], len(part.at)
        if part.ours not in cells:
            cells[part.ours] = _cells(_holders(places[part.ours], mesh), stacked)
        held = cells[part.ours][tuple(i // n for i, n in zip(part.at, shape, strict=False))]
        here = tuple(i - o for i, o in zip(part.at, offset, strict=False))
        pieces = Pieces(part.param.shape[stacked:], held, value.device)
        read = partial(_part, value, here)
        lazy[part.theirs] = LazyTensor(part.shape, value.dtype, read, pieces)
    return lazy


def _part(value: Tensor, at: tuple[int, ...], shape: Shape | None = None) -> Tensor:
    return value[at] if shape is None else value[at].reshape(shape)


def _holders(place: Place, mesh: Mesh) -> dict[Box, tuple[int, ...]]:
    """Each part of a parameter, and the ranks that hold it."""
    held: dict[Box, list[int]] = {}
    for rank in range(mesh.world.size):
        shape, offset = extent(place, mesh, rank)
        held.setdefault((offset, shape), []).append(rank)
    return {box: tuple(ranks) for box, ranks in held.items()}


def _cells(
    holders: Mapping[Box, tuple[int, ...]], stacked: int
) -> dict[tuple[int, ...], dict[Box, tuple[int, ...]]]:
    """The same in the dimensions after the first `stacked`, for each cell of the grid that cuts
    these (by stages of a pipeline, by ranks that share experts): what lies in one has the same
    holders, so one dict serves a great many tensors."""
    cells: dict[tuple[int, ...], dict[Box, tuple[int, ...]]] = {}
    for (offset, shape), ranks in holders.items():
        cell = tuple(o // n for o, n in zip(offset[:stacked], shape[:stacked], strict=True))
        cells.setdefault(cell, {})[offset[stacked:], shape[stacked:]] = ranks
    return cells

"""Weights from and to files in Hugging Face's layout: what is cut here is one tensor there, what is
stacked here are many. Names and shapes are those of models/hf_names.py."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.pieces import Box, LazyTensor, Pieces
from omnistep.core.checkpoint.safetensors import nearest
from omnistep.core.param import Layout, Param, is_param
from omnistep.core.tree import Tree, leaves_with_names, map_with_name
from omnistep.models.hf_names import Names, Part, Shape, fused, joins
from omnistep.models.hf_vision_names import tower_prefix
from omnistep.parallel.layout import Place, extent, to_global, to_local
from omnistep.parallel.mesh import Mesh

T = TypeVar("T")

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


@frozen(eq=False)
class Found:
    """Tensors of one or several Sources, by the names of a model's weights."""

    at: Mapping[str, tuple[Source, str]]
    """Our name of a tensor -> where it is, and its name there."""
    turned: frozenset[str] = frozenset()
    """Ours of those whose last two dimensions are the other way round there."""

    def _at(self, name: str) -> tuple[Source, str]:
        if name not in self.at:
            raise ValueError(f"there is no tensor {name!r}{nearest(name, self.at)}")
        return self.at[name]

    def shape(self, name: str) -> Shape:
        source, there = self._at(name)
        shape = source.shape(there)
        return _turned(shape) if name in self.turned else shape

    def dtype(self, name: str) -> torch.dtype:
        source, there = self._at(name)
        return source.dtype(there)

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        source, there = self._at(name)
        if name not in self.turned:
            return source.read(there, slices)
        return source.read(there, _turned(tuple(slices))).transpose(-1, -2)


def _turned(dimensions: tuple[T, ...]) -> tuple[T, ...]:
    *rest, rows, columns = dimensions
    return (*rest, columns, rows)


def respelled(source: Source, held: Iterable[str], names: Names, params: Tree) -> Source:
    """A Source of these tensors by the model's names, whatever version of transformers named them,
    and Qwen3-VL-MoE's experts the right way round: in files that others wrote an expert's matrices
    are [in, out]. (Which they are transformers tells by their shape too.)"""
    if not names.spellings and not names.turned_experts:
        return source
    at = {names.spelled(name): (source, name) for name in held}
    turned = {
        part.theirs
        for part in names.all_parts(params)
        if names.turned_experts and "experts" in part.param.axes and part.theirs in at
        if part.shape != source.shape(at[part.theirs][1]) == _turned(part.shape)
    }
    return Found(at, frozenset(turned))


Files = tuple[Source, Iterable[str]]
"""Weights, and the names of those that there are."""


def composed(kind: str, language: Files | None, encoder: Files | None) -> Found:
    """A Source of a model that `compose` (models/hf_config.py) describes, from the weights of its
    text model and those of its tower, or of any model that has this tower; None: there are none.
    `kind`: the tower's model_type. Raises ValueError where they hold no such tower."""
    found: dict[str, tuple[Source, str]] = {}
    if language is not None:
        found |= {f"language_model.{name}": (language[0], name) for name in language[1]}
    if encoder is None:
        return Found(found)
    source, held = encoder[0], list(encoder[1])
    prefix = tower_prefix(kind, held)
    if prefix is None:
        raise ValueError(f"the weights of the encoder hold no {kind}, but {held[:3]} ...")
    for name in held:
        projector = name.removeprefix("model.")
        if projector.startswith("multi_modal_projector."):
            found[projector] = (source, name)
        elif name.startswith(prefix):
            found[f"vision_tower.{name.removeprefix(prefix)}"] = (source, name)
    return Found(found)


def absent(params: Tree, names: Names, source: Found, within: str = "projector.") -> set[str]:
    """The dotted names of leaves, of those that begin with `within`, that `source` does not hold
    in the model's shape."""
    return {
        part.ours
        for part in names.all_parts(params)
        if part.ours.startswith(within)
        if part.theirs not in source.at or source.shape(part.theirs) != part.shape
    }


def import_weights(
    params: Tree,
    names: Names,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
    instead: Mapping[str, Tensor] | None = None,
) -> Tree:
    """Our tree, leaf by leaf, as `dtype` (what is exact: in fp32 or better); a rank of a mesh reads
    only its own pieces. Leaves whose dotted name is in `instead` are not read, but are those.

    Raises ValueError, naming the tensor, where a shape differs or values are quantized.
    """

    def load(name: str, param: Param, place: Place | None = None) -> Tensor:
        if instead is not None and name in instead:
            return instead[name]
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
    there, whole rows of the outer one are read; of one that is several there, all of it."""
    stacked, param = len(part.at), part.param
    whole, axes = param.shape[stacked:], param.axes[stacked:]
    spans, joined = [], None
    for i, (start, size) in enumerate(zip(offset, shape, strict=True)):
        if joins(axes, i):
            outer, joined = spans.pop(), i
            spans.append(slice(outer.start * whole[i], outer.stop * whole[i]))
        else:
            spans.append(slice(start, start + size))
    if part.half is not None:
        rows, begin = spans[1], part.half * whole[1]
        spans[1] = slice(begin + rows.start, begin + rows.stop)
    if len(part.shape) > len(spans):
        last = len(spans) - 1
        spans[last:] = [slice(0, n) for n in part.shape[last:]]
        return source.read(part.theirs, spans).flatten(last).narrow(last, offset[-1], shape[-1])
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
    for theirs, (part, *_) in names.tensors(params).items():
        _check(source, part)
        kept = part.param.dtype(dtype) if dtype else source.dtype(theirs)
        lazy[theirs] = LazyTensor(part.shape, kept, partial(read, part, kept))
    return lazy | _constants(names, lazy)


def export_weights(
    params: Tree, names: Names, values: Tree, layout: Layout | None = None
) -> dict[str, LazyTensor]:
    """Every weight by its Hugging Face name; on a mesh in the pieces that its ranks hold."""
    local = {name: to_local(value) for name, value in leaves_with_names(values).items()}
    lazy = {}
    if layout is None or layout.mesh.device_mesh is None:
        for theirs, parts in names.tensors(params).items():
            read = partial(_tensor, parts, local)
            lazy[theirs] = LazyTensor(parts[0].shape, local[parts[0].ours].dtype, read)
        return lazy | _constants(names, lazy)
    mesh, places = layout.mesh, leaves_with_names(layout.places)
    extents = {name: extent(place, mesh) for name, place in places.items()}
    cells = {}
    for theirs, parts in names.tensors(params).items():
        part = parts[0]  # the second half of a tensor lies as the first does
        leaves = [local[part.ours] for part in parts]
        (shape, offset), stacked = extents[part.ours], len(part.at)
        if part.ours not in cells:
            held = _cells(_holders(places[part.ours], mesh), stacked)
            cells[part.ours] = _halved(held) if len(parts) > 1 else held
        held = cells[part.ours][tuple(i // n for i, n in zip(part.at, shape, strict=False))]
        here = tuple(i - o for i, o in zip(part.at, offset, strict=False))
        whole = part.param.shape[stacked:]
        whole = (whole[0], len(parts), *whole[1:]) if len(parts) > 1 else whole
        pieces = Pieces(whole, held, leaves[0].device)
        read = partial(_piece, leaves, here)
        lazy[theirs] = LazyTensor(part.shape, leaves[0].dtype, read, pieces)
    return lazy | _constants(names, lazy)


def _constants(names: Names, others: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Of one dtype with the others."""
    dtype = next(iter(others.values())).dtype
    return {
        name: LazyTensor(shape, dtype, partial(torch.full, shape, value, dtype=dtype))
        for name, (shape, value) in names.constants.items()
    }


def _tensor(parts: Sequence[Part], leaves: Mapping[str, Tensor]) -> Tensor:
    return joined(parts, [leaves[part.ours][part.at] for part in parts])


def _piece(leaves: Sequence[Tensor], at: tuple[int, ...]) -> Tensor:
    return _stacked([leaf[at] for leaf in leaves])


def joined(parts: Sequence[Part], values: Sequence[Tensor]) -> Tensor:
    """A tensor as files have it, of the values of all its parts."""
    return _stacked(values).reshape(parts[0].shape)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One tensor, or two that are the halves of each expert's rows."""
    return values[0] if len(values) == 1 else torch.stack(list(values), 1)


Cells = dict[tuple[int, ...], dict[Box, tuple[int, ...]]]


def _halved(cells: Cells) -> Cells:
    """The same with a further dimension after the experts, of both halves, which is not cut."""
    return {
        cell: {
            ((offset[0], 0, *offset[1:]), (shape[0], 2, *shape[1:])): ranks
            for (offset, shape), ranks in held.items()
        }
        for cell, held in cells.items()
    }


def _holders(place: Place, mesh: Mesh) -> dict[Box, tuple[int, ...]]:
    """Each part of a parameter, and the ranks that hold it."""
    held: dict[Box, list[int]] = {}
    for rank in range(mesh.world.size):
        shape, offset = extent(place, mesh, rank)
        held.setdefault((offset, shape), []).append(rank)
    return {box: tuple(ranks) for box, ranks in held.items()}


def _cells(holders: Mapping[Box, tuple[int, ...]], stacked: int) -> Cells:
    """The same in the dimensions after the first `stacked`, for each cell of the grid that cuts
    these (by stages of a pipeline, by ranks that share experts): what lies in one has the same
    holders, so one dict serves a great many tensors."""
    cells: Cells = {}
    for (offset, shape), ranks in holders.items():
        cell = tuple(o // n for o, n in zip(offset[:stacked], shape[:stacked], strict=True))
        cells.setdefault(cell, {})[offset[stacked:], shape[stacked:]] = ranks
    return cells

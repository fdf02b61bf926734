"""Where each parameter lies: which dimension is cut by which axes of the mesh, at rest and in use.

A model names the axes of its parameters ("layers", "heads", "vocab", ...). COMPUTE says which
axis of the mesh cuts each of them while the parameter is used; a strategy says whether what is
left is cut further at rest, and when it is gathered. Everything about data parallelism is decided
here:

    strategy  at rest     gathered                    gradients summed
    ddp       whole       never                       once a step (all-reduce)
    zero1     cut         once a step                 once a step (reduce-scatter)
    zero2     cut         by each micro-batch, kept   by each micro-batch (reduce-scatter)
              for its backward pass
    zero3     cut         by each layer, forward      by each micro-batch (reduce-scatter)
              and again backward

With dp_replicate above 1 (HSDP) the pieces are summed over it too, once a step.
"""

import math
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from omnistep.parallel.mesh import AXES, EXPERT_AXES, Group, Mesh, MeshError

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]

COMPUTE = {
    "layers": "pp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "vocab": "tp",
    "experts": "ep",
}
"""Name of a parameter's axis -> the axis of the mesh that cuts it while it is used."""
STACKS = ("layers", "dense_layers", "vision_layers", "deepstack")
"""Axes along which the weights of layers are stacked. The few dense layers of a model with experts,
and a tower's, are not shared by the stages of a pipeline: each stage has them all and uses what it
runs."""


@frozen
class Place:
    """How one parameter lies on the mesh.

    In use, dimension i is cut by the axis compute[i]. At rest, dimension `dim` is cut further
    into gather.size pieces. The gradient of a piece is summed over `reduce`, the ranks that hold
    a copy of it.
    """

    shape: tuple[int, ...]
    """Of the whole."""
    compute: tuple[str | None, ...]
    dim: int | None = None
    gather: Group = field(factory=Group)
    reduce: Group = field(factory=Group)
    inside: bool = False
    """Gathered by the function that uses it (zero2, zero3); else by the step, if at all."""

    def cuts(self) -> dict[str, int]:
        """Axis of the mesh -> the dimension it cuts at rest."""
        cuts = {axis: i for i, axis in enumerate(self.compute) if axis is not None}
        if self.dim is not None:
            cuts |= dict.fromkeys(self.gather.axes, self.dim)
        return cuts

    def unstacked(self) -> "Place":
        """The place of one layer's part of a stacked parameter."""
        dim = None if self.dim is None else self.dim - 1
        return Place(self.shape[1:], self.compute[1:], dim, self.gather, self.reduce, self.inside)


def place(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh, strategy: Strategy
) -> Place:
    """The place of a parameter. Raises MeshError, naming it, where its sizes do not divide."""
    compute: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        cut = COMPUTE.get(axis)
        parts = 1 if cut is None else mesh.size(cut)
        if size % parts:
            raise MeshError(
                f"{name} has {size} {axis}, which {cut} = {parts} ranks cannot share evenly; "
                f"{cut} may be {divisors(size)}"
            )
        compute.append(cut if parts > 1 else None)
    rest = [a for a in (EXPERT_AXES if "ep" in compute else AXES) if a not in compute]
    rest = [a for a in rest if mesh.size(a) > 1]
    shared = [a for a in rest if a != "dp_replicate"] if strategy != "ddp" else []
    gather = mesh.group(*shared).for_weights() if shared else Group()
    dim = _rest_dimension(name, shape, axes, compute, gather)
    if dim is None:
        gather = Group()
    reduce = [a for a in rest if a not in gather.axes]
    # A weight that no layer owns is also cut over the stages of a pipeline. These run at
    # different times, so the step gathers it for all of them at once.
    inside = strategy in ("zero2", "zero3") and "pp" not in gather.axes and dim is not None
    return Place(
        tuple(shape),
        tuple(compute),
        dim,
        gather,
        mesh.group(*reduce) if reduce else Group(),
        inside,
    )


def _rest_dimension(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    compute: list[str | None],
    gather: Group,
) -> int | None:
    """The first dimension that is whole in use and divides. A vector stays whole: it would save
    little memory and cost messages in every layer instead of one a step."""
    many = [axis for axis in axes if axis not in (*STACKS, "experts", "head_dim", "one", "qkv")]
    is_vector = len(many) <= 1
    if gather.size == 1 or is_vector:
        return None
    whole = (*STACKS, "qkv")
    free = [i for i, axis in enumerate(axes) if axis not in whole and compute[i] is None]
    free.sort(key=lambda i: axes[i] == "head_dim")  # last: files hold heads x head_dim as one
    for i in free:
        if shape[i] % gather.size == 0:
            return i
    raise MeshError(
        f"{name} {dict(zip(axes, shape, strict=True))} is to be cut over {gather.size} ranks "
        f"({' x '.join(gather.axes)}), but none of {', '.join(axes[i] for i in free)} divides by "
        f"{gather.size}; numbers of ranks that would do are "
        f"{divisors(math.lcm(*(shape[i] for i in free)))}"
    )


def divisors(number: int, most: int = 12) -> str:
    """`1, 2, 4, 8`: the divisors up to 4096, the last `most` of them."""
    found = [n for n in range(1, min(number, 4096) + 1) if number % n == 0]
    return ("..., " if len(found) > most else "") + ", ".join(map(str, found[-most:]))


def extent(
    place: Place, mesh: Mesh, rank: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offset) of the piece at rest of a rank of the mesh; None is this one."""
    shape, offset = list(place.shape), [0] * len(place.shape)
    by_dim: dict[int, list[str]] = {}
    for axis, i in place.cuts().items():
        by_dim.setdefault(i, []).append(axis)
    for i, axes in by_dim.items():
        shape[i] //= mesh.size(*axes)
        offset[i] = shape[i] * mesh.index(*axes, rank=rank)
    return tuple(shape), tuple(offset)


def to_global(local: Tensor, place: Place, mesh: Mesh) -> Tensor:
    """This rank's piece as a DTensor of the whole; on one rank the tensor itself."""
    device_mesh = mesh.expert_device_mesh if "ep" in place.compute else mesh.device_mesh
    if device_mesh is None:
        return local
    cuts = place.cuts()
    placements: list[Placement] = [
        Shard(cuts[axis]) if axis in cuts else Replicate() for axis in mesh.view(*cuts)
    ]
    stride = torch.empty(place.shape, device="meta").stride()
    return DTensor.from_local(
        local,
        device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(place.shape),
        stride=stride,
    )


def to_local(tensor: Any) -> Any:
    """This rank's piece of a DTensor, sharing its memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

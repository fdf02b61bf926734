"""The mesh: how many ranks there are along each named axis, where this rank stands, and the groups
of ranks that talk to each other.

Every rank of the job is one point of the mesh. Ranks are numbered in the order of AXES, the last
axis fastest, so that neighbours (which share a machine) differ in the axis with the most traffic.
"""

import itertools
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from attrs import field, frozen
from torch.distributed.device_mesh import DeviceMesh

_c10d = torch._C._distributed_c10d

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")
"""Outermost first."""


class MeshError(ValueError):
    """Sizes that do not fit; str() says which would."""


@frozen
class Group:
    """The ranks that differ from this one in certain axes only."""

    axes: tuple[str, ...] = ()
    size: int = 1
    index: int = 0
    """This rank's place among them: row-major in the order of AXES."""
    name: str = ""
    """What the collectives know it by: the same on every rank, so that all compile one graph."""


@frozen(eq=False)
class Mesh:
    """Sizes of the axes that are larger than 1, and this rank's device."""

    device: torch.device
    sizes: Mapping[str, int] = field(factory=dict)
    rank: int = 0
    groups: Mapping[tuple[str, ...], Group] = field(factory=dict)
    device_mesh: DeviceMesh | None = None
    """Of the axes larger than 1, for the DTensors of the state; None on one rank."""

    def size(self, *axes: str) -> int:
        """Number of ranks along the axes together; an axis that is not named in `sizes` has 1."""
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"the mesh has no axis {axis!r}; its axes are {', '.join(AXES)}")
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def group(self, *axes: str) -> Group:
        """The ranks along these axes together, in any order of names."""
        self.size(*axes)
        return self.groups.get(tuple(a for a in AXES if a in axes and self.size(a) > 1), Group())

    def index(self, *axes: str, rank: int | None = None) -> int:
        """The place along the axes together of a rank of the mesh; None is this one."""
        self.size(*axes)
        index, inner = 0, math.prod(self.sizes.values())
        for axis, size in self.sizes.items():
            inner //= size
            if axis in axes:
                index = index * size + (self.rank if rank is None else rank) // inner % size
        return index

    @property
    def world(self) -> Group:
        return self.group(*AXES)

    @property
    def data_ranks(self) -> int:
        """How many ranks see different samples."""
        return self.size("dp_replicate", "dp_shard")


def make_mesh(sizes: Mapping[str, int], device: torch.device) -> Mesh:
    """The mesh of all ranks of the initialised process group; one rank needs none.

    Collective: every rank makes the same groups in the same order. Raises MeshError where the
    sizes do not multiply to the number of ranks.
    """
    sizes = {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}
    world = dist.get_world_size() if dist.is_initialized() else 1
    if math.prod(sizes.values()) != world:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "no axis above 1"
        raise MeshError(f"{shape} is {math.prod(sizes.values())} ranks, but {world} are running")
    if not sizes:
        return Mesh(device)
    rank = dist.get_rank()
    ranks = torch.arange(world).view(*sizes.values())
    groups = {}
    for count in range(1, len(sizes) + 1):
        for axes in itertools.combinations(sizes, count):
            groups[axes] = _make_group(axes, tuple(sizes), ranks, rank)
    device_mesh = DeviceMesh.from_group(
        [process_group(groups[(axis,)]) for axis in sizes],
        device.type,
        ranks,
        mesh_dim_names=tuple(sizes),
    )
    return Mesh(device, sizes, rank, groups, device_mesh)


def forget_groups() -> None:
    """Before the process ends: groups that are still known by a name of ours would outlive their
    threads and abort it."""
    _c10d._unregister_all_process_groups()


def destroy_groups() -> None:
    """Ends torch.distributed in this process, with the groups of all meshes."""
    forget_groups()
    dist.destroy_process_group()


def pick_device(init_device: str = "cuda") -> torch.device:
    """The device to compute on: CUDA where there is one and it is not declined by `cpu`."""
    if init_device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _make_group(
    axes: tuple[str, ...], names: tuple[str, ...], ranks: torch.Tensor, rank: int
) -> Group:
    inside = [names.index(axis) for axis in axes]
    outside = [i for i in range(len(names)) if i not in inside]
    rows = ranks.permute(*outside, *inside).reshape(-1, math.prod(ranks.shape[i] for i in inside))
    members = rows[(rows == rank).any(-1)].flatten().tolist()
    shape = " ".join(f"{axis}={size}" for axis, size in zip(names, ranks.shape, strict=True))
    group = Group(axes, len(members), members.index(rank), f"{'+'.join(axes)} of {shape}")
    try:
        process_group(group)
    except RuntimeError:  # the first mesh of this shape
        made = dist.group.WORLD
        if len(members) < ranks.numel():
            # only the members take part: no barrier over the whole job for each of many groups
            made = dist.new_group(members, use_local_synchronization=True)
        _c10d._register_process_group(group.name, made)
    return group


def process_group(group: Group) -> dist.ProcessGroup:
    """torch's own handle of a group of more than one rank."""
    return _c10d._resolve_process_group(group.name)

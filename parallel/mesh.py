"""The mesh: how many ranks there are along each named axis, where this rank stands, and the groups
of ranks that talk to each other.

Every rank of the job is one point of the mesh. Ranks are numbered in the order of AXES, the last
axis fastest, so that neighbours (which share a machine) differ in the axis with the most traffic.

Experts see the same ranks, in the same order, along other axes: of the ranks that differ in
dp_shard, cp, ulysses and tp, which all hold different tokens, each `ep` neighbours share the
experts (ep), and what each of them has is cut at rest over the rest of those ranks (ep_shard).
"""

import itertools
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from attrs import evolve, field, frozen
from torch.distributed.device_mesh import DeviceMesh

_c10d = torch._C._distributed_c10d

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")
"""Outermost first."""
EXPERT_AXES = ("pp", "dp_replicate", "ep_shard", "ep")
"""The same ranks as experts see them, where ep is above 1."""
INSIDE = ("dp_shard", "cp", "ulysses", "tp")
"""The axes that ep_shard and ep together are."""


class MeshError(ValueError):
    """Sizes that do not fit; str() says which would."""


@frozen
class Group:
    """The ranks that differ from this one in certain axes only."""

    axes: tuple[str, ...] = ()
    size: int = 1
    index: int = 0
    """This rank's place among them: row-major in the order of AXES (or EXPERT_AXES)."""
    name: str = ""
    """What the collectives know it by: the same on every rank, so that all compile one graph."""

    def for_weights(self) -> "Group":
        """The same ranks by another name: what tells weights that are gathered from activations
        that are, over the same ranks (parallel/remat.py gathers the former again)."""
        return evolve(self, name=f"{self.name}, weights") if self.name else self


ALONE = Group()
"""This rank only."""


@frozen(eq=False)
class Mesh:
    """Sizes of the axes that are larger than 1, and this rank's device."""

    device: torch.device
    sizes: Mapping[str, int] = field(factory=dict)
    rank: int = 0
    groups: Mapping[tuple[str, ...], Group] = field(factory=dict)
    device_mesh: DeviceMesh | None = None
    """Of the axes larger than 1, for the DTensors of the state; None on one rank."""
    expert_sizes: Mapping[str, int] = field(factory=dict)
    """The same ranks along EXPERT_AXES; empty where ep is 1."""
    expert_device_mesh: DeviceMesh | None = None

    def size(self, *axes: str) -> int:
        """Number of ranks along the axes together; an axis that is not named in `sizes` has 1."""
        sizes = self.view(*axes)
        return math.prod(sizes.get(axis, 1) for axis in axes)

    def view(self, *axes: str) -> Mapping[str, int]:
        """The sizes of the axes larger than 1 in the view of the ranks that has these axes.

        Raises ValueError where there is none.
        """
        if all(axis in AXES for axis in axes):
            return self.sizes
        if not all(axis in EXPERT_AXES for axis in axes):
            unknown = [axis for axis in axes if axis not in (*AXES, *EXPERT_AXES)]
            raise ValueError(
                f"the mesh has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}, for experts "
                f"{', '.join(EXPERT_AXES)}"
                if unknown
                else f"{', '.join(axes)} are not axes of one view of the ranks"
            )
        return self.expert_sizes

    def group(self, *axes: str) -> Group:
        """The ranks along these axes together, in any order of names."""
        sizes = self.view(*axes)
        return self.groups.get(tuple(axis for axis in sizes if axis in axes), Group())

    def index(self, *axes: str, rank: int | None = None) -> int:
        """The place along the axes together of a rank of the mesh; None is this one."""
        sizes = self.view(*axes)
        index, inner = 0, math.prod(sizes.values())
        for axis, size in sizes.items():
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
    experts = _expert_sizes(sizes)
    sizes = {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}
    world = dist.get_world_size() if dist.is_initialized() else 1
    if math.prod(sizes.values()) != world:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "no axis above 1"
        raise MeshError(f"{shape} is {math.prod(sizes.values())} ranks, but {world} are running")
    if not sizes:
        return Mesh(device)
    rank = dist.get_rank()
    groups, device_mesh = _make_groups(sizes, rank, device, {})
    if not experts:
        return Mesh(device, sizes, rank, groups, device_mesh)
    groups, expert_mesh = _make_groups(experts, rank, device, groups)
    return Mesh(device, sizes, rank, groups, device_mesh, experts, expert_mesh)


def _expert_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of EXPERT_AXES, those larger than 1; none where experts are not shared."""
    ep, inside = sizes.get("ep", 1), math.prod(sizes.get(axis, 1) for axis in INSIDE)
    if ep == 1:
        return {}
    if inside % ep:
        fit = [n for n in range(1, inside + 1) if inside % n == 0]
        raise MeshError(
            f"ep {ep} does not divide the {inside} ranks of {' x '.join(INSIDE)}; ep may be "
            f"{', '.join(map(str, fit))}"
        )
    outer = {axis: sizes.get(axis, 1) for axis in EXPERT_AXES[:2]}
    every = {**outer, "ep_shard": inside // ep, "ep": ep}
    return {axis: size for axis, size in every.items() if size > 1}


Groups = dict[tuple[str, ...], Group]


def _make_groups(
    sizes: Mapping[str, int], rank: int, device: torch.device, known: Groups
) -> tuple[Groups, DeviceMesh]:
    """A group for every choice of axes, besides the `known` ones; the DeviceMesh of all."""
    ranks, groups = torch.arange(math.prod(sizes.values())).view(*sizes.values()), dict(known)
    for count in range(1, len(sizes) + 1):
        for axes in itertools.combinations(sizes, count):
            if axes not in groups:
                groups[axes] = _make_group(axes, tuple(sizes), ranks, rank)
    device_mesh = DeviceMesh.from_group(
        [process_group(groups[(axis,)]) for axis in sizes],
        device.type,
        ranks,
        mesh_dim_names=tuple(sizes),
    )
    return groups, device_mesh


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
        for known in (group, group.for_weights()):
            _c10d._register_process_group(known.name, made)
    return group


def process_group(group: Group) -> dist.ProcessGroup:
    """torch's own handle of a group of more than one rank."""
    return _c10d._resolve_process_group(group.name)

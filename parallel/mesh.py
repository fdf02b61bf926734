"""The mesh: how many ranks there are along each named axis, and the device each computes on."""

import math
from collections.abc import Mapping

import torch
from attrs import field, frozen

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")
"""Outermost first: neighbouring ranks differ in the last axis, where traffic is heaviest."""


@frozen
class Mesh:
    """Sizes of the axes that are larger than 1, and this rank's device."""

    device: torch.device
    sizes: Mapping[str, int] = field(factory=dict)

    def size(self, *axes: str) -> int:
        """Number of ranks along the axes together; an axis that is not named in `sizes` has 1."""
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"the mesh has no axis {axis!r}; its axes are {', '.join(AXES)}")
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def data_ranks(self) -> int:
        """How many ranks see different samples."""
        return self.size("dp_replicate", "dp_shard")


def pick_device(init_device: str = "cuda") -> torch.device:
    """The device to compute on: CUDA where there is one and it is not declined by `cpu`."""
    if init_device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

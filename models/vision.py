"""Images in front of a language model: the tower's vectors are put where the tokens stand for them.

The ranks of (cp, ulysses, tp) share the patches of their rows; each needs the vectors of its own
tokens only, but these may come from any of them, so all get all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.batch import Batch
from omnistep.core.param import Layout
from omnistep.core.tree import Tree
from omnistep.models.block import ranks_of
from omnistep.models.config import Config
from omnistep.models.tower import make_tower
from omnistep.parallel.collectives import all_gather
from omnistep.parallel.experts import spread
from omnistep.parallel.remat import Remat
from omnistep.parallel.sequence import share


class Seen(NamedTuple):
    """Hidden states after the embedding, and what the tower adds later."""

    x: Float[Tensor, "rows seq embed"]
    deepstack: Float[Tensor, "rows seq layers embed"] | None
    """Is added after the first layers of the language model, 0 for text."""


def make_see(
    cfg: Config, layout: Layout, mode: Remat, *, compile: bool
) -> Callable[[Tree, Float[Tensor, "rows seq embed"], Batch], Seen]:
    """(weights, embedded tokens of this rank, batch) -> Seen."""
    mesh = layout.mesh
    ranks, inner = ranks_of(mesh), mesh.group("ulysses", "tp")
    everyone = mesh.group("cp", "ulysses", "tp")
    assert cfg.tower is not None
    tower = make_tower(cfg.tower, layout, mode, compile=compile)

    def see(weights: Tree, x: Tensor, batch: Batch) -> Seen:
        if batch.patches is None:
            raise ValueError("the model has a tower, but the batch no patches; filler at least")
        units, deep = tower(weights, batch.patches)
        vectors = units.unsqueeze(2)
        if deep is not None:
            vectors = torch.cat([vectors, deep.movedim(0, 2)], 2)
        vectors = all_gather(vectors, everyone, 1)
        unit = share(batch.patches.units, 1, ranks.cp, inner)
        placed = place_units(vectors, unit)
        x = torch.where((unit >= 0).unsqueeze(-1), placed[:, :, 0].to(x.dtype), x)
        return Seen(x, None if deep is None else placed[:, :, 1:])

    return see


def place_units(
    vectors: Float[Tensor, "rows units *rest"], unit: Int[Tensor, "rows seq"]
) -> Float[Tensor, "rows seq *rest"]:
    """For each token the vector of its unit, zeros where it has none (-1). A unit has one token at
    most, so forward and backward both only read rows."""
    rows, units = vectors.shape[:2]
    first = torch.arange(rows, device=unit.device).unsqueeze(1) * units
    index = torch.where(unit >= 0, unit + first, -1).flatten()
    nowhere = torch.where(index >= 0, index, rows * units)
    token = torch.arange(len(index), device=unit.device)
    back = index.new_full((rows * units + 1,), -1).scatter(0, nowhere, token)[:-1]
    return spread(vectors.flatten(0, 1), index, back.unsqueeze(1)).unflatten(0, unit.shape)

"""Random batches of the same rows for every mesh, and a rank's part of them."""

import torch
from attrs import evolve

from omnistep.core.batch import Batch, Patches
from omnistep.core.tree import tree_map
from omnistep.models.config import Tower
from omnistep.parallel.mesh import Mesh

ROWS, SEQ, PATCHES = 24, 32, 64


def global_batch(
    step: int,
    packed: bool,
    dtype: torch.dtype,
    tower: Tower | None = None,
    *,
    without: int = ROWS // 4,
) -> Batch:
    """ROWS rows of SEQ tokens: samples of random lengths, or one sample and padding. With a tower,
    images of random sizes, but none in the first rows (`without`): some ranks see none."""
    batch = tokens_of_rows(step, packed, dtype)
    if tower is None:
        return batch
    g = torch.Generator().manual_seed(200 + step)
    rope = torch.randint(SEQ, (ROWS, SEQ, 3), generator=g, dtype=torch.int32)
    return evolve(batch, rope=rope, patches=patches_of_rows(tower, g, without))


def patches_of_rows(tower: Tower, g: torch.Generator, without: int) -> Patches:
    pixels = torch.randint(256, (ROWS, PATCHES, tower.values), generator=g, dtype=torch.uint8)
    places = torch.tensor([0, 0, 1, 1]).repeat(ROWS, PATCHES, 1)
    alone = torch.arange(PATCHES)
    frames = torch.stack([alone, alone + 1], 1).repeat(ROWS, 1, 1)
    windows, units = frames.clone(), torch.full((ROWS, SEQ), -1)
    for row in range(without, ROWS):
        at, token = 0, int(torch.randint(4, (), generator=g))
        while True:
            if tower.class_token:
                grid = [(-1, -1), *((i, j) for i in range(2) for j in range(2))]
                size, shown = (2, 2), list(range(1, 5))
            else:
                h, w = (2 * int(n) for n in torch.randint(1, 4, (2,), generator=g))
                blocks = [(i, j) for i in range(0, h, 2) for j in range(0, w, 2)]
                grid = [(i + a, j + b) for i, j in blocks for a in range(2) for b in range(2)]
                size, shown = (h, w), list(range(len(blocks)))
            if at + len(grid) > PATCHES or token + len(shown) > SEQ:
                break
            here = slice(at, at + len(grid))
            places[row, here] = torch.tensor([(*place, *size) for place in grid])
            frames[row, here] = torch.tensor([at, at + len(grid)])
            for begin in range(at, at + len(grid), 8):  # any cut of whole units
                end = min(begin + 8, at + len(grid))
                windows[row, begin:end] = torch.tensor([begin, end])
            units[row, token : token + len(shown)] = at // tower.unit + torch.tensor(shown)
            at, token = at + len(grid), token + len(shown) + 3
    kinds = (places, frames, windows, units)
    places, frames, windows, units = (x.to(torch.int32) for x in kinds)
    return Patches(pixels, places, frames, units, windows if tower.window else None)


def tokens_of_rows(step: int, packed: bool, dtype: torch.dtype) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(64, (ROWS, SEQ), generator=g)
    targets = tokens.roll(-1, 1)
    weights = (torch.rand(ROWS, SEQ, generator=g) < 0.8).to(dtype)
    index = torch.arange(SEQ).expand(ROWS, SEQ)
    if packed:
        begins = torch.rand(ROWS, SEQ, generator=g) < 0.12
        begins[:, 0] = True
        starts = torch.where(begins, index, 0).cummax(1).values
        return Batch(tokens, targets, weights, positions=index - starts)
    lengths = torch.randint(SEQ // 3, SEQ + 1, (ROWS, 1), generator=g)
    real = index < lengths
    return Batch(tokens, targets, weights * real, positions=torch.where(real, index, 0))


def my_rows(batch: Batch, mesh: Mesh, accumulate: int) -> Batch:
    """This data rank's rows of the global batch, as micro-batches."""
    group = mesh.group("dp_replicate", "dp_shard")

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = x.chunk(group.size)[group.index]
        return x if accumulate == 1 else x.unflatten(0, (accumulate, -1))

    return tree_map(cut, batch)

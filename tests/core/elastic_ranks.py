"""Saves a training position on every mesh of CASES and restores each on others.

`main([DIRECTORY, "some" | "all"])`: the ranks of all meshes are forked from this process, which has
imported everything; meshes of as many ranks share them. Writes how many restores there were.
"""

import functools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from attrs import evolve
from torch import Tensor
from torch.distributed.tensor import DTensor

import omnistep.core.checkpoint.catalogue  # before the fork, while no jax backend exists
import omnistep.core.checkpoint.dcp  # noqa: F401
from omnistep.bin.position import Position
from omnistep.core import param, rng
from omnistep.core.checkpoint.store import Format, open_store
from omnistep.core.param import Layout
from omnistep.core.step import TrainState, init_state
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.data.state import DataState
from omnistep.models import decoder
from omnistep.parallel.layout import Strategy, extent, to_local
from omnistep.parallel.mesh import destroy_groups, make_mesh
from tests.core.checkpoint_states import assert_same_bits
from tests.parallel.matrix import MODELS, Case, optimizer

MESHES: tuple[tuple[str, Strategy], ...] = (
    ("", "ddp"),
    ("dp_replicate 2", "ddp"),
    ("dp_shard 2", "zero1"),
    ("tp 2", "ddp"),
    ("pp 2", "ddp"),
    ("cp 2", "zero3"),
    ("dp_shard 4", "zero3"),
    ("dp_shard 2, tp 2", "zero3"),
    ("pp 2, dp_shard 2", "zero2"),
    ("dp_replicate 2, dp_shard 2", "zero3"),
    ("tp 2, ep 2", "zero3"),
    ("dp_shard 4, ep 2", "zero3"),
    ("pp 2, ulysses 2, ep 2", "ddp"),
)
CASES = tuple(Case(sizes, strategy, "bias", dtype="fp32") for sizes, strategy in MESHES)
MODEL = evolve(MODELS["bias"], layers=5, windows=(), experts=MODELS["deepseek"].experts)
TREE = decoder.params(MODEL)
CPU = torch.device("cpu")


DISTANCES = (0, 1, 5)
"""In the round of CASES, from a mesh to those that restore what it saved, where not all do: every
mesh restores what three saved, and what it saved is restored by three."""


def is_wanted(source: Case, target: Case, which: str) -> bool:
    distance = (CASES.index(target) - CASES.index(source)) % len(CASES)
    return which == "all" or distance in DISTANCES


def values(seed: int, layout: Layout | None) -> Tree:
    return param.initialize(TREE, rng.key(seed), torch.float32, CPU, layout)


def position(layout: Layout | None) -> Position:
    """Of a run after 5 steps, no two tensors of which are equal; plain tensors without a layout."""
    state = init_state(values(1, layout), optimizer(TREE), rng.key(4))
    picked = optimizer(TREE).picked
    moments = {
        "mu": picked(values(2, layout)),
        "nu": picked(values(3, layout)),
        "count": torch.tensor(5),
    }
    assert state.opt_state.keys() == moments.keys()
    state = TrainState(torch.tensor(6), state.params, moments, state.key)
    data = DataState(step=6, row=17, held=((0, 1, 2), (3, 4, 5)), made_with={"seed": 42})
    return Position(state, data, {"tokens": 1234.0, "skipped": 0.0}, {"model_type": "llama"})


def abstract(layout: Layout) -> Tree:
    """As omnistep.bin.position asks for it."""
    weights = param.abstract(TREE, torch.float32, layout)
    state = init_state(weights, optimizer(TREE), rng.key(0, "meta"))
    return {"state": state, "data": "", "meters": "", "model": ""}


def part(name: str, whole: Tensor, layout: Layout) -> Tensor:
    """What this rank should hold of a leaf."""
    places = leaves_with_names(layout.places)
    at = next((places[key] for key in places if name.endswith(f".{key}")), None)
    if at is None:
        return whole
    shape, offset = extent(at, layout.mesh)
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


@functools.cache
def wanted_leaves() -> dict[str, Any]:
    return leaves_with_names(position(None).tree())


def assert_restored(found: Tree, layout: Layout) -> None:
    wanted = wanted_leaves()
    asked, found = leaves_with_names(abstract(layout)), leaves_with_names(found)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        if not isinstance(leaf, Tensor):
            assert found[name] == leaf, name
            continue
        assert type(found[name]) is type(asked[name]), name
        if isinstance(found[name], DTensor):
            assert found[name].placements == asked[name].placements, name
        assert_same_bits({name: to_local(found[name])}, {name: part(name, leaf, layout)})


def run_rank(folder: Path, which: str, world: int, rank: int) -> None:
    if world > 1:
        where = f"file://{folder}/rendezvous{world}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    mine = [case for case in CASES if case.ranks == world]
    layouts = [
        param.make_layout(TREE, make_mesh(case.mesh_sizes, CPU), case.strategy, torch.float32)
        for case in mine
    ]
    for format in get_args(Format):
        for case, layout in zip(mine, layouts, strict=True):
            store = open_store(place(folder, format, case), format=format)
            store.save(6, position(layout).tree())
            store.close()
    count = 0
    for format in get_args(Format):
        for source in CASES:
            while not (place(folder, format, source) / "6").exists():
                time.sleep(0.02)  # other ranks save it
            store = open_store(place(folder, format, source))
            for case, layout in zip(mine, layouts, strict=True):
                if not is_wanted(source, case, which):
                    continue
                try:
                    assert_restored(store.restore(abstract(layout)), layout)
                except Exception as error:
                    error.add_note(f"{format}: saved on {source}, restored on {case}")
                    raise
                count += source != case
            store.close()
    (folder / f"count{world}.{rank}").write_text(json.dumps(count))
    if world > 1:
        destroy_groups()


def place(folder: Path, format: Format, case: Case) -> Path:
    return folder / format / str(case).replace(", ", "_").replace(" ", "-")


def fork_rank(folder: Path, which: str, world: int, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        # a forked process makes torch's pool anew at the first use, which threads must not race for
        torch.set_num_threads(1)
        run_rank(folder, which, world, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(argv: list[str]) -> int:
    folder, which = Path(argv[0]), argv[1]
    worlds = sorted({case.ranks for case in CASES})
    ranks = {fork_rank(folder, which, world, rank) for world in worlds for rank in range(world)}
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0

"""Saving and restoring beside torch.distributed.checkpoint (DCP), on 2 ranks.

    python -m tests.benchmarks.checkpoint

The state is that of a decoder: fp32 parameters and two moments, cut by ZeRO-3. Each contestant is
two processes of its own, which save and restore in turn with the others. All may overwrite the
state as soon as the save returns. DCP's asynchronous save is given a `DefaultStager` of the
caller's, which keeps its staging buffers from one save to the next; with its default, which does
not, each save has the page faults of a first one.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from omnistep.core import optim, param, rng
from omnistep.core.checkpoint.store import open_store
from omnistep.core.step import init_state
from omnistep.core.tree import leaves_with_names, map_with_name, tree_leaves
from omnistep.models import decoder
from omnistep.parallel.layout import to_local
from omnistep.parallel.mesh import make_mesh
from tests.benchmarks.gate import Process

CONTESTANTS = {
    "orbax": "Omnistep",
    "dcp": "Omnistep, checkpoint_format dcp",
    "async": "DCP async_save, staging kept",
    "default": "DCP async_save, default",
    "sync": "DCP save",
}
RANKS = 2
Named = dict[str, Any]


# --- one rank of a contestant -------------------------------------------------------------------


def model(megabytes: int) -> decoder.Config:
    """Of about `megabytes` of parameters and moments."""
    layers = max(1, round(megabytes / 1060 * 10))
    return decoder.Config(
        vocab=16384, embed=768, layers=layers, heads=12, kv_heads=4, head_dim=64, mlp=2048
    )


def make_state(megabytes: int) -> Named:
    cpu = torch.device("cpu")
    tree = decoder.params(model(megabytes))
    layout = param.make_layout(tree, make_mesh({"dp_shard": RANKS}, cpu), "zero3", torch.float32)
    weights = param.initialize(tree, rng.key(0), torch.float32, cpu, layout)
    state = leaves_with_names(init_state(weights, optim.adamw(), rng.key(1)))
    for i, leaf in enumerate(state.values()):
        if leaf.is_floating_point():  # all pages touched
            to_local(leaf).add_(i)
    return state


class Ours:
    def __init__(self, folder: Path, format: Any):
        self.store = open_store(folder, format=format, keep=1)

    def save(self, step: int, state: Named) -> Callable[[], float]:
        """Returns what waits for the commit and tells the seconds since the call."""
        self.store.save(step, state)
        return self._wait

    def _wait(self) -> float:
        self.store.wait()
        return self.store.saved[-1].seconds

    def restore(self, step: int, state: Named) -> Named:
        return self.store.restore(map_with_name(lambda _, leaf: empty(leaf, "meta"), state), step)


class Torch:
    def __init__(self, folder: Path, name: str):
        self.folder, self.is_async = folder, name != "sync"
        self.group: Any = dist.new_group(backend="gloo")
        options = StagingOptions(False, False, False, False)  # all that is left without a GPU
        self.stager = DefaultStager(options) if name == "async" else None

    def save(self, step: int, state: Named) -> Callable[[], float]:
        began, place = time.perf_counter(), self.folder / str(step)
        if not self.is_async:
            dcp.save(state, checkpoint_id=place, process_group=self.group)
            seconds = time.perf_counter() - began
            return lambda: seconds
        ended: list[float] = []
        future = dcp.async_save(
            state, checkpoint_id=place, process_group=self.group, async_stager=self.stager
        )
        future.add_done_callback(lambda _: ended.append(time.perf_counter()))  # pyright: ignore

        def wait() -> float:
            future.result()  # pyright: ignore
            return ended[0] - began

        return wait

    def restore(self, step: int, state: Named) -> Named:
        target = {name: empty(leaf, "cpu") for name, leaf in state.items()}
        dcp.load(target, checkpoint_id=self.folder / str(step), process_group=self.group)
        if dist.get_rank() == 0 and step > 1:
            shutil.rmtree(self.folder / str(step - 1), ignore_errors=True)
        return target


def empty(leaf: Tensor, device: str) -> Tensor:
    local = torch.empty(to_local(leaf).shape, dtype=leaf.dtype, device=device)
    if not isinstance(leaf, DTensor):
        return local
    return DTensor.from_local(
        local,
        leaf.device_mesh,
        leaf.placements,
        run_check=False,
        shape=leaf.shape,
        stride=leaf.stride(),
    )


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int:
    """Makes VmHWM the memory of now, without what was freed, and returns it."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def touch_memory(size: int) -> None:
    """A virtual machine gets memory from its host when it is first touched, which takes longer than
    the page fault in it: without this, whoever saves first would pay for all."""
    torch.zeros(size // 4)


def compute(steps: int) -> float:
    """Seconds of a loop that multiplies matrices."""
    a = torch.ones(384, 384)
    began = time.perf_counter()
    for _ in range(steps):
        a = (a @ a).mul_(1 / 384)
    return time.perf_counter() - began


def run_rank(name: str, folder: Path, rank: int, megabytes: int, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    state = make_state(megabytes)
    held = sum(to_local(leaf).nbytes for leaf in state.values())
    checkpoints = folder / "checkpoints"
    contestant = Ours(checkpoints, name) if name in ("orbax", "dcp") else Torch(checkpoints, name)
    compute(50)
    loops = int(seconds / (compute(200) / 200))
    before = forget_peak()
    for step, _ in enumerate(sys.stdin, 1):
        if step == 1:
            touch_memory(3 * held)
        forget_peak()
        dist.barrier()
        alone = compute(loops)
        dist.barrier()
        began = time.perf_counter()
        wait = contestant.save(step, state)
        stall = time.perf_counter() - began
        for leaf in tree_leaves(state):  # as the next step does
            if leaf.is_floating_point():
                to_local(leaf).view(-1)[:1].neg_()
        compute(loops)
        beside = time.perf_counter() - began
        total = wait()
        peak_save = memory("VmHWM") - before
        dist.barrier()
        base, began = forget_peak(), time.perf_counter()
        found = contestant.restore(step, state)
        restored = time.perf_counter() - began
        peak_restore = memory("VmHWM") - base - held
        for key, leaf in found.items():
            mine, theirs = to_local(state[key]), to_local(leaf)
            if leaf.is_floating_point():
                theirs.view(-1)[:1].neg_()
            assert torch.equal(mine, theirs), key
        del found, leaf, theirs
        figures = {
            "seconds": stall,
            "total": total,
            "lost": beside - alone,
            "restore": restored,
            "extra_save": peak_save / 1e6,
            "extra_restore": peak_restore / 1e6,
            "state": held,
        }
        dist.barrier()
        print(json.dumps(figures), flush=True)


# --- all in turn --------------------------------------------------------------------------------


class Group:
    """The ranks of one contestant."""

    def __init__(self, name: str, folder: Path, megabytes: int, seconds: float):
        self.name = name
        folder.mkdir()
        command = [sys.executable, "-m", "tests.benchmarks.checkpoint", "--rank"]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.ranks = [
            Process(
                name,
                [*command, name, str(folder), str(rank), str(megabytes), str(seconds)],
                settings,
            )
            for rank in range(RANKS)
        ]

    def step(self) -> dict[str, float]:
        """Of each figure, that of the rank that is worse off."""
        with ThreadPoolExecutor(RANKS) as pool:
            figures = list(pool.map(Process.step, self.ranks))
        return {key: max(figure[key] for figure in figures) for key in figures[0]}

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


COLUMNS = {
    "seconds": ("loop held up", "{:.3f}"),
    "lost": ("loop lost in all", "{:.2f}"),
    "total": ("until committed", "{:.2f}"),
    "extra_save": ("extra MB, save", "{:.0f}"),
    "restore": ("restore", "{:.2f}"),
    "extra_restore": ("extra MB, restore", "{:.0f}"),
}


def row(label: str, rounds: list[dict[str, float]]) -> str:
    cells = [
        form.format(statistics.median(r[key] for r in rounds)) for key, (_, form) in COLUMNS.items()
    ]
    return f"| {label} | {' | '.join(cells)} |"


def ratios(label: str, rounds: list[dict[str, float]], others: list[dict[str, float]]) -> str:
    """Medians of the rounds' own."""
    cells = [
        f"{statistics.median(a[key] / b[key] for a, b in zip(rounds, others, strict=True)):.2f}"
        if not key.startswith("extra")
        else ""
        for key in COLUMNS
    ]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=1060)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the loop beside each save")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--directory", help="where to save; default: a temporary directory")
    chosen = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen.contestants}
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        groups = [
            Group(name, Path(folder, name), chosen.megabytes, chosen.seconds) for name in found
        ]
        try:
            for i in range(chosen.rounds):
                for group in groups[i % len(groups) :] + groups[: i % len(groups)]:
                    found[group.name].append(group.step())
                print(f"round {i + 1} of {chosen.rounds}", file=sys.stderr)
        finally:
            for group in groups:
                group.end()
    size = next(iter(found.values()))[0]["state"] * RANKS / 1e9
    held = size * 1e3 / RANKS
    head = " | ".join(title for title, _ in COLUMNS.values())
    print(
        f"{size:.2f} GB on {RANKS} ranks; seconds; MB of a rank beyond its {held:.0f} of state.\n"
    )
    print(f"| | {head} |\n|{' --- |' * (1 + len(COLUMNS))}")
    for name, rounds in found.items():
        print(row(f"{CONTESTANTS[name]}: first save", rounds[:1]))
        print(row(f"{CONTESTANTS[name]}: later", rounds[1:]))
    for name in found:
        if name != "async" and "async" in found:
            print(ratios(f"{CONTESTANTS[name]} / async", found[name][1:], found["async"][1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        name, folder, rank, megabytes, seconds = sys.argv[2:]
        run_rank(name, Path(folder), int(rank), int(megabytes), float(seconds))
    else:
        main()

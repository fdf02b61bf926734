"""How the memory of one rank falls with the number of ranks (ZeRO-3).

    python -m tests.benchmarks.mesh_memory

measures a compiled step on 1, 2 and 4 ranks of this machine, and works it out for up to 256 without
running them (no matrix of this model can be cut for more). Measured is the largest sum of the
tensors that lived at one time; gloo's own copies of what it sends are not among them.
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from omnistep.core import param
from omnistep.core.tree import tree_leaves
from omnistep.models import decoder
from omnistep.parallel.mesh import destroy_groups, make_mesh
from omnistep.parallel.remat import Remat
from tests.parallel.counting import footprint, measure
from tests.parallel.hollow import Watch, visible_buffers
from tests.parallel.paper import Setting

MODEL = decoder.Config(
    vocab=512, embed=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=1024
)


def setting(ranks: int, mode: Remat, compute: torch.dtype = torch.float32) -> Setting:
    """One row of 64 tokens on every rank."""
    sizes = {"dp_shard": ranks} if ranks > 1 else {}
    return Setting(MODEL, sizes, "zero3", mode, compute=compute, rows=1, seq=64)


def state_bytes(s: Setting) -> int:
    """Of weights and two moments, exactly: matrices are cut over the ranks, vectors are not. Step,
    count and key take 8, 8 and 16 bytes."""
    leaves = tree_leaves(decoder.params(s.cfg), is_leaf=param.is_param)
    vector = [sum(axis != "layers" for axis in p.axes) == 1 for p in leaves]
    sizes = [math.prod(p.shape) * s.weights.itemsize for p in leaves]
    matrices = sum(size for size, v in zip(sizes, vector, strict=True) if not v)
    vectors = sum(size for size, v in zip(sizes, vector, strict=True) if v)
    assert matrices % s.size("dp_shard") == 0
    return 3 * (matrices // s.size("dp_shard") + vectors) + 32


def peak_bytes(s: Setting, kept: int, kept_by_all: int) -> int:
    """The most that one rank should need: the state and the gradients (a third of it), what the
    layers keep for the backward pass, and one layer at work: its whole weights, its largest
    gradient, whole, and what it computes again.

    kept: by the forward pass on one rank, with recomputation as `s` says; kept_by_all: without.
    """
    layer = [math.prod(p.shape[1:]) for p in decoder.params(s.cfg)["layers"].values()]
    whole = sum(layer) * s.compute.itemsize + max(layer) * s.weights.itemsize
    return state_bytes(s) * 4 // 3 + kept + whole + (kept_by_all - kept) // s.cfg.layers


def measured(ranks: int, mode: Remat) -> list[int]:
    """The peak on each of the ranks, run on this machine."""
    environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.mesh_memory", folder, mode, str(ranks)]
        running = [
            subprocess.Popen([*command, str(i)], env=environ, stderr=subprocess.DEVNULL)
            for i in range(ranks)
        ]
        codes = [rank.wait() for rank in running]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        return [int((Path(folder) / f"peak{i}").read_text()) for i in range(ranks)]


def run_rank(folder: Path, mode: Remat, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    s = setting(ranks, mode)
    if ranks > 1:
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = make_mesh(dict(s.sizes), torch.device("cpu"))
    with visible_buffers(), Watch() as watch:
        _, _, peaks, _ = measure(s, mesh, watch.memory)
    (folder / f"peak{rank}").write_text(str(max(peaks.values())))
    if ranks > 1:
        destroy_groups()


def main() -> None:
    all_kept = footprint(setting(1, "none")).kept
    print("MB per rank; formula: state and gradients / ranks + kept activations + a layer at work\n")
    print("| recomputation | ranks | state | activations | formula | worked out | measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    modes: tuple[Remat, ...] = ("none", "selective", "full")
    for mode in modes:
        kept = footprint(setting(1, mode)).kept
        for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            s = setting(ranks, mode)
            found = footprint(s)
            real = max(measured(ranks, mode)) if ranks <= 4 else None
            numbers = [found.state, found.kept, peak_bytes(s, kept, all_kept), found.peak]
            cells = [f"{n / 1e6:.2f}" for n in numbers] + [f"{real / 1e6:.2f}" if real else ""]
            print(f"| {mode} | {ranks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder, mode, ranks, rank = sys.argv[1:]
        run_rank(Path(folder), mode, int(ranks), int(rank))  # pyright: ignore[reportArgumentType]
    else:
        main()

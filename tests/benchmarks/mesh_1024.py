"""A step of a 70B model on 1,024 pretended ranks, traced and compiled in this process.

    python -m tests.benchmarks.mesh_1024 [--layers 80] [--mode full]

Llama-3-70B's shapes on dp_shard 32 x ulysses 4 x tp 8, ZeRO-3, bf16 over fp32 weights, one row of
8,192 tokens on each data rank. The train step is the real one, compiled as ever but for the C++
kernels, which are empty, on tensors without memory: what rank 0 would hold and send is exact, on a
CPU's graphs. It prints both.
"""

import argparse
import resource
import time

import torch

from omnistep.core import param
from omnistep.models import decoder
from omnistep.parallel.layout import extent
from omnistep.parallel.traffic import counted, totals
from tests.parallel.counting import make_step
from tests.parallel.hollow import Ledger, hollow_kernels
from tests.parallel.paper import Setting, minimum

LLAMA_3_70B = {
    "vocab": 128_256,
    "embed": 8192,
    "heads": 64,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp": 28_672,
    "rope_theta": 500_000.0,
}


def setting(layers: int, mode: str) -> Setting:
    return Setting(
        decoder.Config(layers=layers, **LLAMA_3_70B),
        {"dp_shard": 32, "ulysses": 4, "tp": 8},
        "zero3",
        mode,  # pyright: ignore[reportArgumentType]
        compute=torch.bfloat16,
        rows=1,
        seq=8192,
    )


def measure(s: Setting) -> dict:
    with hollow_kernels(), counted(dict(s.sizes)) as (mesh, _):
        tree = decoder.params(s.cfg)
        layout = param.make_layout(tree, mesh, s.strategy, s.compute)
        pieces = [extent(at, mesh)[0] for at in param.tree_leaves(layout.places)]
        weights = 4 * sum(torch.Size(shape).numel() for shape in pieces)
        with Ledger(mesh) as ledger:
            step, state, batch = make_step(s, mesh)
            resting = ledger.live
            ledger.restart()
            state, _ = step(state, batch)
            return {
                "weights": weights,
                "resting": resting,
                "peak": ledger.peak,
                "traffic": ledger.traffic.copy(),
            }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--mode", default="full", choices=["none", "selective", "full"])
    options = parser.parse_args()
    begin, s = time.perf_counter(), setting(options.layers, options.mode)
    found = measure(s)
    gib = 2.0**30
    print(f"{param.count(decoder.params(s.cfg)) / 1e9:.1f} B parameters, {dict(s.sizes)}")
    print(f"weights of rank 0       {found['weights'] / gib:8.2f} GiB")
    print(f"state and batch         {found['resting'] / gib:8.2f} GiB")
    print(f"peak of a step          {found['peak'] / gib:8.2f} GiB")
    for (axes, kind), total in totals(found["traffic"]).items():
        name = f"{kind} over {', '.join(axes)}"
        print(f"{name:42} {total.messages:6} messages {total.bytes / gib:9.3f} GiB")
    print("equal to the minimum on paper:", found["traffic"] == minimum(s))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - begin:.0f} s, {peak:.1f} GiB of this machine's memory")


if __name__ == "__main__":
    main()

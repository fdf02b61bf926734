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
from collections.abc import Mapping

import torch

from omnistep.core import param
from omnistep.models import decoder
from omnistep.parallel.remat import Remat
from omnistep.parallel.traffic import totals
from tests.parallel.counting import pretended
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


SIZES = {"dp_shard": 32, "ulysses": 4, "tp": 8}


def setting(cfg: decoder.Config, mode: Remat, sizes: Mapping[str, int], seq: int) -> Setting:
    return Setting(cfg, sizes, "zero3", mode, compute=torch.bfloat16, rows=1, seq=seq)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--mode", default="full", choices=["none", "selective", "full"])
    options = parser.parse_args()
    begin = time.perf_counter()
    cfg = decoder.Config(layers=options.layers, **LLAMA_3_70B)
    s = setting(cfg, options.mode, SIZES, seq=8192)
    held, traffic = pretended(s)
    gib = 2.0**30
    print(f"{param.count(decoder.params(s.cfg)) / 1e9:.1f} B parameters, {dict(s.sizes)}")
    print(f"state of rank 0         {held.state / gib:8.2f} GiB")
    print(f"kept by the layers      {held.kept / gib:8.2f} GiB")
    print(f"peak of a step          {held.peak / gib:8.2f} GiB")
    for (axes, kind), total in totals(traffic).items():
        name = f"{kind} over {', '.join(axes)}"
        print(f"{name:42} {total.messages:6} messages {total.bytes / gib:9.3f} GiB")
    print("equal to the minimum on paper:", traffic == minimum(s))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - begin:.0f} s, {peak:.1f} GiB of this machine's memory")


if __name__ == "__main__":
    main()

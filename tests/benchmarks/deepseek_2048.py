"""A step of DeepSeek-V3 on 2,048 pretended ranks, traced and compiled in this process.

    python -m tests.benchmarks.deepseek_2048 [--layers 61] [--mode full] [--seq 32768]

DeepSeek-V3's shapes (arXiv 2412.19437; the config.json that is published with its weights) on
pp 2 x dp_replicate 4 x dp_shard 32 x ulysses 8, of which each 64 neighbours share the 256 experts;
ZeRO-3, bf16 over fp32 weights, two micro-batches of one row on each data rank. The train step is
the real one, compiled as ever but for the C++ kernels, which are empty, on tensors without memory:
what a rank would hold and send is exact, on a CPU's graphs, where experts are used evenly. It
prints both for both ways of dispatch, of rank 0 (the first stage).
"""

import argparse
import resource
import time
from collections.abc import Mapping

import torch

from omnistep.core import param
from omnistep.models import decoder
from omnistep.models.config import Config, Experts, Latent
from omnistep.parallel.experts import Dispatch, choose
from omnistep.parallel.remat import Remat
from omnistep.parallel.traffic import Total, totals
from tests.parallel.counting import pretended
from tests.parallel.paper import Setting, minimum

SIZES = {"pp": 2, "dp_replicate": 4, "dp_shard": 32, "ulysses": 8, "ep": 64}
WAYS: tuple[Dispatch, Dispatch] = ("gather", "all_to_all")


def deepseek_v3(layers: int = 61) -> Config:
    return Config(
        vocab=129_280,
        embed=7168,
        layers=layers,
        heads=128,
        kv_heads=128,
        head_dim=192,
        mlp=18_432,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        latent=Latent(kv=512, nope=128, rope=64, value=128, q=1536),
        experts=Experts(
            count=256,
            top_k=8,
            mlp=2048,
            scoring="sigmoid",
            exact_logits=True,
            normalize=True,
            scale=2.5,
            groups=8,
            top_groups=4,
            group_score="top2",
            bias=True,
            shared=2048,
            dense=(0, 1, 2),
        ),
    )


def setting(
    cfg: Config, dispatch: Dispatch, mode: Remat, sizes: Mapping[str, int], seq: int
) -> Setting:
    return Setting(
        cfg,
        sizes,
        mode=mode,
        accumulate=2,
        compute=torch.bfloat16,
        rows=1,
        seq=seq,
        dispatch=dispatch,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--mode", default="full", choices=["none", "selective", "full"])
    parser.add_argument("--seq", type=int, default=32_768)
    options = parser.parse_args()
    cfg = deepseek_v3(options.layers)
    settings = [setting(cfg, way, options.mode, SIZES, options.seq) for way in WAYS]
    tokens = options.seq // settings[0].size("cp", "ulysses", "tp")
    assert cfg.experts is not None
    picked = choose(tokens, cfg.experts.top_k, cfg.experts.count, SIZES["ep"])
    print(f"{param.count(decoder.params(cfg)) / 1e9:.1f} B parameters, {SIZES}")
    print(f"{tokens} tokens of a row on each rank; the rule picks {picked}")
    found, seconds = [], []
    for s in settings:
        begin = time.perf_counter()
        found.append(pretended(s))
        seconds.append(time.perf_counter() - begin)
    row("", *WAYS)
    gib = 2.0**30
    for what in ("state", "kept", "peak"):
        row(f"{what}, GiB", *(f"{getattr(held, what) / gib:.2f}" for held, _ in found))
    sent = [totals(traffic) for _, traffic in found]
    for axes, kind in sorted({key for each in sent for key in each}):
        both = (each.get((axes, kind), Total(0, 0.0)) for each in sent)
        cells = (f"{total.messages} x, {total.bytes / gib:.3f} GiB" for total in both)
        row(f"{kind} over {', '.join(axes)}", *cells)
    row("leaves rank 0", *(f"{sum(t.bytes for t in each.values()) / gib:.1f} GiB" for each in sent))
    same = (traffic == minimum(s) for s, (_, traffic) in zip(settings, found, strict=True))
    row("equal to the minimum on paper", *map(str, same))
    row("seconds to compile and trace", *(f"{s:.0f}" for s in seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{peak:.1f} GiB of this machine's memory")


def row(name: str, *cells: str) -> None:
    print(f"{name:52}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

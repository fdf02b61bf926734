"""Pretraining speed against what a user would pick instead, on one machine, in one run.

    python -m tests.benchmarks.pretrain --litgpt-python .venv-litgpt/bin/python

The common work: a Qwen3 of 8 layers, width 512, 8 heads and 4 key/value heads of 64, MLP 1408,
vocabulary 8192, tied (27.8 M parameters), 4 x 512 tokens a step, AdamW, clipping at 1, fp32; the
same initial weights and tokens for all. Three things are measured:

- start of the process to the end of the first step, with an empty and with a filled compilation
  cache, one contestant at a time;
- paired: all contestants wait at a gate and step in turn, A B C, C B A, ..., so that all see the
  same machine; the ratio of two is the median over the rounds. Peak resident memory after them;
- the machine's ceiling in matrix products of fp32, and each contestant's share of it.

The HF Trainer needs `pip install accelerate`; litgpt lives in a virtual environment of its own
(`pip install torch==2.13.0 litgpt==0.5.13`), since it pins older libraries.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.benchmarks.gate import Process, paired
from tests.benchmarks.work import TOKENS, flops_per_step

HERE = Path(__file__).parent
CONTESTANTS = {
    "omnistep": ("work_omnistep.py",),
    "plain torch.compile": ("work_hf.py", "--loop", "plain"),
    "HF Trainer compiled": ("work_hf.py", "--loop", "trainer"),
    "litgpt compiled": ("work_litgpt.py",),
}


def command(name: str, litgpt_python: str) -> list[str]:
    script, *options = CONTESTANTS[name]
    python = litgpt_python if name.startswith("litgpt") else sys.executable
    return [python, str(HERE / script), *options]


def contestant(name: str, options: argparse.Namespace, cache: str, steps: int) -> Process:
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name.replace(' ', '-')}",
        "OMP_NUM_THREADS": str(options.threads),
    }
    start = [*command(name, options.litgpt_python), "--steps", str(steps)]
    return Process(name, start, environment)


def warm_start(name: str, options: argparse.Namespace, cache: str) -> float:
    """Seconds to the first step with the cache that another process has filled."""
    process = contestant(name, options, cache, 2)
    process.step()
    seconds = time.time() - process.started
    process.end()
    return seconds


def ceiling(threads: int, seconds: float = 4.0) -> float:
    """GFLOP/s of the fastest of three square products in fp32, by torch.mm or by oneDNN."""
    import torch

    from omnistep.core.products import HAS_WIDE_PRODUCTS, wide_product

    torch.set_num_threads(threads)
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n), torch.randn(n, n)
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            start = time.perf_counter()
            wide_product(a, b) if HAS_WIDE_PRODUCTS else torch.mm(a, b)
            best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litgpt-python", default="", help="python of litgpt's environment")
    parser.add_argument("--only", default="", help="comma-separated contestants")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm", type=int, default=3, help="uncounted steps before the rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", default="", help="write all figures here")
    options = parser.parse_args()
    names = [n for n in CONTESTANTS if not options.only or n in options.only.split(",")]
    if not options.litgpt_python and "litgpt compiled" in names:
        print("litgpt is left out: --litgpt-python names no environment")
        names.remove("litgpt compiled")

    top = ceiling(options.threads)
    with tempfile.TemporaryDirectory() as cache:
        total = options.warm + options.rounds
        start = {name: partial(contestant, name, options, cache, total) for name in names}
        steps, cold = paired(start, options.warm, options.rounds)
        warm = {name: warm_start(name, options, cache) for name in names}
    flops = flops_per_step()
    print(f"sgemm ceiling {top:.0f} GFLOP/s with {options.threads} threads")
    heads = ("tokens/s", "ratio", "ceiling", "cold s", "warm s", "peak MB", "loss")
    print(" " * 22 + "".join(f"{head:>10}" for head in heads))
    for name in names:
        seconds = [step["seconds"] for step in steps[name]]
        ours = [step["seconds"] for step in steps[names[0]]]
        median = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(ours, seconds, strict=True))
        print(
            f"{name:22}{TOKENS / median:10.0f}{ratio:10.3f}{flops / median / top / 1e9:10.1%}"
            f"{cold[name]:10.1f}{warm[name]:10.1f}{steps[name][-1]['peak_mb']:10.0f}"
            f"{steps[name][-1]['loss']:10.5f}"
        )
    print(f"ratio: tokens/s over those of {names[0]}, median over {options.rounds} paired rounds")
    if options.json:
        figures = {"ceiling_gflops": top, "steps": steps, "cold_s": cold, "warm_s": warm}
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

"""A small mixture of experts: Omnistep and Hugging Face transformers side by side, in one run.

    python -m tests.benchmarks.moe

The common work: a Qwen3-MoE of 8 layers, width 512, 8 heads and 4 key/value heads of 64, 8 experts
of width 768 of which a token uses 2, vocabulary 8192, tied (29.4 M active parameters of 86 M), 4 x
512 tokens a step, AdamW, clipping at 1, fp32; the same initial weights and tokens for all.

transformers trains its own Qwen3MoeForCausalLM in a plain loop, with its own fused experts: as it
comes (not compiled, its default way to compute experts, which is grouped_mm), and compiled or not
with each way to compute experts that runs on CPU. Left out is batched_mm: it copies an expert's
weights for each token that uses it, 13 GB a layer here.

All contestants wait at a gate and step in turn, A B C, C B A, ..., so that all see one machine.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.benchmarks.gate import Process, paired
from tests.benchmarks.pretrain import ceiling
from tests.benchmarks.work import TOKENS, moe_flops_per_step

HERE = Path(__file__).parent
DEFAULT = "HF as it comes"
CONTESTANTS = {
    "omnistep": ("work_omnistep.py", "--model", "moe"),
    DEFAULT: ("work_moe_hf.py",),
    "HF eager": ("work_moe_hf.py", "--experts", "eager"),
    "HF grouped_mm compiled": ("work_moe_hf.py", "--compile", "--experts", "grouped_mm"),
    "HF eager compiled": ("work_moe_hf.py", "--compile", "--experts", "eager"),
}


def contestant(name: str, threads: int, cache: str, steps: int) -> Process:
    script, *options = CONTESTANTS[name]
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name.replace(' ', '-')}",
        "OMP_NUM_THREADS": str(threads),
    }
    start = [sys.executable, str(HERE / script), *options, "--steps", str(steps)]
    return Process(name, start, environment)


def machine() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs"


def table(steps: dict[str, list[dict[str, Any]]], first: dict[str, float], top: float) -> None:
    heads = ("tokens/s", "ours/it", "10 %", "90 %", "by CPU", "ceiling", "first s", "peak MB")
    print(" " * 24 + "".join(f"{head:>10}" for head in (*heads, "loss")))

    def ratios_of(name: str, figure: str) -> list[float]:
        rounds = zip(steps["omnistep"], steps[name], strict=True)
        return [theirs[figure] / ours[figure] for ours, theirs in rounds]

    for name, figures in steps.items():
        seconds, ratios = [step["seconds"] for step in figures], ratios_of(name, "seconds")
        tenths = statistics.quantiles(ratios, n=10, method="inclusive")
        median = statistics.median(seconds)
        print(
            f"{name:24}{TOKENS / median:10.0f}{statistics.median(ratios):10.3f}"
            f"{tenths[0]:10.3f}{tenths[-1]:10.3f}"
            f"{statistics.median(ratios_of(name, 'cpu_seconds')):10.3f}"
            f"{moe_flops_per_step() / median / top / 1e9:10.1%}{first[name]:10.1f}"
            f"{figures[-1]['peak_mb']:10.0f}{figures[-1]['loss']:10.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="comma-separated contestants besides omnistep")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--warm", type=int, default=6, help="uncounted steps first: oneDNN meets new shapes in them"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", default="", help="write all figures here")
    options = parser.parse_args()
    wanted = {"omnistep", *options.only.split(",")} if options.only else set(CONTESTANTS)
    if unknown := wanted - set(CONTESTANTS):
        parser.error(f"--only knows {', '.join(CONTESTANTS)}; not {', '.join(unknown)}")

    top = ceiling(options.threads)
    total = options.warm + options.rounds
    with tempfile.TemporaryDirectory() as cache:
        start = {
            name: partial(contestant, name, options.threads, cache, total)
            for name in CONTESTANTS
            if name in wanted
        }
        steps, first = paired(start, options.warm, options.rounds)
    print(
        f"{machine()}, load {os.getloadavg()[0]:.1f}, {options.threads} threads, sgemm ceiling "
        f"{top:.0f} GFLOP/s; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    table(steps, first, top)
    print(
        f"ours/it: tokens/s of omnistep over those of the line, median, first and last tenth of "
        f"{options.rounds} paired rounds; by CPU: the same of the seconds that CPUs worked, which "
        "a loaded machine changes less; first s: to the end of the first step, nothing cached"
    )
    if options.json:
        Path(options.json).write_text(json.dumps({"steps": steps, "first_s": first}, indent=1))


if __name__ == "__main__":
    main()

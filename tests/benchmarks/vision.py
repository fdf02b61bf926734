"""A small vision-language model: Omnistep and Hugging Face transformers side by side, in one run.

    python -m tests.benchmarks.vision

The common work: a Qwen2-VL of 10.0 M parameters, of which the tower and its projector have 3.5 M:
8 layers of width 256, 4 heads and 2 key/value heads of 64, MLPs of 768, vocabulary 1024, tied; a
tower of 6 layers of width 192, patches of 4 pixels a side. 32 samples a step of data/emoji, each a
picture of 64 patches (16 tokens) and a caption; AdamW, clipping at 1, fp32; the same initial
weights and samples for all, made ready before the clock starts. The losses must agree.

transformers trains its own Qwen2VLForConditionalGeneration in a plain loop on what its processor
makes, with the texts padded to the longest of the step: as it comes, and compiled. Omnistep packs
the samples of a step into one row, as long as the longest step needs.

All contestants wait at a gate and step in turn, A B C, C B A, ..., so that all see one machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.benchmarks.gate import Process, paired
from tests.benchmarks.moe import machine
from tests.benchmarks.work_vision import SAMPLES, model_config

HERE = Path(__file__).parent
CONTESTANTS = {
    "omnistep": ("work_vision_omnistep.py",),
    "HF as it comes": ("work_vision_hf.py",),
    "HF compiled": ("work_vision_hf.py", "--compile"),
}


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    fields = {name: value for name, value in model_config().items() if name != "model_type"}
    config = transformers.Qwen2VLConfig(**fields)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)


def contestant(name: str, threads: int, folder: Path, steps: int) -> Process:
    script, *options = CONTESTANTS[name]
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / name.replace(" ", "-")),
        "OMP_NUM_THREADS": str(threads),
    }
    model = ["--model", str(folder), "--steps", str(steps)]
    return Process(name, [sys.executable, str(HERE / script), *model, *options], environment)


def table(steps: dict[str, list[dict[str, Any]]], first: dict[str, float]) -> None:
    heads = ("samples/s", "ours/it", "10 %", "90 %", "by CPU", "first s", "peak MB", "loss")
    print(" " * 18 + "".join(f"{head:>10}" for head in heads))

    def ratios_of(name: str, figure: str) -> list[float]:
        rounds = zip(steps["omnistep"], steps[name], strict=True)
        return [theirs[figure] / ours[figure] for ours, theirs in rounds]

    for name, figures in steps.items():
        ratios = ratios_of(name, "seconds")
        tenths = statistics.quantiles(ratios, n=10, method="inclusive")
        median = statistics.median(step["seconds"] for step in figures)
        print(
            f"{name:18}{SAMPLES / median:10.1f}{statistics.median(ratios):10.3f}"
            f"{tenths[0]:10.3f}{tenths[-1]:10.3f}"
            f"{statistics.median(ratios_of(name, 'cpu_seconds')):10.3f}{first[name]:10.1f}"
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

    total = options.warm + options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        start = {
            name: partial(contestant, name, options.threads, folder, total)
            for name in CONTESTANTS
            if name in wanted
        }
        steps, first = paired(start, options.warm, options.rounds)
    print(
        f"{machine()}, load {os.getloadavg()[0]:.1f}, {options.threads} threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )
    table(steps, first)
    print(
        "ours/it: samples/s of omnistep over those of the line, median, first and last tenth of "
        f"{options.rounds} paired rounds; by CPU: the same of the seconds that CPUs worked, which "
        "a loaded machine changes less; first s: to the end of the first step, nothing cached"
    )
    if options.json:
        Path(options.json).write_text(json.dumps({"steps": steps, "first_s": first}, indent=1))
    for name, figures in steps.items():
        pairs = zip(figures, steps["omnistep"], strict=True)
        apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
        if apart > 1e-4:
            sys.exit(f"the losses of {name} and omnistep are {apart:.1e} apart: not the same work")


if __name__ == "__main__":
    main()

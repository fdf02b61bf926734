"""The report of a device check: `python -m tests.device.table DIRECTORY > docs/gpu.md`.

It reads what `python -m tests.device.check --out DIRECTORY` wrote.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEAD = """# On a GPU

Written by `python -m tests.device.table`, of what `python -m tests.device.check` measured on one
{device} with torch {torch}. Models have random weights; one rank,
one row of two samples, AdamW. Seconds are the mean of the calls after the first ones.
"""
LOSS = """
## The loss

Cross entropy of 8,192 tokens of width 4,096 over a vocabulary of 128,256, with both gradients, by
how many tokens have logits at one time (`CHUNK_BYTES` in models/loss.py).

| tokens a chunk | seconds | TFLOP/s | peak GB |
| --- | --- | --- | --- |
"""
LAYERS = """
## Four layers as wide as Llama-3-8B's

A whole compiled step of 8,192 tokens with embedding and head, in bf16. MFU is of 989 TFLOP/s,
without what is computed again.

| recomputation | seconds | tokens/s | MFU | peak GB | first step, seconds |
| --- | --- | --- | --- | --- | --- |
"""
ATTENTION = """
## Attention

Forward and backward over one sample of 8,192 tokens, 32 heads, 8 of keys and values, of 128.

| how | ms | TFLOP/s |
| --- | --- | --- |
"""
GRAPH = """
## A small model's step

Qwen3-0.6B, 2,048 tokens, without recomputation. Busy: the device's share of the time.

| how | ms | busy | peak GB |
| --- | --- | --- | --- |
"""
WAITS = """
## Waits

Places in a steady step at which the host waits for the device: {in_step}. Twenty steps of a small
model, reading the metrics of the step before: {reading:.1f} ms a step; without: {not_reading:.1f}.
"""
PARITY = """
## The same numbers

Loss and gradient norm after three compiled steps, against three eager ones on the CPU: the larger
relative error.

| case | error | within tolerance |
| --- | --- | --- |
"""


def table(head: str, rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> None:
    print(head, end="")
    for row in rows:
        if "failure" in row:
            print(f"| {row.get('case') or row.get('way')} | failed: {row['failure']} |")
        else:
            print(f"| {' | '.join(cells(row))} |")


def main(directory: Path) -> None:
    found: dict[str, list[Row]] = defaultdict(list)
    for line in (directory / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "done_in" not in row:
            found[row["part"]].append(row)
    print(HEAD.format(**found["probe"][0]), end="")
    table(
        LOSS,
        found["loss"],
        lambda r: [
            f"{r['chunk']:,}",
            f"{r['seconds']:.3f}",
            f"{r['flops'] / 1e12:.0f}",
            f"{r['peak_gb']:.1f}",
        ],
    )
    table(
        LAYERS,
        found["layers_of_8b"],
        lambda r: [
            r["mode"],
            f"{r['seconds']:.3f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['mfu']:.1%}",
            f"{r['peak_gb']:.1f}",
            f"{r['first_step']:.0f}",
        ],
    )
    table(
        ATTENTION,
        found["attention"],
        lambda r: [r["way"], f"{r['seconds'] * 1e3:.2f}", f"{r['flops'] / 1e12:.0f}"],
    )
    table(
        GRAPH,
        found["graph"],
        lambda r: [
            r["how"],
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['busy']:.0%}" if "busy" in r else "",
            f"{r['peak_gb']:.1f}",
        ],
    )
    for row in found["waits"]:
        numbers = {name: row[name] * 1e3 for name in ("reading", "not_reading")}
        print(WAITS.format(in_step=row["in_step"] or "none", **numbers), end="")
    table(
        PARITY,
        found["parity"],
        lambda r: [r["case"], f"{r['error']:.1e}", "yes" if r["equal"] else "**no**"],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

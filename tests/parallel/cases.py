"""The cases of the parity matrix: every axis alone, every pair, products of three and more."""

from itertools import combinations

from tests.parallel.matrix import Case

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")
VARIANTS = (
    {"model": "qwen3", "packed": True, "accumulate": 1},
    {"model": "llama", "packed": False, "accumulate": 3, "mode": "selective"},
    {"model": "bias", "packed": True, "accumulate": 3},
    {"model": "qwen3", "packed": False, "accumulate": 1, "mode": "full"},
    {"model": "llama", "packed": True, "accumulate": 3, "bucket": True},
)
"""What the cases take in turn."""

ALONE = (
    Case("dp_replicate 2", "ddp"),
    Case("dp_replicate 4", "ddp", "llama", packed=False),
    Case("dp_shard 2", "zero1", "bias", accumulate=3),
    Case("dp_shard 4", "zero1"),
    Case("dp_shard 2", "zero2", "llama", packed=False, accumulate=3),
    Case("dp_shard 4", "zero2", mode="selective"),
    Case("dp_shard 2", "zero3", "bias", accumulate=3),
    Case("dp_shard 4", "zero3", mode="full"),
    Case("dp_shard 4", "zero3", "llama", packed=False, mode="selective", bucket=True),
    *(
        Case(f"{axis} {size}", "ddp" if size == 2 else "zero3", **variant)
        for axis in ("pp", "cp", "ulysses", "tp")
        for size, variant in zip((2, 4), VARIANTS[:2], strict=True)
    ),
    Case("tp 4", "zero2", "bias", accumulate=3),
    Case("pp 4", "zero3", "bias", accumulate=6),
)
PAIRS = tuple(
    Case(f"{a} 2, {b} 2", **VARIANTS[i % len(VARIANTS)])
    for i, (a, b) in enumerate(combinations(AXES, 2))
)
PRODUCTS = (
    Case("dp_shard 2, ulysses 2, tp 2", accumulate=3),
    Case("pp 2, cp 2, tp 2", "zero3", "llama", packed=False, accumulate=3),
    Case("dp_replicate 2, dp_shard 2, cp 2", "zero3", "bias"),
    Case("dp_replicate 2, dp_shard 2, tp 2", "zero2", "llama", packed=False),
    Case("cp 2, ulysses 2, tp 2", "ddp", mode="selective"),
    Case("pp 2, dp_shard 2, ulysses 2", "zero3", "bias", accumulate=3),
    Case("dp_shard 4, tp 2", "zero1", "llama", accumulate=3),
    Case("dp_shard 8", "zero3", mode="full", accumulate=3),
)
SINGLE_PRECISION = (
    Case("dp_shard 2", dtype="fp32"),
    Case("cp 2, tp 2", "ddp", "llama", packed=False, dtype="fp32"),
    Case("pp 2, ulysses 2", "zero3", "bias", accumulate=3, dtype="fp32"),
)
COMPILED = (
    Case("dp_replicate 2", "ddp", compile=True),
    Case("dp_shard 2", "zero3", "llama", accumulate=3, compile=True),
    Case("tp 2", "zero2", mode="selective", compile=True),
    Case("ulysses 2", "zero3", packed=False, mode="full", compile=True),
    Case("cp 2", "zero3", "bias", compile=True),
    Case("pp 2", "zero3", "bias", accumulate=3, compile=True),
    Case("dp_shard 2, tp 2", "zero3", mode="selective", compile=True),
    Case("cp 2, ulysses 2", "zero3", mode="selective", bucket=True, compile=True),
)
ALL = (*ALONE, *PAIRS, *PRODUCTS, *SINGLE_PRECISION, *COMPILED)

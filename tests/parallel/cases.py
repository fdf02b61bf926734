"""The cases of the parity matrix: every axis alone, every pair, products of three and more; experts
shared by the ranks of every axis, both ways to dispatch, also where all tokens want one rank."""

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
DENSE_COMPILED = (
    Case("dp_replicate 2", "ddp", run="traced"),
    Case("dp_shard 2", "zero3", "llama", accumulate=3, run="compiled"),
    Case("ulysses 2", "zero3", packed=False, mode="full", run="traced"),
    Case("cp 2", "zero3", "bias", run="compiled"),
    Case("pp 2", "zero3", "bias", accumulate=3, run="traced"),
    Case("dp_shard 2, tp 2", "zero3", mode="selective", run="traced"),
    Case("cp 2, ulysses 2", "zero3", mode="selective", bucket=True, run="traced"),
)

EXPERTS_WHOLE = (
    Case("dp_replicate 2", "zero3", "deepseek", packed=False),
    Case("dp_shard 2", "zero3", "moe", accumulate=3, mode="selective"),
    Case("cp 2", "zero2", "deepseek"),
    Case("ulysses 2", "zero3", "moe", packed=False, mode="full"),
    Case("tp 2", "zero1", "deepseek", accumulate=3),
    Case("pp 2", "zero3", "moe", accumulate=3),
    Case("pp 4", "ddp", "deepseek", accumulate=3),
)
"""Every rank has all experts (of its layers, or its piece of them)."""
EP_ALONE = (
    Case("dp_shard 2, ep 2", "ddp", "moe", dispatch="gather"),
    Case("dp_shard 2, ep 2", "zero3", "deepseek", accumulate=3, dispatch="all_to_all"),
    Case("dp_shard 4, ep 4", "zero1", "deepseek", packed=False, dispatch="gather"),
    Case("dp_shard 4, ep 4", "zero2", "moe", mode="full", dispatch="all_to_all"),
    Case("dp_shard 8, ep 8", "zero2", "moe", dispatch="gather"),
    Case("dp_shard 8, ep 8", "zero1", "deepseek", dispatch="all_to_all"),
    Case("tp 2, ep 2", "ddp", "deepseek", mode="selective", dispatch="gather"),
    Case("tp 4, ep 4", "zero1", "moe", accumulate=3, dispatch="all_to_all"),
    Case("ulysses 4, ep 4", "zero3", "deepseek", mode="full", dispatch="gather"),
    Case("ulysses 2, ep 2", "ddp", "moe", packed=False, dispatch="all_to_all"),
    Case("cp 2, ep 2", "zero2", "moe", dispatch="gather"),
    Case("cp 2, ep 2", "zero3", "deepseek", mode="selective", dispatch="all_to_all"),
)
"""The experts' ranks are all there are, whatever else they share."""
EP_PAIRS = (
    Case("dp_shard 4, ep 2", "zero3", "moe", mode="full", dispatch="gather"),
    Case("dp_shard 4, ep 2", "zero3", "deepseek", mode="selective", dispatch="all_to_all"),
    Case("dp_shard 4, ep 2", "zero3", "moe", bucket=True),
    Case("dp_replicate 2, dp_shard 2, ep 2", "zero3", "deepseek", dispatch="gather"),
    Case("dp_replicate 2, dp_shard 2, ep 2", "ddp", "moe", packed=False, dispatch="all_to_all"),
    Case("dp_shard 2, cp 2, ep 2", "zero1", "moe", accumulate=3, dispatch="gather"),
    Case("dp_shard 2, cp 2, ep 4", "zero2", "deepseek", dispatch="all_to_all"),
    Case("dp_shard 2, ulysses 2, ep 4", "zero2", "moe", dispatch="gather"),
    Case("dp_shard 2, ulysses 2, ep 2", "zero3", "moe", dispatch="all_to_all"),
    Case("dp_shard 2, tp 2, ep 4", "zero3", "deepseek", packed=False, dispatch="gather"),
    Case("dp_shard 2, tp 2, ep 2", "zero2", "moe", accumulate=3, dispatch="all_to_all"),
    Case("dp_shard 2, tp 2, ep 4", "zero2", "deepseek", mode="full", dispatch="all_to_all"),
    Case("pp 2, dp_shard 2, ep 2", "zero3", "moe", accumulate=3, dispatch="gather"),
    Case("pp 2, tp 2, ep 2", "ddp", "deepseek", accumulate=3, dispatch="all_to_all"),
)
GPT_OSS = (
    Case("dp_shard 2, ep 2", "zero3", "gpt_oss", accumulate=3, dispatch="all_to_all"),
    Case("ulysses 2, ep 2", "zero3", "gpt_oss", packed=False, dispatch="gather"),
    Case("cp 2, tp 2, ep 2", "zero2", "gpt_oss", mode="selective", dispatch="all_to_all"),
    Case("pp 2, dp_shard 2", "zero3", "gpt_oss", accumulate=3),
)
EP_PRODUCTS = (
    Case("dp_shard 2, ulysses 2, tp 2, ep 4", "zero2", "deepseek", dispatch="all_to_all"),
    Case("pp 2, dp_shard 4, ep 2", "zero2", "deepseek", accumulate=2, dispatch="gather"),
    Case("dp_replicate 2, dp_shard 2, tp 2, ep 2", "zero3", "moe", dispatch="all_to_all"),
    Case("dp_shard 2, cp 2, tp 2, ep 8", "zero2", "moe", dispatch="gather"),
)
SKEWED = (
    Case("dp_shard 2, ep 2", "zero3", "one expert", accumulate=3, dispatch="all_to_all"),
    Case("dp_shard 4, ep 4", "ddp", "skewed", dispatch="gather"),
    Case("dp_shard 4, ep 4", "zero3", "skewed", mode="selective", dispatch="all_to_all"),
    Case("dp_shard 4, ep 2", "zero3", "one expert", dispatch="gather"),
    Case("dp_shard 2, tp 2, ep 4", "zero3", "one expert", mode="full", dispatch="all_to_all"),
    Case("pp 2, ulysses 2, ep 2", "zero3", "skewed", accumulate=3, dispatch="all_to_all"),
    Case("dp_shard 8, ep 8", "zero1", "skewed", packed=False, dispatch="all_to_all"),
)
"""All tokens go to experts of one rank."""
EP_SINGLE_PRECISION = (
    Case("dp_shard 2, ep 2", "zero3", "deepseek", dtype="fp32", dispatch="all_to_all"),
    Case("tp 2, ep 2", "ddp", "moe", packed=False, dtype="fp32", dispatch="gather"),
)
EP_COMPILED = (
    Case("dp_shard 2, ep 2", "zero3", "deepseek", run="traced", dispatch="gather"),
    Case("tp 2, ep 2", "zero3", "skewed", mode="full", run="traced", dispatch="all_to_all"),
    Case("pp 2", "zero3", "moe", accumulate=3, run="compiled"),
)

VISION = (
    Case("dp_replicate 2", "ddp", "windows", accumulate=3),
    Case("dp_shard 2", "zero1", "llava", packed=False),
    Case("dp_shard 4", "zero2", "qwen3_vl", mode="selective"),
    Case("dp_shard 4", "zero3", "qwen2_vl", mode="full"),
    Case("dp_shard 2", "zero3", "windows", accumulate=3, bucket=True),
    Case("tp 2", "zero3", "qwen3_vl", packed=False),
    Case("tp 4", "ddp", "windows"),
    Case("ulysses 2", "zero3", "llava", mode="full"),
    Case("ulysses 4", "zero2", "qwen2_vl", accumulate=3),
    Case("cp 2", "zero3", "qwen2_vl", packed=False, accumulate=3),
    Case("cp 4", "ddp", "qwen3_vl"),
    Case("pp 2", "zero3", "qwen3_vl", accumulate=3),
    Case("pp 2", "ddp", "llava", packed=False, accumulate=3),
    Case("dp_shard 2, ulysses 2", "zero3", "qwen3_vl", mode="full"),
    Case("dp_shard 2, cp 2", "zero3", "projector only", mode="selective"),
    Case("cp 2, tp 2", "zero2", "windows"),
    Case("ulysses 2, tp 2", "zero3", "qwen3_vl", accumulate=3),
    Case("pp 2, tp 2", "zero1", "projector only", accumulate=3),
    Case("pp 2, dp_shard 2", "zero3", "qwen2_vl", accumulate=3),
    Case("dp_shard 2, tp 2, ep 4", "zero3", "qwen3_vl_moe", dispatch="all_to_all"),
    Case("pp 2, dp_shard 2, ep 2", "zero3", "qwen3_vl_moe", accumulate=3, dispatch="gather"),
    Case("dp_shard 2, cp 2, tp 2", "zero3", "qwen2_vl"),
    Case("dp_shard 2, tp 2", "zero3", "qwen3_vl", packed=False, dtype="fp32"),
)
"""A tower in front; of the first rows none has an image."""
VISION_COMPILED = (Case("tp 2", "zero2", "windows", mode="selective", run="traced"),)

COMPILED = (*DENSE_COMPILED, *EP_COMPILED, *VISION_COMPILED)
ALL = (
    *(*ALONE, *PAIRS, *PRODUCTS, *SINGLE_PRECISION, *DENSE_COMPILED),
    *(*EXPERTS_WHOLE, *EP_ALONE, *EP_PAIRS, *GPT_OSS, *EP_PRODUCTS, *SKEWED),
    *(*EP_SINGLE_PRECISION, *EP_COMPILED, *VISION, *VISION_COMPILED),
)

ON_EIGHT = (PRODUCTS[2], PRODUCTS[4], EP_PRODUCTS[0])
"""Of the cases on eight ranks, those that every run of the tests holds."""
STOOD_FOR = (VISION[2], VISION[6], VISION[8], VISION[16], VISION[17], VISION[20], VISION[22])
STOOD_FOR += (SKEWED[1], SKEWED[3], SKEWED[4])
"""Of the others, those whose axes other models with a tower, or with skewed experts, meet: left to
`-m exhaustive`."""

ON_TWO = (ALONE[6], *ALONE[11:17:2], EXPERTS_WHOLE[5], EP_ALONE[1], VISION[5])
"""Those that `make test-fast` holds too: an axis each."""

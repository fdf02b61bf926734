"""What one step sends, counted, is what paper.py says that it must send, message by message.

`python -m tests.parallel.traffic_table > docs/communication.md` writes the table.
"""

import math
from collections import Counter

import attrs
import pytest
import torch
import torch.distributed as dist

from omnistep.models import decoder
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.traffic import Message, axes_of, counted
from tests.parallel.counting import eager_traffic, footprint
from tests.parallel.paper import Setting, minimum

LLAMA = decoder.Config(vocab=64, embed=32, layers=2, heads=8, kv_heads=4, head_dim=4, mlp=64)
QWEN3 = attrs.evolve(LLAMA, tied=True, qk_norm=True)
BF16, FP64 = torch.bfloat16, torch.float64


def case(cfg: decoder.Config, sizes: str, **settings) -> Setting:
    pairs = (item.split() for item in sizes.split(",") if item.strip())
    return Setting(cfg, {axis: int(size) for axis, size in pairs}, **settings)


CASES = [
    case(QWEN3, ""),
    case(QWEN3, "dp_shard 4", strategy="ddp", accumulate=2),
    case(QWEN3, "dp_shard 4", strategy="zero1", accumulate=2),
    case(QWEN3, "dp_shard 4", strategy="zero2", accumulate=2),
    case(QWEN3, "dp_shard 4", strategy="zero3", accumulate=2),
    case(LLAMA, "dp_shard 4", bucket=True, mode="selective", compute=BF16),
    case(LLAMA, "dp_replicate 2, dp_shard 2", accumulate=2),
    case(LLAMA, "dp_replicate 2, dp_shard 2", strategy="zero1", accumulate=2),
    case(LLAMA, "tp 2"),
    case(QWEN3, "tp 4", mode="selective"),
    case(QWEN3, "tp 2", mode="full"),
    case(LLAMA, "ulysses 2"),
    case(QWEN3, "ulysses 8", mode="selective", strategy="ddp"),
    case(QWEN3, "ulysses 2", mode="full"),
    case(LLAMA, "cp 2"),
    case(QWEN3, "cp 3", mode="selective", strategy="ddp", compute=BF16, seq=24),
    case(QWEN3, "cp 2", mode="full"),
    case(QWEN3, "pp 2", accumulate=4),
    case(LLAMA, "dp_shard 2, tp 2", bucket=True, mode="full", compute=BF16),
    case(LLAMA, "dp_shard 2, ulysses 2, tp 2", compute=BF16, accumulate=2),
    case(QWEN3, "dp_shard 2, cp 2, ulysses 2, tp 2", mode="selective", strategy="zero2"),
    case(LLAMA, "pp 2, dp_shard 2, tp 2", mode="full", accumulate=2, weights=FP64, compute=FP64),
]


def name(s: Setting) -> str:
    parts = [f"{axis} {size}" for axis, size in s.sizes.items()] or ["one rank"]
    parts += [s.strategy, "qwen3" if s.cfg.tied else "llama", s.mode]
    parts += [str(s.compute).removeprefix("torch."), *["bucket"] * s.bucket]
    return ", ".join([*parts, f"accumulate {s.accumulate}"] if s.accumulate > 1 else parts)


def stages(s: Setting) -> list[tuple[int, int]]:
    """(stage, a rank of it)"""
    each = math.prod(s.sizes.values()) // s.size("pp")
    return [(stage, stage * each + each - 1) for stage in range(s.size("pp"))]


@pytest.mark.parametrize("s", CASES, ids=name)
def test_compiled_step_sends_the_minimum(s):
    for stage, rank in stages(s):
        assert footprint(s, rank).traffic == minimum(s, stage)


@pytest.mark.parametrize("s", CASES, ids=name)
def test_eager_step_sends_the_minimum(s):
    for stage, rank in stages(s):
        assert eager_traffic(s, rank) == minimum(s, stage)


@pytest.mark.parametrize("s", [case(LLAMA, ""), case(QWEN3, "", accumulate=2)], ids=name)
def test_nothing_is_sent_where_every_axis_is_1(s):
    ones = attrs.evolve(s, sizes=dict.fromkeys(("pp", "dp_shard", "cp", "ulysses", "tp"), 1))
    assert not footprint(ones).traffic
    assert not eager_traffic(ones)


def test_counting_sees_functional_and_plain_collectives():
    with counted({"dp_shard": 2, "tp": 3}, rank=4) as (mesh, messages):
        all_reduce(torch.ones(5), mesh.group("tp"))
        dist.all_reduce(torch.ones(7))
        dist.send(torch.ones(2, dtype=FP64), group_dst=0, group=dist.new_group([1, 4]))
    assert messages == [
        Message("all_reduce", ("tp",), 3, 5, "float32"),
        Message("all_reduce", ("dp_shard", "tp"), 6, 7, "float32"),
        Message("send", ("dp_shard",), 2, 2, "float64"),
    ]


def test_a_collective_that_is_not_known_raises():
    with counted({"tp": 2}), pytest.raises(RuntimeError):
        dist.broadcast(torch.ones(1), 0)


def test_axes_of_ranks():
    sizes = {"pp": 2, "dp_shard": 3, "tp": 4}
    assert axes_of([5], sizes) == ()
    assert axes_of([4, 5, 6, 7], sizes) == ("tp",)
    assert axes_of([1, 13], sizes) == ("pp",)
    assert axes_of(range(12), sizes) == ("dp_shard", "tp")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all_gather", 3 * 8),
        ("reduce_scatter", 3 / 4 * 8),
        ("all_reduce", 2 * 3 / 4 * 8),
        ("all_to_all", 3 / 4 * 8),
        ("permute", 8),
        ("send", 8),
        ("receive", 0),
    ],
)
def test_bytes_that_leave_a_rank(kind, expected):
    assert Message(kind, ("tp",), 4, 4, "bfloat16").bytes == expected


def test_a_further_message_is_a_difference():
    """The comparison is of counts, not of kinds."""
    s = case(LLAMA, "tp 2")
    assert minimum(s) + Counter([next(iter(minimum(s)))]) != minimum(s)

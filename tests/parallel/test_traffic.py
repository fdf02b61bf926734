"""What a compiled step sends is what paper asks for, message by message: no more, no less.

`python -m tests.parallel.test_traffic > docs/communication.md` writes the table.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from omnistep.models.config import Config, Experts, Latent
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.experts import Dispatch, choose
from omnistep.parallel.traffic import Message, Traffic, counted, totals
from tests.parallel.counting import pretended, traffic_of
from tests.parallel.hollow import hollow_kernels
from tests.parallel.paper import Setting, activations, minimum
from tests.tracing import without_inductor

pytestmark = pytest.mark.slow

LLAMA = Config(vocab=64, embed=32, layers=4, heads=8, kv_heads=4, head_dim=4, mlp=64)
QWEN = attrs.evolve(LLAMA, tied=True, qk_norm=True)
MOE = attrs.evolve(LLAMA, tied=True, experts=Experts(count=8, top_k=2, mlp=16, aux=0.1))
DEEPSEEK = attrs.evolve(
    LLAMA,
    kv_heads=8,
    head_dim=12,
    latent=Latent(kv=16, nope=8, rope=4, value=6, q=24),
    experts=Experts(
        count=8, top_k=2, mlp=16, bias=True, shared=16, shared_gated=True, dense=(0, 1)
    ),
)
BF16 = torch.bfloat16
GATHER: Mapping[str, Any] = {"dispatch": "gather"}
EXCHANGE: Mapping[str, Any] = {"dispatch": "all_to_all"}

DENSE = {
    "ddp": Setting(QWEN, {"dp_replicate": 2}, "ddp", accumulate=2),
    "ZeRO-1": Setting(QWEN, {"dp_shard": 2}, "zero1", accumulate=2),
    "ZeRO-2": Setting(QWEN, {"dp_shard": 2}, "zero2", accumulate=2),
    "ZeRO-3": Setting(LLAMA, {"dp_shard": 2}, accumulate=2),
    "ZeRO-3, selective, bf16": Setting(LLAMA, {"dp_shard": 4}, mode="selective", compute=BF16),
    "ZeRO-3, full": Setting(QWEN, {"dp_shard": 2}, mode="full"),
    "fsdp1": Setting(QWEN, {"dp_shard": 2}, bucket=True),
    "HSDP": Setting(LLAMA, {"dp_replicate": 2, "dp_shard": 2}),
    "tp": Setting(LLAMA, {"tp": 2}, "ddp"),
    "tp, selective, bf16": Setting(QWEN, {"tp": 2}, "ddp", mode="selective", compute=BF16),
    "tp, full": Setting(LLAMA, {"tp": 4}, "ddp", mode="full"),
    "ulysses": Setting(QWEN, {"ulysses": 2}, "ddp"),
    "ulysses 8, fewer kv heads": Setting(LLAMA, {"ulysses": 8}, "ddp", mode="full"),
    "cp": Setting(QWEN, {"cp": 2}, "ddp"),
    "cp 4, bf16": Setting(LLAMA, {"cp": 4}, "ddp", compute=BF16),
    "pp": Setting(LLAMA, {"pp": 2}, "ddp", accumulate=3),
    "pp x ZeRO-3": Setting(QWEN, {"pp": 2, "dp_shard": 2}, accumulate=2),
    "ZeRO-3 x ulysses x tp": Setting(LLAMA, {"dp_shard": 2, "ulysses": 2, "tp": 2}, compute=BF16),
    "ZeRO-2 x cp x tp": Setting(QWEN, {"dp_shard": 2, "cp": 2, "tp": 2}, "zero2"),
}


MIXTURES = {
    "experts, ZeRO-3": Setting(MOE, {"dp_shard": 2}, accumulate=2),
    "ep, gather": Setting(MOE, {"dp_shard": 2, "ep": 2}, "ddp", **GATHER),
    "ep, all_to_all": Setting(MOE, {"dp_shard": 4, "ep": 4}, "ddp", **EXCHANGE),
    "ep x ep_shard, gather, ZeRO-3, selective, bf16": Setting(
        MOE, {"dp_shard": 4, "ep": 2}, mode="selective", bucket=True, compute=BF16, **GATHER
    ),
    "ep x ep_shard, all_to_all, ZeRO-3, full": Setting(
        MOE, {"dp_shard": 4, "ep": 2}, mode="full", accumulate=2, **EXCHANGE
    ),
    # some weights are gathered over the same ranks as activations
    "ep x tp, gather, ZeRO-3": Setting(DEEPSEEK, {"tp": 2, "ep": 2}, compute=BF16, **GATHER),
    "ep x tp, all_to_all, ZeRO-3, full": Setting(
        DEEPSEEK, {"dp_shard": 2, "tp": 2, "ep": 4}, mode="full", **EXCHANGE
    ),
    "ep x ulysses, gather, ZeRO-3, full": Setting(
        DEEPSEEK, {"ulysses": 4, "ep": 2}, mode="full", compute=BF16, **GATHER
    ),
    "ep x ulysses x tp, all_to_all, HSDP": Setting(
        DEEPSEEK, {"dp_replicate": 2, "ulysses": 2, "tp": 2, "ep": 2}, mode="selective", **EXCHANGE
    ),
    "ep x cp, gather": Setting(DEEPSEEK, {"cp": 2, "ep": 2}, "zero2", **GATHER),
    "ep x pp, all_to_all": Setting(
        MOE, {"pp": 2, "dp_shard": 2, "ep": 2}, accumulate=2, **EXCHANGE
    ),
}
SETTINGS = DENSE | MIXTURES


@pytest.fixture(scope="module", autouse=True)
def _hollow() -> Iterator[None]:
    with hollow_kernels():
        yield


def traffic(setting: Setting) -> Traffic:
    """Compiled; with cp eager, as attention's real kernel would read what empty ones left. Where
    experts would, too, on tensors without memory."""
    if setting.cfg.experts:
        return pretended(setting)[1]
    return traffic_of(setting, compile=setting.size("cp") == 1)


LOWERED = ("ZeRO-3, selective, bf16", "ep, all_to_all")
"""What inductor makes of these is counted too: it sends what is in its graphs."""
STOOD_FOR = ("ep x ulysses, gather, ZeRO-3, full", "ep x tp, all_to_all, ZeRO-3, full")
"""Others meet these axes, and others this way of dispatch with full recomputation."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in STOOD_FOR else [])
        for name in SETTINGS
    ],
)
def test_what_is_sent_is_the_minimum(name):
    setting = SETTINGS[name]
    with nullcontext() if name in LOWERED else without_inductor():
        ran, paper = traffic(setting), minimum(setting)
    assert not ran - paper, "sent, and not needed"
    assert not paper - ran, "needed, and not sent"


def test_the_last_stage_of_a_pipeline_sends_the_minimum():
    setting = MIXTURES["ep x pp, all_to_all"]
    with without_inductor():
        assert pretended(setting, rank=2)[1] == minimum(setting, stage=1)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
@pytest.mark.parametrize(("top_k", "experts"), [(1, 64), (2, 64), (8, 64), (8, 256)])
def test_what_is_chosen_sends_fewer_bytes(ranks, top_k, experts):
    cfg = attrs.evolve(MOE, embed=512, experts=Experts(count=experts, top_k=top_k, mlp=16))

    def sent(dispatch: Dispatch) -> float:
        s = Setting(cfg, {"dp_shard": ranks, "ep": ranks}, "ddp", seq=512, dispatch=dispatch)
        ran: Traffic = Counter()
        activations(s, ran)
        return sum(message.bytes * count for message, count in ran.items())

    chosen = choose(2 * 512, top_k, experts, ranks)
    assert sent(chosen) == min(sent("gather"), sent("all_to_all"))


def test_axes_of_a_message_do_not_depend_on_the_order_of_sizes():
    with counted({"tp": 3, "dp_shard": 2}, rank=4) as (mesh, messages):
        all_reduce(torch.ones(5), mesh.group("tp"))
    assert messages == [Message("all_reduce", ("tp",), 3, 5, "float32")]


def test_a_call_that_is_not_counted_raises():
    with counted({"tp": 2}), pytest.raises(RuntimeError, match="No backend"):
        dist.broadcast(torch.ones(1), 0)


def test_one_rank_sends_nothing():
    assert traffic_of(Setting(QWEN, {"dp_shard": 1, "tp": 1})) == {}


HEAD = """# What is sent in a step

Written by `python -m tests.parallel.test_traffic > docs/communication.md`; `pytest tests/parallel`
holds every message to the minimum worked out in `tests/parallel/paper.py`: kind, ranks, size and
dtype. Counted at the process group in a compiled step (with cp: an eager one) of a decoder of 4
layers, width 32, 8 heads and 4 key/value heads of 4, vocabulary 64, with micro-batches of 2 x 16
tokens. Bytes are those that leave rank 0 when large messages go round a ring.

From "experts" on there are 8 experts of width 16, of which a token uses 2, and what is counted are
the operators of the compiled step, on tensors without memory. The models are Mixtral's kind, with a
load-balancing loss; with tp, ulysses or cp DeepSeek's, with latent attention, a shared expert
(gated as Qwen2-MoE's) and two dense layers. `ep` are the ranks that share the experts, `ep_shard`
those of dp_shard, cp, ulysses and tp besides. Of all_to_all no further rounds are counted: they
come where a rank has more than 1.25 times an even share of its pairs for one other.

| what | mesh | over | messages a step | bytes a step | paper |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    print(HEAD, end="")
    with hollow_kernels():
        for name, setting in SETTINGS.items():
            rows(name, setting, traffic(setting), minimum(setting))


def rows(name: str, setting: Setting, ran: Traffic, paper: Traffic) -> None:
    mesh = " x ".join(f"{axis} {size}" for axis, size in setting.sizes.items())
    paper_totals = totals(paper)
    for (axes, kind), total in totals(ran).items():
        wanted = paper_totals.get((axes, kind))
        same = "equal" if wanted == total else f"{wanted}"
        over = f"{kind} over {', '.join(axes)}"
        print(f"| {name} | {mesh} | {over} | {total.messages} | {total.bytes:.0f} | {same} |")


if __name__ == "__main__":
    main()

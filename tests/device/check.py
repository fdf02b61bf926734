"""What one GPU makes of Omnistep: does it run, are its numbers right, where does time go?

    python -m tests.device.check --out DIRECTORY

takes some eight minutes on an H100 and writes one JSON object a line into DIRECTORY/results.jsonl,
which `python -m tests.device.table` makes docs/gpu.md of. Each part stands alone: where one fails,
its line says so and the next one runs. `--only parity,loss` runs some of them; `--dry` all of them
on the CPU, tiny and eager, to see that this script runs.

It also runs with a torch older than the project asks for: arguments that this does not know are
left out, which is told.
"""

import argparse
import inspect
import json
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

from omnistep.core import optim, param, rng
from omnistep.core.batch import Batch
from omnistep.core.step import init_state, make_train_step
from omnistep.core.tree import tree_map
from omnistep.models import attention_cuda, decoder
from omnistep.models import loss as losses
from omnistep.models.config import Config, Experts
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.remat import Remat

PEAK = 989.4e12
"""FLOP/s of an H100 SXM in bf16, as its data sheet has it."""
SMALL = Config(vocab=512, embed=128, layers=2, heads=8, kv_heads=4, head_dim=16, mlp=256)
LLAMA_8B = Config(
    vocab=128256,
    embed=4096,
    layers=4,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14336,
    rope_theta=5e5,
)
"""Four of its layers: what one GPU holds with its optimizer."""
QWEN_600M = Config(
    vocab=151936,
    embed=1024,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    mlp=3072,
    qk_norm=True,
    tied=True,
)


def known_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called without the arguments that this torch does not know."""
    known = inspect.signature(function).parameters
    return lambda *args, **more: function(*args, **{n: v for n, v in more.items() if n in known})


@frozen(eq=False)
class Bench:
    """Where results go, and what they are measured on."""

    out: Path
    dry: bool
    device: torch.device

    def say(self, part: str, **row: Any) -> None:
        line = json.dumps({"part": part, **row}, default=str)
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any], count: int = 5, warm: int = 2) -> tuple[float, float]:
        """Seconds of one call, and the most GB at one time."""
        for _ in range(warm):
            call()
        self.wait()
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        seconds = (time.perf_counter() - began) / count
        return seconds, 0.0 if self.dry else torch.cuda.max_memory_allocated() / 1e9

    def build(
        self,
        cfg: Config,
        dtype: torch.dtype,
        mode: Remat,
        *,
        seq: int = 256,
        device: torch.device | None = None,
    ) -> tuple[Callable[..., Any], Any, Batch]:
        """(step, state, a batch of one row of two samples); eager on the CPU."""
        device = device or self.device
        compile = device.type == "cuda"
        tree = decoder.params(cfg)
        layout = param.make_layout(tree, Mesh(device), "ddp", dtype)
        weights = param.initialize(tree, rng.key(0, device), torch.float32, device, layout)
        optimizer = optim.adamw(learned=param.learned_mask(tree))
        step = make_train_step(
            decoder.make_stages(cfg, layout, mode=mode, compile=compile),
            optimizer,
            lambda step: torch.full((), 1e-4, device=step.device),
            layout=layout,
            compile=compile,
        )
        index = torch.arange(seq)
        tokens = (index * 7919 % cfg.vocab)[None]
        positions = torch.where(index < seq // 3, index, index - seq // 3)[None]
        batch = Batch(tokens, tokens.roll(-1, 1), torch.ones(1, seq), positions=positions)
        batch = tree_map(lambda x: x.to(device), batch)
        return step, init_state(weights, optimizer, rng.key(1)), batch


def probe(bench: Bench) -> None:
    if bench.dry:
        return bench.say("probe", torch=torch.__version__, device="cpu")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    bench.say("probe", torch=torch.__version__, device=name, memory_gb=memory / 1e9)


CASES: dict[str, tuple[Config, torch.dtype, Remat]] = {
    "fp32": (SMALL, torch.float32, "none"),
    "fp32, full recomputation": (SMALL, torch.float32, "full"),
    "fp64": (SMALL, torch.float64, "none"),
    "bf16, selective, windows": (
        evolve(SMALL, windows=(64, None)),
        torch.bfloat16,
        "selective",
    ),
    "bf16, experts": (
        evolve(SMALL, experts=Experts(count=8, top_k=2, mlp=64)),
        torch.bfloat16,
        "full",
    ),
    "bf16, sinks": (evolve(SMALL, sinks=True), torch.bfloat16, "none"),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def parity(bench: Bench) -> None:
    """Loss and gradient norm after three steps, compiled, against eager on the CPU."""
    for name, (cfg, dtype, mode) in CASES.items():
        numbers = []
        try:
            for device in (bench.device, torch.device("cpu")):
                step, state, batch = bench.build(cfg, dtype, mode, device=device)
                for _ in range(3):
                    state, metrics = step(state, batch)
                numbers.append([float(metrics["loss"]), float(metrics["grad_norm"])])
            error = max(abs(a - b) / abs(b) for a, b in zip(*numbers, strict=True))
            bench.say("parity", case=name, error=error, equal=error < TOLERANCE[dtype])
        except Exception as failure:
            bench.say("parity", case=name, failure=repr(failure)[:400])


def waits(bench: Bench) -> None:
    """What makes the host wait inside a step: nothing; and what reading metrics costs the loop."""
    if bench.dry:
        return
    cfg = evolve(SMALL, vocab=4096, embed=512, layers=4, head_dim=64, mlp=1536)
    step, state, batch = bench.build(cfg, torch.bfloat16, "full", seq=4096)
    for _ in range(3):
        state = step(state, batch)[0]
    bench.wait()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state = step(state, batch)[0]
    torch.cuda.set_sync_debug_mode("default")
    found = [f"{w.filename}:{w.lineno}" for w in seen]

    def loop(read: bool) -> float:
        nonlocal state
        last, began = None, time.perf_counter()
        for _ in range(20):
            state, metrics = step(state, batch)
            if last is not None and read:
                [float(value) for value in last.values()]
            last = metrics
        bench.wait()
        return (time.perf_counter() - began) / 20

    bench.say("waits", in_step=found[:10], reading=loop(True), not_reading=loop(False))


def loss_chunks(bench: Bench) -> None:
    """Cross entropy of Llama-3-8B's 8,192 tokens, both gradients, by the size of its chunks."""
    tokens, embed, vocab = (64, 32, 512) if bench.dry else (8192, 4096, 128256)
    kind, kept = bench.device.type, dict(losses.CHUNK_BYTES)
    hidden = torch.randn(tokens, embed, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, embed, device=bench.device) * 0.02
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=bench.device)
    ones = torch.ones(tokens, device=bench.device)
    for size in (16 << 20, 256 << 20, 1 << 30, 2 << 30):
        losses.CHUNK_BYTES[kind] = size
        function = losses.make_linear_cross_entropy(compile=not bench.dry)

        def both(function: Any = function) -> Any:
            return torch.autograd.grad(function(hidden, weight, targets, ones), (hidden, weight))

        seconds, peak = bench.timed(both, 3, 1)
        chunk = losses.chunk_tokens(tokens, vocab, kind)
        products = 6 * tokens * embed * vocab
        bench.say("loss", chunk=chunk, seconds=seconds, peak_gb=peak, flops=products / seconds)
    losses.CHUNK_BYTES.update(kept)


def attention(bench: Bench) -> None:
    """Forward and backward of one layer of Llama-3-8B over one sample of 8,192 tokens."""
    seq, heads, kv_heads, dim = (256, 4, 2, 16) if bench.dry else (8192, 32, 8, 128)

    def make(count: int) -> torch.Tensor:
        x = torch.randn(1, seq, count, dim, device=bench.device, dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    grad = torch.randn_like(q)
    starts = torch.zeros(1, seq, dtype=torch.int32, device=bench.device)

    def sdpa() -> torch.Tensor:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            turned[0], turned[1], turned[2], is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    ways: dict[str, Callable[[], torch.Tensor]] = {"sdpa": sdpa}
    if not bench.dry:
        ways["flex"] = lambda: attention_cuda.block_attention(q, k, v, starts, dim**-0.5, None)
        attention_cuda.varlen_attn = known_only(attention_cuda.varlen_attn)
        for most in (1, 16, 128, 1024):
            ways[f"varlen, at most {most} samples"] = lambda most=most: (
                attention_cuda.varlen_attention(q, k, v, starts, dim**-0.5, None, most)
            )
    flops = 3.5 * 2 * seq * seq * heads * dim
    for name, way in ways.items():
        try:
            seconds, _ = bench.timed(lambda way=way: torch.autograd.grad(way(), (q, k, v), grad))
            bench.say("attention", way=name, seconds=seconds, flops=flops / seconds)
        except Exception as failure:
            bench.say("attention", way=name, failure=repr(failure)[:300])


def flops_of(cfg: Config, seq: int) -> float:
    """Of a step over the two samples of `build`, without what is computed again."""
    attended = 2 * cfg.embed * cfg.head_dim * (cfg.heads + cfg.kv_heads)
    matrices = cfg.layers * (attended + 3 * cfg.embed * cfg.mlp) + cfg.vocab * cfg.embed
    scores = (seq // 3) ** 2 + (seq - seq // 3) ** 2
    return 6 * seq * matrices + 6 * cfg.layers * scores * cfg.heads * cfg.head_dim


def layers_of_8b(bench: Bench) -> None:
    """A step of four layers as wide as Llama-3-8B's, 8,192 tokens, by what is recomputed."""
    cfg, seq = (SMALL, 256) if bench.dry else (LLAMA_8B, 8192)
    modes: tuple[Remat, ...] = ("full", "selective", "none")
    for mode in modes:
        torch._dynamo.reset()  # an older torch counts all layers as one function
        began = time.perf_counter()
        step, state, batch = bench.build(cfg, torch.bfloat16, mode, seq=seq)
        box = [state]
        del state

        def one(step: Any = step, box: list = box, batch: Batch = batch) -> None:
            box[0] = step(box[0], batch)[0]

        one()
        bench.wait()
        first = time.perf_counter() - began
        seconds, peak = bench.timed(one, 5, 1)
        bench.say(
            "layers_of_8b",
            mode=mode,
            seconds=seconds,
            tokens_per_second=seq / seconds,
            mfu=flops_of(cfg, seq) / seconds / PEAK,
            peak_gb=peak,
            first_step=first,
        )
        if mode == "selective" and not bench.dry:
            kinds = torch.profiler.ProfilerActivity
            with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU]) as profile:
                one()
                bench.wait()
            table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=40)
            (bench.out / "layers_of_8b.txt").write_text(table)
        del step, box, one
        if not bench.dry:
            torch.cuda.empty_cache()


def graph(bench: Bench) -> None:
    """Qwen3-0.6B, 2,048 tokens: the device's share of a step, and the step as one CUDA graph."""
    if bench.dry:
        return
    torch._dynamo.reset()
    step, state, batch = bench.build(QWEN_600M, torch.bfloat16, "none", seq=2048)
    box = [state]
    del state

    def one() -> None:
        box[0] = step(box[0], batch)[0]

    seconds, peak = bench.timed(one, 10, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one()
        bench.wait()
    busy = sum(e.self_device_time_total for e in profile.key_averages()) / 1e6
    bench.say("graph", how="launched", seconds=seconds, busy=busy / seconds, peak_gb=peak)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one()
        one()
    torch.cuda.current_stream().wait_stream(side)
    kept, captured = box[0], torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        new, metrics = step(kept, batch)
        kept.step.copy_(new.step)
        kept.opt_state["count"].copy_(new.opt_state["count"])
    seconds, peak = bench.timed(captured.replay, 10, 3)
    bench.say(
        "graph", how="one CUDA graph", seconds=seconds, peak_gb=peak, loss=float(metrics["loss"])
    )


PARTS = (probe, loss_chunks, layers_of_8b, graph, attention, waits, parity)


def main(argv: Sequence[str] | None = None) -> None:
    words = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    words.add_argument("--out", type=Path, default=Path())
    words.add_argument("--dry", action="store_true", help="on the CPU, tiny")
    words.add_argument("--only", default="", help="names of parts, separated by commas")
    words.add_argument("--deadline", type=float, default=470, help="seconds; later parts are left")
    given = words.parse_args(argv)
    device = torch.device("cpu") if given.dry else torch.device("cuda", 0)
    bench, began = Bench(given.out, given.dry, device), time.perf_counter()
    for part in PARTS:
        if given.only and part.__name__ not in given.only.split(","):
            continue
        if time.perf_counter() - began > given.deadline:
            bench.say(part.__name__, skipped="no time is left")
            continue
        start = time.perf_counter()
        try:
            part(bench)
        except Exception as failure:
            trace = traceback.format_exc()[-900:]
            bench.say(part.__name__, failure=repr(failure)[:500], trace=trace)
        bench.say(part.__name__, done_in=round(time.perf_counter() - start, 1))


if __name__ == "__main__":
    torch.compile = known_only(torch.compile)  # pyright: ignore
    main()

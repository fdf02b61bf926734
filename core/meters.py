"""Throughput: tokens per second, model FLOPs utilisation (MFU), time left, waiting for data.

A `Meter` is a value: each step `tick` makes the next one. Its sums fade: before a step is
added, what is there is multiplied by `keep`, so that a rate is a ratio of sums over about the
last 1 / (1 - keep) steps, long steps weighing as much as they took.
"""

import time
from functools import cache

import attrs
import torch
from attrs import frozen

from omnistep.core.products import goes_wide, wide_product


@frozen
class Meter:
    """Faded sums over the steps so far; `now` is the clock at the last tick (None before it)."""

    now: float | None = None
    seconds: float = 0.0
    steps: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    waited: float = 0.0
    keep: float = 0.95


def tick(meter: Meter, now: float, *, tokens: float, flops: float, waited: float) -> Meter:
    """The meter after one more step, finished at `now` (seconds of a monotonic clock).

    `tokens` and `flops` are the whole step's on all ranks, `waited` the seconds it spent
    waiting for its batch. The first tick only sets the clock: the step before it compiled.
    """
    if meter.now is None:
        return attrs.evolve(meter, now=now)
    return attrs.evolve(
        meter,
        now=now,
        seconds=meter.seconds * meter.keep + now - meter.now,
        steps=meter.steps * meter.keep + 1,
        tokens=meter.tokens * meter.keep + tokens,
        flops=meter.flops * meter.keep + flops,
        waited=meter.waited * meter.keep + waited,
    )


def rates(meter: Meter, *, steps_left: int, peak: float | None = None) -> dict[str, float]:
    """What the meter reads; empty before the second tick.

    `tokens_per_second`, `step_seconds`, `eta_seconds` (at the present pace), `data_wait_share`
    (of the time, 0 to 1) and, where `peak` (FLOP/s of all devices together) is known, `mfu`: of a
    peak that is exceeded, which was measured too low, 1.
    """
    if meter.seconds <= 0:
        return {}
    step_seconds = meter.seconds / meter.steps
    readings = {
        "tokens_per_second": meter.tokens / meter.seconds,
        "step_seconds": step_seconds,
        "eta_seconds": step_seconds * steps_left,
        "data_wait_share": meter.waited / meter.seconds,
    }
    if peak:
        rate = meter.flops / meter.seconds
        readings["mfu"] = rate / max(peak, rate)
    return readings


# Dense bf16 and fp16 peaks in TFLOP/s from the vendors' data sheets (without sparsity), by a
# part of the device's name; the first that fits counts.
_GPU_PEAKS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),  # also GH200
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("MI300X", 1307.4),
)


def gpu_peak_flops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOP/s of the named GPU's matrix products; None where no figure is known.

    float32 counts only with TF32, whose peak is half of bf16's on every device listed.
    """
    peak = next((tflops * 1e12 for part, tflops in _GPU_PEAKS if part in name), None)
    if peak is None or dtype in (torch.bfloat16, torch.float16):
        return peak
    return peak / 2 if dtype == torch.float32 and tf32 and "MI" not in name else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s one device can do in matrix products of `dtype`: what MFU is held to.

    A GPU's is its data sheet's dense figure; None where it is unknown. A CPU's is measured
    once, in about 0.2 s, with all of torch's threads.
    """
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype, tf32)
    if device.type == "cpu":
        return _measured_cpu_peak(dtype, torch.get_num_threads())
    return None


@cache
def _measured_cpu_peak(dtype: torch.dtype, threads: int, seconds: float = 0.15) -> float:
    """The best of the square products that fit in `seconds`, by either of the libraries that
    products are made with; at least two of each, the first to warm up.

    `threads` is only there so that another number of threads is measured anew.
    """
    size = 1024
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, ways = float("inf"), [torch.mm, *([wide_product] if goes_wide(a) else [])]
    for multiply in ways:
        multiply(a, b)
        end = time.perf_counter() + seconds / len(ways)
        while (start := time.perf_counter()) < end or best == float("inf"):
            multiply(a, b)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

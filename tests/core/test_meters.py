"""Meters: rates from clocks that the test sets."""

import pytest
import torch

from omnistep.core.meters import Meter, gpu_peak_flops, peak_flops, rates, tick


def run(seconds: list[float], **step: float) -> Meter:
    now, meter = 100.0, Meter()
    for duration in (50.0, *seconds):  # the first step compiles, and is not counted
        now += duration
        meter = tick(meter, now, **({"tokens": 1000, "flops": 3e9, "waited": 0.1} | step))
    return meter


def test_steady_rates():
    readings = rates(run([0.5] * 30), steps_left=10, peak=12e9)
    assert readings == pytest.approx(
        {
            "tokens_per_second": 2000,
            "step_seconds": 0.5,
            "eta_seconds": 5,
            "data_wait_share": 0.2,
            "mfu": 0.5,
        }
    )


def test_nothing_is_known_before_two_ticks():
    assert rates(Meter(), steps_left=3) == {}
    assert rates(run([]), steps_left=3) == {}
    assert "mfu" not in rates(run([1.0]), steps_left=3)


def test_old_steps_fade():
    """After a change of pace the rate follows within some 1 / (1 - keep) steps."""
    meter = run([1.0] * 100 + [0.1] * 100)
    assert rates(meter, steps_left=0)["tokens_per_second"] == pytest.approx(10_000, rel=0.06)


def test_a_long_step_weighs_what_it_took():
    meter = run([1.0, 3.0])
    expected = (1000 * 0.95 + 1000) / (1.0 * 0.95 + 3.0)
    assert rates(meter, steps_left=0)["tokens_per_second"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA L40S", 362.0),
        ("Some Accelerator", None),
    ],
)
def test_gpu_peaks(name, tflops):
    peak = gpu_peak_flops(name, torch.bfloat16)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_gpu_float32_peak_needs_tf32():
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", torch.float32, tf32=True) == 494.7e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None


def test_cpu_peak_is_measured_once():
    device = torch.device("cpu")
    peak = peak_flops(device, torch.float32)
    assert peak is not None
    assert 1e8 < peak < 1e15
    assert peak_flops(device, torch.float32) == peak
    assert peak_flops(torch.device("meta"), torch.float32) is None

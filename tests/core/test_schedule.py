"""Learning rates against the contract's words, in plain Python."""

import itertools
import math

import pytest
import torch

from omnistep.core.schedule import STYLES, learning_rate, make_schedule

LR, LR_MIN = 3e-4, 2e-5


def reference(step: int, total: int, style: str, warmup_ratio: float, decay_ratio: float) -> float:
    warmup, end = int(total * warmup_ratio), int(total * decay_ratio)
    if step < warmup:
        return LR * step / warmup
    if step >= end:
        return LR_MIN
    done = (step - warmup) / (end - warmup)
    return {
        "constant": LR,
        "linear": LR + (LR_MIN - LR) * done,
        "cosine": LR_MIN + (LR - LR_MIN) * (1 + math.cos(math.pi * done)) / 2,
    }[style]


def rates(total: int, style: str, warmup_ratio: float, decay_ratio: float) -> list[float]:
    schedule = make_schedule(
        total_steps=total,
        lr=LR,
        lr_min=LR_MIN,
        style=style,
        warmup_ratio=warmup_ratio,
        decay_ratio=decay_ratio,
    )
    scalar = schedule(torch.tensor(1))
    assert (scalar.dtype, scalar.shape) == (torch.float32, ())
    every = schedule(torch.arange(total + 3))  # each step by itself: the formula is elementwise
    assert every[1] == scalar
    return every.tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_every_step_equals_the_reference(style, total):
    for warmup, decay in itertools.product((0.0, 0.05, 0.5, 1.0), (0.0, 0.05, 0.5, 0.9, 1.0)):
        expected = [reference(s, total, style, warmup, decay) for s in range(total + 3)]
        assert rates(total, style, warmup, decay) == pytest.approx(expected, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_pieces(style):
    values = rates(100, style, 0.1, 0.8)
    assert values[0] == 0
    assert all(a < b for a, b in itertools.pairwise(values[:11]))
    assert values[10] == pytest.approx(LR)
    assert all(a > b for a, b in itertools.pairwise(values[10:81]))
    assert values[80:] == pytest.approx([LR_MIN] * 23)


def test_constant_holds_then_drops():
    values = rates(100, "constant", 0.1, 0.8)
    assert values[10:80] == pytest.approx([LR] * 70)
    assert values[80:] == pytest.approx([LR_MIN] * 23)


@pytest.mark.slow
def test_compiled_once_for_all_steps():
    schedule = make_schedule(total_steps=50, lr=LR, lr_min=LR_MIN, warmup_ratio=0.1)
    compiled = torch.compile(schedule, fullgraph=True)
    with torch.compiler.set_stance("default"):
        compiled(torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 55):
            expected = schedule(torch.tensor(step)).item()
            assert compiled(torch.tensor(step)).item() == pytest.approx(expected, rel=1e-7)


def test_errors():
    with pytest.raises(ValueError, match="'step'; allowed: constant, linear, cosine"):
        make_schedule(total_steps=10, lr=LR, style="step")
    with pytest.raises(ValueError, match=r"lr_warmup_ratio is 1\.5"):
        make_schedule(total_steps=10, lr=LR, warmup_ratio=1.5)
    with pytest.raises(ValueError, match="at least one step"):
        make_schedule(total_steps=0, lr=LR)
    with pytest.raises(ValueError, match="lr_decay_style is"):
        learning_rate(torch.tensor(0), total_steps=1, lr=LR, style="warm")

"""Learning rates as functions of the step, in tensor operations: no step recompiles."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

STYLES = ("constant", "linear", "cosine")


def learning_rate(
    step: Int[Tensor, ""],
    *,
    total_steps: int,
    lr: float,
    lr_min: float = 0.0,
    style: str = "cosine",
    warmup_ratio: float = 0.0,
    decay_ratio: float = 1.0,
) -> Float[Tensor, ""]:
    """float32 rate of the update that follows `step` finished updates (the first has step 0).

    With W = int(total_steps * warmup_ratio) and D = int(total_steps * decay_ratio):

        step < W        lr * step / W
        W <= step < D   constant: lr
                        linear:   from lr at W straight to lr_min at D
                        cosine:   the same along half a cosine
        otherwise       lr_min

    The warm-up goes first: where D < W, the rate falls from its peak to lr_min at W.
    """
    if style not in STYLES:
        raise ValueError(f"lr_decay_style is {style!r}; allowed: {', '.join(STYLES)}")
    warmup, decay_end = int(total_steps * warmup_ratio), int(total_steps * decay_ratio)
    # float64, rounded once: the rate must not depend on how a device rounds a cosine
    t = step.to(torch.float64)
    done = (t - warmup) / max(decay_end - warmup, 1)
    if style == "cosine":
        left = 0.5 * (1.0 + torch.cos(math.pi * done))
    elif style == "linear":
        left = 1.0 - done
    else:
        left = torch.ones_like(t)
    rate = torch.where(t < decay_end, lr_min + (lr - lr_min) * left, lr_min)
    return torch.where(t < warmup, lr * t / max(warmup, 1), rate).to(torch.float32)


def make_schedule(
    *,
    total_steps: int,
    lr: float,
    lr_min: float = 0.0,
    style: str = "cosine",
    warmup_ratio: float = 0.0,
    decay_ratio: float = 1.0,
) -> Callable[[Int[Tensor, ""]], Float[Tensor, ""]]:
    """`learning_rate` as a function of the step alone; its arguments are checked here."""
    for name, ratio in (("lr_warmup_ratio", warmup_ratio), ("lr_decay_ratio", decay_ratio)):
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"{name} is {ratio}; allowed: a share of the run's steps, 0 to 1")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; a run has at least one step")
    schedule = partial(
        learning_rate,
        total_steps=total_steps,
        lr=lr,
        lr_min=lr_min,
        style=style,
        warmup_ratio=warmup_ratio,
        decay_ratio=decay_ratio,
    )
    schedule(torch.zeros((), dtype=torch.int64))  # an unknown style stops here, not in the step
    return schedule

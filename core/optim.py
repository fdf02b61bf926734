"""Optimizers as pairs of pure functions on trees of local tensors.

    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params, lr)

Nothing is changed in place and no shape or Python number depends on the step, so a compiled
step traces `update` once. Compiled, each leaf is one loop over its elements that reads the
parameter, its gradient and its moments once and writes the new ones once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.tree import Tree, tree_flatten, tree_leaves, tree_map, tree_unflatten

OptState = dict[str, Any]


@frozen
class Optimizer:
    """`init(params) -> opt_state`; `update(grads, opt_state, params, lr) -> (params, opt_state)`.

    The optimizer's state is a dict: `count`, the number of updates done (int64 scalar), and
    trees like `params`. `lr` is a scalar tensor. Gradients are expected to be finite and
    clipped.
    """

    init: Callable[[Tree], OptState]
    update: Callable[[Tree, OptState, Tree, Tensor], tuple[Tree, OptState]]


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Tree | None = None,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), the numbers of torch.optim.AdamW.

    Moments have the parameters' dtype; the arithmetic is float32, float64 where the parameter
    is. `decay_mask` is a tree of bools like `params`: which leaves decay (None: all).
    """
    return Optimizer(
        init=partial(_init, ("mu", "nu")),
        update=partial(_update, _adamw_leaf, _Constants(b1, b2, eps, weight_decay), decay_mask),
    )


def anyprecision_adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Tree | None = None,
) -> Optimizer:
    """AdamW on low-precision parameters and moments with Kahan-compensated parameters.

    What rounding takes from a parameter is kept in a buffer of the parameter's dtype and added
    to its next change, so that changes below half a unit in the last place are not lost.
    Method: Zamirai et al., "Revisiting BFloat16 Training" (arXiv:2010.06192), as in torchdistx's
    AnyPrecisionAdamW with all three buffers in bfloat16. Here weight decay goes through the
    compensation too (there it is rounded away in bfloat16), and the arithmetic between a read
    and a write is float32. With b2 above 0.996 a bfloat16 second moment can no longer shrink.
    """
    return Optimizer(
        init=partial(_init, ("mu", "nu", "compensation")),
        update=partial(_update, _kahan_leaf, _Constants(b1, b2, eps, weight_decay), decay_mask),
    )


# ---- one step


@frozen
class _Constants:
    b1: float
    b2: float
    eps: float
    weight_decay: float


def _init(buffers: tuple[str, ...], params: Tree) -> OptState:
    device = tree_leaves(params)[0].device
    count = torch.zeros((), dtype=torch.int64, device=device)
    return {"count": count, **{name: tree_map(torch.zeros_like, params) for name in buffers}}


def _update(
    leaf_update: Callable[..., tuple[Tensor, ...]],
    constants: _Constants,
    decay_mask: Tree | None,
    grads: Tree,
    opt_state: OptState,
    params: Tree,
    lr: Float[Tensor, ""],
) -> tuple[Tree, OptState]:
    flat, structure = tree_flatten(params)
    decays = [True] * len(flat) if decay_mask is None else tree_leaves(decay_mask)
    names = [name for name in opt_state if name != "count"]
    buffers = [tree_leaves(opt_state[name]) for name in names]
    count = opt_state["count"] + 1
    scalars = {
        dtype: _step_scalars(count, lr, constants, dtype)
        for dtype in {_arithmetic_dtype(p) for p in flat}
    }
    new = [
        leaf_update(p, g, *moments, scalars[_arithmetic_dtype(p)], constants, bool(decay))
        for p, g, decay, *moments in zip(flat, tree_leaves(grads), decays, *buffers, strict=True)
    ]
    new_params, *new_buffers = (
        tree_unflatten(list(leaves), structure) for leaves in zip(*new, strict=True)
    )
    return new_params, {"count": count, **dict(zip(names, new_buffers, strict=True))}


def _arithmetic_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _step_scalars(
    count: Int[Tensor, ""], lr: Float[Tensor, ""], c: _Constants, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """lr / (1 - b1^t), sqrt(1 - b2^t) and 1 - lr weight_decay, made in float64."""
    t, lr = count.to(torch.float64), lr.to(torch.float64)
    step_size = lr / (1.0 - c.b1**t)
    root_correction = (1.0 - c.b2**t).sqrt()
    scalars = torch.stack([step_size, root_correction, 1.0 - lr * c.weight_decay]).to(dtype)
    # A plain view would let inductor repeat the powers above for every element of every leaf;
    # as_strided needs a buffer, so they are computed once.
    first, second, third = (scalars.as_strided((), (), i) for i in range(3))
    return first, second, third


def _moments(
    g: Tensor, mu: Tensor, nu: Tensor, scalars: tuple[Tensor, ...], c: _Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """The new moments and the parameter's step, in the dtype of `scalars`."""
    step_size, root_correction, _ = scalars
    g, mu, nu = (x.to(step_size.dtype) for x in (g, mu, nu))
    mu = torch.lerp(mu, g, 1.0 - c.b1)
    nu = c.b2 * nu + (1.0 - c.b2) * g * g
    return mu, nu, step_size * (mu / (nu.sqrt() / root_correction + c.eps))


def _adamw_leaf(
    p: Tensor,
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    scalars: tuple[Tensor, ...],
    c: _Constants,
    decay: bool,
) -> tuple[Tensor, ...]:
    new_mu, new_nu, change = _moments(g, mu, nu, scalars, c)
    wide = p.to(change.dtype)
    kept = wide * scalars[2] if decay and c.weight_decay else wide
    return (kept - change).to(p.dtype), new_mu.to(mu.dtype), new_nu.to(nu.dtype)


def _kahan_leaf(
    p: Tensor,
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    compensation: Tensor,
    scalars: tuple[Tensor, ...],
    c: _Constants,
    decay: bool,
) -> tuple[Tensor, ...]:
    new_mu, new_nu, change = _moments(g, mu, nu, scalars, c)
    wide = p.to(change.dtype)
    if decay and c.weight_decay:
        change = change + (1.0 - scalars[2]) * wide
    wanted = compensation.to(change.dtype) - change
    new = _round(wide + wanted, p.dtype)
    lost = wanted - (new - wide)
    rounded = (new.to(p.dtype), new_mu.to(mu.dtype), new_nu.to(nu.dtype))
    return *rounded, lost.to(compensation.dtype)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype` (to nearest, ties to even), still in its own dtype.

    A compiler may drop the pair of casts float32 -> bfloat16 -> float32, and with it the
    rounding that the compensation is about; it cannot drop integer arithmetic.
    """
    if dtype == x.dtype:
        return x
    if dtype != torch.bfloat16:
        raise ValueError(
            f"anyprecision_adamw takes bfloat16, float32 or float64 parameters, not {dtype}"
        )
    pattern = x.view(torch.int32)
    pattern = pattern + 0x7FFF + ((pattern >> 16) & 1)
    return (pattern & -0x10000).view(torch.float32)

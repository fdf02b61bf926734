"""Optimizers: a rule for one leaf, applied to every leaf of a tree.

    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params, lr)

A rule works element by element, on whatever piece of a parameter a rank holds. Nothing is changed
in place and no Python number depends on the step, so that one compiled loop, which reads the
parameter, its gradient and its moments once and writes the new ones once, serves every leaf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.tree import (
    Tree,
    pick,
    put_back,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

OptState = dict[str, Any]
Scalars = tuple[Tensor, ...]


@frozen
class Optimizer:
    """The optimizer's state is a dict: `count`, the number of updates done (int64 scalar), and for
    each name in `buffers` a tree like `params`, zero at first.

    rule: (param, grad, *buffers, scalars) -> (new param, *new buffers), element by element.
    scalars: (count, lr, dtype, decays) -> 0-d tensors of `dtype` that are the same for all elements
        of a leaf; `decays` says whether weight decay applies to it.
    decay_mask: a tree of bools like `params`: which leaves decay (None: all).
    learned: a tree of bools like `params`, nested dicts: which leaves are moved (None: all). Others
        get no gradient and have no place in the optimizer's state.
    lr_scale: a tree of numbers like `params`: what the learning rate of each leaf is multiplied by
        (None: 1).
    """

    buffers: tuple[str, ...]
    rule: Callable[..., tuple[Tensor, ...]]
    scalars: Callable[[Tensor, Tensor, torch.dtype, bool], Scalars]
    decay_mask: Tree | None = None
    learned: Tree | None = None
    lr_scale: Tree | None = None

    def picked(self, tree: Tree) -> Tree:
        """Of a tree like `params`, the part that is learned."""
        return tree if self.learned is None else pick(tree, self.learned)

    def init(self, params: Tree) -> OptState:
        device = tree_leaves(params)[0].device
        count = torch.zeros((), dtype=torch.int64, device=device)
        moved = self.picked(params)
        return {
            "count": count,
            **{name: tree_map(torch.zeros_like, moved) for name in self.buffers},
        }

    def update(
        self,
        grads: Tree,
        opt_state: OptState,
        params: Tree,
        lr: Float[Tensor, ""],
        rule: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> tuple[Tree, OptState]:
        """One step: (all params, the new state). `grads` are those of the leaves that are learned,
        expected to be finite and clipped. `rule` is what is called in place of the optimizer's own:
        the same rule, compiled or with more around it."""
        flat, structure = tree_flatten(self.picked(params))
        decays = self._of_leaves(self.decay_mask, True, len(flat))
        scales = self._of_leaves(self.lr_scale, 1.0, len(flat))
        buffers = [tree_leaves(opt_state[name]) for name in self.buffers]
        count = opt_state["count"] + 1
        kinds = list(zip(map(_arithmetic_dtype, flat), decays, scales, strict=True))
        scalars = {
            (dtype, decays, scale): self.scalars(count, lr * scale, dtype, decays)
            for dtype, decays, scale in set(kinds)
        }
        new = [
            (rule or self.rule)(p, g, *moments, scalars[kind])
            for p, g, kind, *moments in zip(flat, tree_leaves(grads), kinds, *buffers, strict=True)
        ]
        moved, *new_buffers = (
            tree_unflatten(list(leaves), structure) for leaves in zip(*new, strict=True)
        )
        state = {"count": count, **dict(zip(self.buffers, new_buffers, strict=True))}
        return moved if self.learned is None else put_back(moved, params), state

    def _of_leaves(self, tree: Tree | None, default: Any, count: int) -> list[Any]:
        return [default] * count if tree is None else tree_leaves(self.picked(tree))


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Tree | None = None,
    learned: Tree | None = None,
    lr_scale: Tree | None = None,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), the numbers of torch.optim.AdamW.

    Moments have the parameters' dtype; the arithmetic is float32, float64 where the parameter
    is. `decay_mask`, `learned` and `lr_scale` are those of `Optimizer`.
    """
    constants = _Constants(b1, b2, eps, weight_decay)
    return Optimizer(
        ("mu", "nu"),
        partial(_adamw_rule, constants),
        partial(_adam_scalars, constants),
        decay_mask,
        learned,
        lr_scale,
    )


def anyprecision_adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Tree | None = None,
    learned: Tree | None = None,
    lr_scale: Tree | None = None,
) -> Optimizer:
    """AdamW on low-precision parameters and moments with Kahan-compensated parameters.

    What rounding takes from a parameter is kept in a buffer of the parameter's dtype and added
    to its next change, so that changes below half a unit in the last place are not lost.
    Method: Zamirai et al., "Revisiting BFloat16 Training" (arXiv:2010.06192), as in torchdistx's
    AnyPrecisionAdamW with all three buffers in bfloat16. Here weight decay goes through the
    compensation too (there it is rounded away in bfloat16), and the arithmetic between a read
    and a write is float32. With b2 above 0.996 a bfloat16 second moment can no longer shrink.
    """
    constants = _Constants(b1, b2, eps, weight_decay)
    return Optimizer(
        ("mu", "nu", "compensation"),
        partial(_kahan_rule, constants),
        partial(_adam_scalars, constants),
        decay_mask,
        learned,
        lr_scale,
    )


# ---- one step


@frozen
class _Constants:
    b1: float
    b2: float
    eps: float
    weight_decay: float


def _arithmetic_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _adam_scalars(
    c: _Constants, count: Int[Tensor, ""], lr: Float[Tensor, ""], dtype: torch.dtype, decays: bool
) -> Scalars:
    """lr / (1 - b1^t), sqrt(1 - b2^t) and the decay 1 - lr weight_decay, made in float64."""
    t, lr = count.to(torch.float64), lr.to(torch.float64)
    step_size = lr / (1.0 - c.b1**t)
    root_correction = (1.0 - c.b2**t).sqrt()
    kept = 1.0 - lr * c.weight_decay if decays else torch.ones_like(lr)
    return step_size.to(dtype), root_correction.to(dtype), kept.to(dtype)


def _moments(
    c: _Constants, g: Tensor, mu: Tensor, nu: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor, Tensor]:
    """The new moments and the parameter's step, in the dtype of `scalars`."""
    step_size, root_correction, _ = scalars
    g, mu, nu = (x.to(step_size.dtype) for x in (g, mu, nu))
    mu = torch.lerp(mu, g, 1.0 - c.b1)
    nu = c.b2 * nu + (1.0 - c.b2) * g * g
    return mu, nu, step_size * (mu / (nu.sqrt() / root_correction + c.eps))


def _adamw_rule(
    c: _Constants, p: Tensor, g: Tensor, mu: Tensor, nu: Tensor, scalars: Scalars
) -> tuple[Tensor, ...]:
    new_mu, new_nu, change = _moments(c, g, mu, nu, scalars)
    kept = p.to(change.dtype) * scalars[2]
    return (kept - change).to(p.dtype), new_mu.to(mu.dtype), new_nu.to(nu.dtype)


def _kahan_rule(
    c: _Constants,
    p: Tensor,
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    compensation: Tensor,
    scalars: Scalars,
) -> tuple[Tensor, ...]:
    new_mu, new_nu, change = _moments(c, g, mu, nu, scalars)
    wide = p.to(change.dtype)
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

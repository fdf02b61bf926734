"""The step: one pure function from (state, batch) to (state, metrics).

`make_train_step` builds it from a loss, an optimizer and a schedule. Two parts are compiled,
each as a full graph: the loss with its backward pass, and the update.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from attrs import frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core import rng
from omnistep.core.compile import compile_graph
from omnistep.core.optim import Optimizer
from omnistep.core.tree import Tree, pytree, tree_flatten, tree_leaves, tree_map, tree_unflatten

Schedule = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""step -> learning rate"""


@pytree
@frozen(eq=False)
class TrainState:
    """All that a run carries from step to step. Every leaf is a tensor."""

    step: Int[Tensor, ""]
    params: Tree
    opt_state: Tree
    key: Int[Tensor, "2"]


class LossOutput(NamedTuple):
    """What a loss returns: sums over the micro-batch, so that any split of a batch adds up.

    The step minimises sum(total) / sum(weight) over the global batch. `metrics` are further
    sums; they are reported divided by the same weight.
    """

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    metrics: Mapping[str, Tensor] = {}


LossFn = Callable[[Tree, Any, Tensor], LossOutput]
"""(params, batch, key) -> LossOutput"""

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]


def init_state(params: Tree, optimizer: Optimizer, key: Tensor) -> TrainState:
    device = tree_leaves(params)[0].device
    return TrainState(
        step=torch.zeros((), dtype=torch.int64, device=device),
        params=params,
        opt_state=optimizer.init(params),
        key=key.to(device),
    )


def value_and_grad(loss_fn: LossFn) -> Callable[..., tuple[LossOutput, Tree]]:
    """(params, *rest) -> (LossOutput, gradients of total, a tree like params)."""

    def function(params: Tree, *rest: Any) -> tuple[LossOutput, Tree]:
        leaves, structure = tree_flatten(params)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = loss_fn(tree_unflatten(leaves, structure), *rest)
        grads = torch.autograd.grad(out.total, leaves, allow_unused=True)
        grads = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]
        return tree_map(torch.Tensor.detach, out), tree_unflatten(grads, structure)

    return function


def global_norm(grads: Tree) -> Float[Tensor, ""]:
    """Euclidean norm over all leaves, accumulated in fp32 or better."""
    squares = [
        (g if g.dtype == torch.float64 else g.float()).square().sum() for g in tree_leaves(grads)
    ]
    return torch.stack(squares).sum().sqrt()


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of torch.nn.utils.clip_grad_norm_; 1 when max_norm is 0."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    compile: bool = True,
    donate: bool = True,
) -> TrainStep:
    """The train step.

    Args:
        loss_fn: pure; sees one micro-batch and a key that is different at every step and
            micro-batch. Must trace as one graph when `compile`.
        accumulate: micro-batches per step. Above 1 each leaf of the batch has a leading axis of
            this size.
        max_grad_norm: clips the gradient of the mean loss by its global norm; 0 does not clip.
        compile: False runs the same functions eagerly.
        donate: the new state takes over the buffers of the old one, which must not be used
            afterwards. False keeps the old state, at the price of a second copy.

    Metrics, all 0-d tensors: loss (mean over the global weight), weight, grad_norm (before
    clipping), lr, skipped (1 where a non-finite norm left parameters and optimizer state as they
    were; the step still counts), and the loss's own.
    """

    def update(
        step: Tensor, old: tuple[Tree, Tree], grads: Tree, out: LossOutput
    ) -> tuple[tuple[Tree, Tree], dict[str, Tensor]]:
        """old and new: (params, opt_state)."""
        params, opt_state = old
        inverse_weight = 1.0 / out.weight.clamp(min=torch.finfo(torch.float32).tiny)
        norm = global_norm(grads) * inverse_weight
        finite = torch.isfinite(norm)
        scale = inverse_weight * clip_scale(norm, max_grad_norm)
        lr = schedule(step)
        scaled = tree_map(lambda g: g * scale.to(g.dtype), grads)
        new = optimizer.update(scaled, opt_state, params, lr)
        new = tree_map(lambda n, o: torch.where(finite, n, o), new, old)
        if donate:
            new = tree_map(lambda o, n: o.copy_(n), old, new)
        metrics = {
            "loss": out.total * inverse_weight,
            "weight": out.weight,
            "grad_norm": norm,
            "lr": lr,
            "skipped": (~finite).float(),
            **{name: value * inverse_weight for name, value in out.metrics.items()},
        }
        return new, metrics

    compiled_grads = value_and_grad(compile_graph(loss_fn) if compile else loss_fn)
    compiled_update = compile_graph(update) if compile else update

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
        micros = [batch] if accumulate == 1 else _unstack(batch, accumulate)
        out, grads = None, None
        for i, micro_batch in enumerate(micros):
            # outside of the graph: hashing is many small operations, slow to trace
            key = rng.fold_in(state.key, state.step * accumulate + i)
            new_out, new_grads = compiled_grads(state.params, micro_batch, key)
            if out is None:
                out, grads = new_out, new_grads
            else:
                out = tree_map(torch.add, out, new_out)
                torch._foreach_add_(tree_leaves(grads), tree_leaves(new_grads))
        with torch.no_grad():
            (params, opt_state), metrics = compiled_update(
                state.step, (state.params, state.opt_state), grads, out
            )
            return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(
    loss_fn: LossFn, *, compile: bool = True
) -> Callable[[Tree, Any, Tensor], tuple[Tensor, Tensor]]:
    """(params, micro_batch, key) -> (total, weight) of the loss, without gradients."""

    def evaluate(params: Tree, batch: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        out = loss_fn(params, batch, key)
        return out.total, out.weight

    evaluate = compile_graph(evaluate) if compile else evaluate

    def eval_step(params: Tree, batch: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return evaluate(params, batch, key)

    return eval_step


def _unstack(batch: Any, count: int) -> list[Any]:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in tree_leaves(batch)}
    if sizes != {count}:
        raise ValueError(
            f"accumulate={count} needs a batch whose leaves all have a leading axis of {count}; "
            f"their leading sizes are {sorted(sizes, key=str)}"
        )
    return [tree_map(lambda leaf: leaf[i], batch) for i in range(count)]  # noqa: B023

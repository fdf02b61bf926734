"""The step: one pure function from (state, batch) to (state, metrics).

`make_train_step` builds it from a loss, an optimizer and a schedule, for one rank or a mesh:

1. weights that no function gathers for itself are gathered (core.param.Layout says which);
2. the loss and its gradient, micro-batch by micro-batch, or through a pipeline of stages;
3. gradients are summed over the ranks that need it, and the numbers that all ranks report;
4. the update, leaf by leaf, each rank on the pieces it holds.

A plain loss is compiled as one full graph; a loss in `Stages` compiles its own parts, which keeps
the time to compile the same whatever the number of layers. The update is one compiled loop.
"""

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core import rng
from omnistep.core.compile import any_length, compile_graph
from omnistep.core.grad import (
    LossFn,
    LossOutput,
    Stages,
    pipelined_loss,
    pipelined_value_and_grad,
    value_and_grad,
)
from omnistep.core.optim import Optimizer
from omnistep.core.param import Layout
from omnistep.core.tree import (
    Tree,
    pytree,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.layout import to_local
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.unshard import gather_once, reduce_once

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


TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]


def init_state(params: Tree, optimizer: Optimizer, key: Tensor) -> TrainState:
    device = tree_leaves(params)[0].device
    return TrainState(
        step=torch.zeros((), dtype=torch.int64, device=device),
        params=params,
        opt_state=optimizer.init(params),
        key=key.to(device),
    )


def sum_of_squares(grads: Tree, copies: Tree | None = None) -> Float[Tensor, ""]:
    """Of all leaves, in fp32 or better. copies: how many ranks hold each piece; each counts its
    part, so that the sum over all ranks is that of the whole."""
    leaves = tree_leaves(grads)
    shares = [1] * len(leaves) if copies is None else tree_leaves(copies)
    # rows first: one long sum in fp32 would lose digits
    rows = [torch.linalg.vector_norm(g, dim=-1, dtype=_wide(g)) if g.ndim else g for g in leaves]
    return torch.stack([r.square().sum() / n for r, n in zip(rows, shares, strict=True)]).sum()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of torch.nn.utils.clip_grad_norm_; 1 when max_norm is 0."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def make_train_step(
    loss_fn: LossFn | Stages,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    layout: Layout | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    compile: bool = True,
    donate: bool = True,
) -> TrainStep:
    """The train step.

    Args:
        loss_fn: pure; sees one micro-batch and a key that is different at every step and
            micro-batch. Must trace as one graph when `compile`; `Stages` compile themselves.
        layout: where the parameters lie on a mesh; None is one rank. The loss sees this rank's
            pieces, as plain tensors, and this rank's part of the batch.
        accumulate: micro-batches per step. Above 1 each leaf of the batch has a leading axis of
            this size.
        max_grad_norm: clips the gradient of the mean loss by its global norm; 0 does not clip.
        compile: False runs the same functions eagerly.
        donate: the new state takes over the buffers of the old one, which must not be used
            afterwards. False keeps the old state, at the price of a second copy.

    Metrics, equal on every rank, 0-d tensors: loss (mean over the global weight; what the loss is
    penalised by besides, LossOutput.penalties, stands beside it), weight, grad_norm (before
    clipping), lr, skipped (1 where a non-finite norm left parameters and optimizer state as they
    were; the step still counts). And the loss's own, which may have any shape.
    """
    mesh = None if layout is None else layout.mesh
    if mesh is not None and mesh.size("pp") > 1:
        if not isinstance(loss_fn, Stages):
            raise ValueError("a pipeline (pp above 1) needs a loss in Stages, not one function")
        gradients = pipelined_value_and_grad(loss_fn, mesh, optimizer.learned)
    elif compile and not isinstance(loss_fn, Stages):
        gradients = value_and_grad(compile_graph(loss_fn), optimizer.learned)
    else:
        gradients = value_and_grad(loss_fn, optimizer.learned)
    places = None if layout is None else optimizer.picked(layout.places)

    def new_leaf(old: tuple[Tensor, ...], grad: Tensor, scalars: Any) -> tuple[Tensor, ...]:
        """The optimizer's rule on one leaf's (parameter, *buffers)."""
        scale, finite, of_rule = scalars
        new = optimizer.rule(old[0], grad * scale, *old[1:], of_rule)
        new = tuple(torch.where(finite, n, o) for n, o in zip(new, old, strict=True))
        return tuple(o.copy_(n) for o, n in zip(old, new, strict=True)) if donate else new

    update_leaf = compile_graph(new_leaf) if compile else new_leaf

    def set_after(after: Any, params: Tree, sums: Any, finite: Tensor) -> tuple[Tree, Any]:
        """What no gradient moves: of the updated parameters, those that the loss sets."""

        def put(old: Tensor, local: Tensor, new: Tensor) -> Tensor:
            if new is local:
                return old
            new = torch.where(finite, new, local)
            if not donate:
                return _like(new, old)
            local.copy_(new)
            return old

        local = tree_map(to_local, params)
        new, metrics = after(local, sums)
        return tree_map(put, params, local, new), metrics

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
        micros = [batch] if accumulate == 1 else _unstack(batch, accumulate)
        keys = [rng.fold_in(state.key, state.step * accumulate + i) for i in range(len(micros))]
        params = tree_map(to_local, state.params)
        if layout is None:
            out, grads = gradients(params, micros, keys)
            squares = sum_of_squares(grads)
        else:
            used = layout.map(lambda p, at: gather_once(p, at, layout.dtype), params)
            out, grads = gradients(used, micros, keys)
            del used
            moved = optimizer.picked(params)
            grads = tree_map(lambda g, at, p: reduce_once(g, at).to(p.dtype), grads, places, moved)
            copies = tree_map(lambda at: at.reduce.size, places)
            squares = sum_of_squares(grads, copies)
            out, squares = _sum_over_ranks(out, squares, layout.mesh)
        with torch.no_grad():
            inverse_weight = 1.0 / out.weight.clamp(min=torch.finfo(torch.float32).tiny)
            norm = squares.sqrt() * inverse_weight
            finite = torch.isfinite(norm)
            scale = inverse_weight * clip_scale(norm, max_grad_norm)
            lr = schedule(state.step)

            def rule(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
                *buffers, of_rule = rest
                old = (param, *buffers)
                flat = tuple(_flat(to_local(x)) for x in old)
                scalars = (scale.to(grad.dtype), finite, of_rule)
                new = update_leaf(flat, any_length(grad.reshape(flat[0].shape)), scalars)
                return old if donate else tuple(map(_like, new, old))

            params, opt_state = optimizer.update(
                grads, state.opt_state, state.params, lr, rule=rule
            )
            count = torch.where(finite, opt_state["count"], state.opt_state["count"])
            metrics = {
                "loss": out.total * inverse_weight,
                "weight": out.weight,
                "grad_norm": norm,
                "lr": lr,
                "skipped": (~finite).float(),
                **{name: value * inverse_weight for name, value in out.metrics.items()},
                **{name: value * inverse_weight for name, value in out.penalties.items()},
            }
            if isinstance(loss_fn, Stages) and loss_fn.after is not None:
                params, of_loss = set_after(loss_fn.after, params, out.sums, finite)
                metrics |= of_loss
            opt_state = {**opt_state, "count": count}
            return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(
    loss_fn: LossFn | Stages, *, layout: Layout | None = None, compile: bool = True
) -> Callable[[Tree, Any, Tensor], tuple[Tensor, Tensor]]:
    """(params, micro_batch, key) -> (total, weight) of the loss, summed over all ranks, without
    gradients."""
    if compile and not isinstance(loss_fn, Stages):
        loss_fn = compile_graph(loss_fn)
    if layout is not None and layout.mesh.size("pp") > 1:
        assert isinstance(loss_fn, Stages)
        loss_fn = pipelined_loss(loss_fn, layout.mesh)

    def eval_step(params: Tree, batch: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            params = tree_map(to_local, params)
            if layout is None:
                out = loss_fn(params, batch, key)
                return out.total, out.weight
            params = layout.map(lambda p, at: gather_once(p, at, layout.dtype), params)
            out = loss_fn(params, batch, key)
            out, _ = _sum_over_ranks(out, torch.zeros_like(out.total), layout.mesh)
            return out.total, out.weight

    return eval_step


def _sum_over_ranks(
    out: LossOutput, squares: Tensor, mesh: Mesh
) -> tuple[LossOutput, Float[Tensor, ""]]:
    """The sums over all ranks, by one message."""
    leaves, structure = tree_flatten((out, squares))
    every = torch.cat([leaf.double().flatten() for leaf in leaves])
    parts = all_reduce(every, mesh.world).split([leaf.numel() for leaf in leaves])
    sums = [part.view(x.shape).to(x.dtype) for part, x in zip(parts, leaves, strict=True)]
    return tree_unflatten(sums, structure)


def _flat(x: Tensor) -> Tensor:
    return any_length(x.view(-1)) if x.is_contiguous() else x


def _like(new: Tensor, old: Tensor) -> Tensor:
    """`new`, flat and local, in the shape and on the mesh of `old`."""
    local = new.view(to_local(old).shape)
    if local.shape == old.shape and type(old) is Tensor:
        return local
    return old.__class__.from_local(
        local,
        old.device_mesh,
        old.placements,
        run_check=False,
        shape=old.shape,
        stride=old.stride(),
    )  # pyright: ignore


def _unstack(batch: Any, count: int) -> list[Any]:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in tree_leaves(batch)}
    if sizes != {count}:
        raise ValueError(
            f"accumulate={count} needs a batch whose leaves all have a leading axis of {count}; "
            f"their leading sizes are {sorted(sizes, key=str)}"
        )
    return [tree_map(lambda leaf: leaf[i], batch) for i in range(count)]  # noqa: B023

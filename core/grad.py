"""Losses and their gradients, summed over micro-batches: on one rank, or through a pipeline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from attrs import frozen
from jaxtyping import Float
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
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.pipeline import Link, one_forward_one_backward


class LossOutput(NamedTuple):
    """What a loss returns: this rank's share of the sums over the micro-batch, so that any split of
    a batch adds up.

    The step minimises (sum(total) + all sum(penalties)) / sum(weight) over the global batch.
    """

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    metrics: Mapping[str, Tensor] = {}
    """Further sums, reported divided by the same weight."""
    penalties: Mapping[str, Tensor] = {}
    """What training minimises besides, and an evaluation leaves out; reported like metrics."""
    sums: Mapping[str, Tensor] = {}
    """Tensors of any shape that are only added up, for `Stages.after`."""

    @property
    def objective(self) -> Float[Tensor, ""]:
        return self.total + sum(self.penalties.values())


LossFn = Callable[[Tree, Any, Tensor], LossOutput]
"""(params, batch, key) -> LossOutput"""


@frozen(eq=False)
class Stages:
    """A loss in three parts, so that a pipeline can run them on different ranks.

    Called, it is the whole loss. Its parts compile themselves (or not): the step does not.
    """

    first: Callable[[Tree, Any], Tree]
    """(params, batch) -> what the layers read: a tensor, or a tree of tensors"""
    middle: Callable[[Tree, Tree, Any], Tree]
    """(params, x, batch) -> the same shapes, after this rank's layers"""
    last: Callable[[Tree, Tree, Any, Tensor], LossOutput]
    """(params, x, batch, key) -> loss"""
    carry: Callable[[Any], Tree]
    """batch -> meta tensors: shapes and dtypes of x. Gradients come back for the floating ones."""
    zero: LossOutput
    """What `last` returns, all 0: the part of stages that do not come last."""
    after: Callable[[Tree, Mapping[str, Tensor]], tuple[Tree, Mapping[str, Tensor]]] | None = None
    """(this rank's pieces of the updated params, LossOutput.sums of the global batch) -> (params in
    which what no gradient moves is set, further metrics)"""

    def __call__(self, params: Tree, batch: Any, key: Tensor) -> LossOutput:
        x = self.middle(params, self.first(params, batch), batch)
        return self.last(params, x, batch, key)


Gradients = Callable[[Tree, Sequence[Any], Sequence[Tensor]], tuple[LossOutput, Tree]]
"""(params, micro-batches, a key for each) -> (LossOutput, gradients of its objective), summed over
them. `learned`, here and in what makes these: a tree of bools like the params, for which of them
gradients are wanted and returned (core.tree.pick); None: for all."""


def value_and_grad(loss_fn: LossFn, learned: Tree | None = None) -> Gradients:
    """One micro-batch after another."""

    def one(tree: Tree, leaves: list[Tensor], *rest: Any) -> tuple[LossOutput, list]:
        out = loss_fn(tree, *rest)
        return _detach(out), _grads([out.objective], leaves)

    def function(params: Tree, micros: Sequence[Any], keys: Sequence[Tensor]):
        tree, leaves, structure = _differentiable(params, learned)
        sums = None, None
        for micro, key in zip(micros, keys, strict=True):
            out, grads = one(tree, leaves, micro, key)
            sums = _add(sums, (out, _exact(grads, len(micros))))
        out, grads = sums
        assert out is not None
        assert grads is not None
        return out, tree_unflatten(_filled(grads, leaves), structure)

    return function


def pipelined_value_and_grad(loss: Stages, mesh: Mesh, learned: Tree | None = None) -> Gradients:
    """This rank's stage of a pipeline, one forward and one backward in turn (1F1B): a stage holds
    the activations of at most as many micro-batches as there are stages after it, and its own.

    Every rank returns gradients for all leaves, zero for those its stage does not use, and a
    LossOutput that is zero but on the last stage: sums over pp are right.
    """
    link = Link(mesh.group("pp"))
    stage, last = link.group.index, link.group.size - 1

    def function(params: Tree, micros: Sequence[Any], keys: Sequence[Tensor]):
        tree, leaves, structure = _differentiable(params, learned)
        device = leaves[0].device
        sums: tuple[Any, Any] = (loss.zero, None)
        held: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for action, i in one_forward_one_backward(last + 1, len(micros), stage):
            if action == "forward":
                x: list[Tensor] = []
                if stage == 0:
                    y = loss.first(tree, micros[i])
                else:
                    y = _receive(link.receive, loss.carry(micros[i]), device)
                    x = _floating(y)
                y = loss.middle(tree, y, micros[i])
                if stage == last:
                    out = loss.last(tree, y, micros[i], keys[i])
                    ends, sums = (
                        [out.objective],
                        (tree_map(torch.add, sums[0], _detach(out)), sums[1]),
                    )
                else:
                    tree_map(lambda t: link.send(t.detach()), y)
                    ends = _floating(y)
                held[i] = (x, ends)
                continue
            x, ends = held.pop(i)
            grads_of_ends = None
            if stage != last:
                of_carry = _floating(loss.carry(micros[i]))
                grads_of_ends = [link.receive_back(like, device) for like in of_carry]
            grads = _grads(ends, [*x, *leaves], grads_of_ends)
            for like in x:
                grad = grads.pop(0)
                link.send_back(torch.zeros_like(like) if grad is None else grad)
            sums = sums[0], _add_grads(sums[1], _exact(grads, len(micros)))
        link.finish()
        return sums[0], tree_unflatten(_filled(sums[1], leaves), structure)

    return function


def _receive(receive: Callable[..., Tensor], like: Tree, device: torch.device) -> Tree:
    """A stage's input; gradients are asked for what is floating."""
    tree = tree_map(lambda t: receive(t, device), like)
    for x in _floating(tree):
        x.requires_grad_()
    return tree


def _floating(tree: Tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if x.is_floating_point()]


def _differentiable(params: Tree, learned: Tree | None) -> tuple[Tree, list[Tensor], Any]:
    """The params, the leaves of which gradients are wanted, and the structure of these alone."""
    moved = params if learned is None else pick(params, learned)
    leaves, structure = tree_flatten(moved)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    moved = tree_unflatten(leaves, structure)
    return moved if learned is None else put_back(moved, params), leaves, structure


def _grads(ends: list[Tensor], leaves: list[Tensor], grads: list[Tensor] | None = None) -> list:
    return list(torch.autograd.grad(ends, leaves, grads, allow_unused=True))


def _detach(out: LossOutput) -> LossOutput:
    return tree_map(torch.Tensor.detach, out)


def _exact(grads: list, count: int) -> list:
    """In half precision, sums of many would lose what each of them adds."""
    if count == 1:
        return grads
    return [g.float() if g is not None and g.element_size() < 4 else g for g in grads]


def _add(sums: tuple[Any, Any], new: tuple[LossOutput, list]) -> tuple[LossOutput, list]:
    out = new[0] if sums[0] is None else tree_map(torch.add, sums[0], new[0])
    return out, _add_grads(sums[1], new[1])


def _add_grads(sums: list | None, new: list) -> list:
    if sums is None:
        return new
    both = [(s, n) for s, n in zip(sums, new, strict=True) if s is not None and n is not None]
    if both:
        torch._foreach_add_([s for s, _ in both], [n for _, n in both])
    return [n if s is None else s for s, n in zip(sums, new, strict=True)]


def _filled(grads: list, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros for leaves that the loss does not use."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def pipelined_loss(loss: Stages, mesh: Mesh) -> LossFn:
    link = Link(mesh.group("pp"))
    stage, last = link.group.index, link.group.size - 1

    def function(params: Tree, batch: Any, key: Tensor) -> LossOutput:
        device = tree_leaves(params)[0].device
        if stage == 0:
            x = loss.first(params, batch)
        else:
            x = tree_map(lambda t: link.receive(t, device), loss.carry(batch))
        x = loss.middle(params, x, batch)
        if stage == last:
            return loss.last(params, x, batch, key)
        tree_map(link.send, x)
        link.finish()
        return loss.zero

    return function

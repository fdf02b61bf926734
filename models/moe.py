"""A mixture of experts: which experts each token goes to, and what they make of it.

No token is dropped, whatever the routing. Shapes are static: experts work on a bounded number of
rows at a time, and what one round has no room for goes in further rounds. The first is traced into
the graph; the others, of which there are nearly always none, are one operator that the compiler
does not look into.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.models import grouped
from omnistep.models.config import Experts
from omnistep.models.grouped import clamped_experts, swiglu_experts
from omnistep.models.layers import at_least_fp32
from omnistep.parallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from omnistep.parallel.experts import (
    Dispatch,
    Pairs,
    choose,
    collect,
    rounds_of,
    rows_at_a_time,
    sort_pairs,
    spread,
    window,
)
from omnistep.parallel.mesh import ALONE, Group


class Routing(NamedTuple):
    """Which experts each token goes to."""

    ids: Int[Tensor, "tokens top_k"]
    weights: Float[Tensor, "tokens top_k"]
    """What each of them counts; differentiable."""
    scores: Float[Tensor, "tokens experts"]
    """Softmax or sigmoid of the router's logits, differentiable; fp32 or better, as weights are."""


def route(
    x: Float[Tensor, "tokens embed"],
    router: Float[Tensor, "experts embed"],
    bias: Float[Tensor, " experts"] | None,
    cfg: Experts,
    logit_bias: Float[Tensor, " experts"] | None = None,
) -> Routing:
    """Each token's `cfg.top_k` experts by the scores of its router, as transformers' Mixtral,
    Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3 and gpt-oss have it.

    bias: added to the scores for the choice, not for the weights. Gradients go through the weights
    and scores; the choice has none.
    logit_bias: learned, and part of the logits (gpt-oss).
    """
    if cfg.exact_logits:
        x, router = at_least_fp32(x), at_least_fp32(router)
    logits = at_least_fp32(F.linear(x, router, logit_bias))
    scores = logits.softmax(-1) if cfg.scoring == "softmax" else logits.sigmoid()
    ids = _choice(scores.detach() if bias is None else scores.detach() + bias.detach(), cfg)
    weights = _at(scores, ids)
    if cfg.normalize:
        total = weights.sum(-1, keepdim=True)
        # sigmoids may all be 0
        weights = weights / (total + 1e-20 if cfg.scoring == "sigmoid" else total)
    return Routing(ids, weights * cfg.scale, scores)


def _choice(scores: Tensor, cfg: Experts) -> Tensor:
    """The best top_k experts of the best top_groups groups (DeepSeek-V2, arXiv 2405.04434, section
    2.1.2; DeepSeek-V3, arXiv 2412.19437)."""
    if cfg.groups > 1:
        grouped = scores.unflatten(-1, (cfg.groups, -1))
        best = grouped.topk(2 if cfg.group_score == "top2" else 1, -1).values.sum(-1)
        chosen = best.topk(cfg.top_groups, -1).indices
        among = (_every(cfg.groups, chosen) == chosen.unsqueeze(-1)).any(-2)
        scores = grouped.masked_fill(~among.unsqueeze(-1), float("-inf")).flatten(-2)
    return scores.topk(cfg.top_k, -1).indices


def _at(scores: Tensor, ids: Tensor) -> Tensor:
    """scores.gather(-1, ids), whose gradient would be added up in memory. Here both directions
    are a comparison and a sum, which the compiler fuses with what is around them."""
    wanted = _every(scores.shape[-1], ids) == ids.unsqueeze(-1)
    return torch.where(wanted, scores.unsqueeze(-2), 0).sum(-1)


def _every(count: int, ids: Tensor) -> Tensor:
    return torch.arange(count, dtype=ids.dtype, device=ids.device)


Weights = tuple[Tensor, ...]
"""Of this rank's experts, what swiglu_experts takes: gate, up [Xl, M, D], down [Xl, D, M]; where
Experts.limit is given, what clamped_experts takes."""


def work_on_experts(
    x: Float[Tensor, "tokens embed"],
    routing: Routing,
    experts: Weights,
    cfg: Experts,
    ep: Group,
    dispatch: Dispatch | None = None,
) -> tuple[Float[Tensor, "tokens embed"], Int[Tensor, ""]]:
    """The weighted sum of what each token's experts make of it, and how many pairs (token, expert)
    this rank's experts have worked on: over all ranks that is tokens * top_k, of any routing.

    Args:
        x: this rank's tokens, as many on every rank of ep.
        experts: this rank's equal share of them.
        dispatch: how tokens meet experts of other ranks; None: what `choose` says. No meaning
            where ep is one rank.
    """
    sizes = (x.shape[0], cfg.top_k, cfg.count, ep.size)
    here = cfg.count // ep.size
    if ep.size == 1:
        pairs = sort_pairs(routing.ids.flatten().int(), here)
        rows = len(pairs.order)
        return _round(x, routing.weights.flatten(), pairs, experts, rows, ALONE, 0, cfg.limit)
    dispatch = dispatch or choose(*sizes)
    rows, bound = rows_at_a_time(dispatch, *sizes)
    ids = routing.ids.detach().int()
    if dispatch == "all_to_all":
        pairs = sort_pairs(ids.flatten(), cfg.count)
        weights = routing.weights.flatten()
        return _in_rounds(x, weights, pairs, experts, rows, bound, ep, cfg.limit)
    ids = all_gather(ids, ep, 0).flatten() - ep.index * here
    pairs = sort_pairs(torch.where((ids >= 0) & (ids < here), ids, here), here)
    x, weights = all_gather(x, ep, 0), all_gather(routing.weights, ep, 0).flatten()
    y, served = _in_rounds(x, weights, pairs, experts, rows, bound, ALONE, cfg.limit)
    return reduce_scatter(y, ep, 0), served


def _in_rounds(
    x: Tensor,
    weights: Tensor,
    pairs: Pairs,
    experts: Weights,
    rows: int,
    bound: int,
    ep: Group,
    limit: float | None,
) -> tuple[Tensor, Tensor]:
    """As many rounds as it takes, on all ranks of ep equally many."""
    if rows >= bound:
        return _round(x, weights, pairs, experts, rows, ep, 0, limit)
    rounds = all_reduce(rounds_of(pairs, ep.size, rows), ep, "max")
    lists, place = (rounds, *pairs), (rows, ep.size, ep.index, ep.name, limit)
    operands = (x, weights, *experts)
    if not torch.is_grad_enabled():
        y, served = _round(x, weights, pairs, experts, rows, ep, 0, limit)
        return further_rounds(y, served, *lists, list(operands), *place)
    ticket, *inside = _FirstRound.apply(lists, place, *operands)  # pyright: ignore
    y, served = _round(*inside[:2], pairs, tuple(inside[2:]), rows, ep, 0, limit)
    return _FurtherRounds.apply(y, served, ticket, lists, place, *operands)  # pyright: ignore


def _round(
    x: Float[Tensor, "tokens embed"],
    weights: Float[Tensor, " pairs"],
    pairs: Pairs,
    experts: Weights,
    rows: int,
    ep: Group,
    round: int,
    limit: float | None,
) -> tuple[Float[Tensor, "tokens embed"], Int[Tensor, ""]]:
    """What the experts make of those pairs that this round has room for, `rows` for each rank of
    ep; how many pairs this rank's experts have worked on."""
    w = window(pairs, ep.size, rows, round)
    back = w.back.unflatten(0, (x.shape[0], -1))
    token = torch.div(w.index, back.shape[1], rounding_mode="floor")  # of -1: -1
    h, a = spread(x, token, back), spread(weights, w.index, w.back.unsqueeze(1))
    if ep.size == 1:
        ends = w.ends.squeeze(0).int()
        y, served = _compute(h, a, experts, ends, limit), ends[-1].long()
    else:
        y, served = _there_and_back(h, a, w.ends.int(), experts, ep, limit)
    return collect(y, back, token), served


def _compute(
    rows: Tensor, weights: Tensor, experts: Weights, ends: Tensor, limit: float | None
) -> Tensor:
    if limit is None:
        return swiglu_experts(rows, weights, *experts, ends)
    return clamped_experts(rows, weights, *experts, ends, limit)


def _there_and_back(
    rows: Float[Tensor, "slots embed"],
    weights: Float[Tensor, " slots"],
    ends: Int[Tensor, "ranks here"],
    experts: Weights,
    ep: Group,
    limit: float | None,
) -> tuple[Float[Tensor, "slots embed"], Int[Tensor, ""]]:
    """What the experts of other ranks make of the rows that are theirs; how many of such rows this
    rank's experts have worked on."""
    rows, weights = all_to_all(rows, ep, 0, 0), all_to_all(weights, ep, 0, 0)
    ends = all_to_all(ends, ep, 0, 0)
    slot = torch.arange(len(rows) // ep.size, dtype=ends.dtype, device=ends.device)
    # of an empty slot: one more than there are
    expert = torch.searchsorted(ends, slot.expand(ep.size, -1).contiguous(), right=True)
    pairs = sort_pairs(expert.flatten().int(), ends.shape[1])
    y, served = _round(rows, weights, pairs, experts, len(rows), ALONE, 0, limit)
    return all_to_all(y, ep, 0, 0), served


@torch.library.custom_op("omnistep::further_rounds", mutates_args=())
def further_rounds(
    y: Tensor,
    served: Tensor,
    rounds: Tensor,
    order: Tensor,
    place: Tensor,
    ends: Tensor,
    operands: list[Tensor],
    rows: int,
    size: int,
    index: int,
    name: str,
    limit: float | None,
) -> tuple[Tensor, Tensor]:
    """y and served of round 0, and what rounds 1 .. rounds - 1 add to them: usually nothing.

    rounds: the same on all ranks of the group; the host reads it, after round 0 has been queued.
    operands: x, weights and the experts' Weights, as for `_round`.
    """
    pairs, ep = Pairs(order, place, ends), Group(("ep",), size, index, name)
    x, weights, *experts = operands
    y, served = y.clone(), served.clone()
    for round in range(1, int(rounds)):
        more, worked = _round(x, weights, pairs, tuple(experts), rows, ep, round, limit)
        y += more
        served += worked
    return y, served


@further_rounds.register_fake
def _(y, served, *_):
    return torch.empty_like(y), torch.empty_like(served)


@torch.library.custom_op("omnistep::further_rounds_backward", mutates_args={"sums"})
def further_rounds_backward(
    sums: list[Tensor],
    grad: Tensor,
    rounds: Tensor,
    order: Tensor,
    place: Tensor,
    ends: Tensor,
    operands: list[Tensor],
    rows: int,
    size: int,
    index: int,
    name: str,
    limit: float | None,
) -> None:
    """Adds to `sums`, the gradients of the operands, what rounds 1 .. rounds - 1 give. Each runs
    again, so that one after another is in memory."""
    pairs, ep = Pairs(order, place, ends), Group(("ep",), size, index, name)
    for round in range(1, int(rounds)):
        leaves = [leaf.detach() for leaf in operands]
        with _autograd():
            leaves = [leaf.requires_grad_() for leaf in leaves]
            x, weights, *experts = leaves
            y, _ = _round(x, weights, pairs, tuple(experts), rows, ep, round, limit)
            grads = torch.autograd.grad(y, leaves, grad)
        torch._foreach_add_(sums, grads)


@contextmanager
def _autograd() -> Iterator[None]:
    """Inside of an operator, where it is not only off but left out of what is called."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class _FirstRound(torch.autograd.Function):
    """Operands on their way to round 0. Backward their gradients come back from there, and those of
    further rounds are added in place: usually nothing, at no cost. The ticket, whose values nobody
    reads, is what _FurtherRounds hands the gradient of y over by."""

    @staticmethod
    def forward(ctx, lists, place, *operands):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*lists, *operands)
        ctx.place = place
        # dynamo tries backward on what forward returned, and refuses to write into views. The
        # compiler leaves the copies out.
        same = torch.clone if torch.compiler.is_compiling() else torch.Tensor.detach
        return torch.empty_like(operands[0]), *(same(x) for x in operands)

    @staticmethod
    def backward(ctx, grad, *sums):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: under checkpointing they can't be had twice
        further_rounds_backward(list(sums), grad, *saved[:4], list(saved[4:]), *ctx.place)
        return None, None, *sums


class _FurtherRounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, served, ticket, lists, place, *operands):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, served = further_rounds(y, served, *lists, list(operands), *place)
        ctx.mark_non_differentiable(served)
        ctx.operands = len(operands)
        return y, served

    @staticmethod
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, grad, None, None, *[None] * ctx.operands


SAVED_OPS = grouped.SAVED_OPS | frozenset(
    {
        torch.ops.omnistep.further_rounds.default,
        # cheap, but computed again it might choose another expert where two are nearly equal
        torch.ops.aten.topk.default,
        torch.ops.aten.sort.stable,
        torch.ops._c10d_functional.all_reduce.default,
    }
)
"""What a checkpointing policy should save rather than compute a second time."""

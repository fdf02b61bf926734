"""Routing and the work of experts, on one rank: a plain loop, until dispatch is in."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnistep.models.config import Experts
from omnistep.models.layers import at_least_fp32
from omnistep.parallel.mesh import Group

Dispatch = Literal["gather", "all_to_all"]
SAVED_OPS: frozenset = frozenset()


class Routing(NamedTuple):
    ids: Tensor
    weights: Tensor
    scores: Tensor


def route(x: Tensor, router: Tensor, bias: Tensor | None, cfg: Experts) -> Routing:
    if cfg.scoring == "sigmoid":
        scores = F.linear(at_least_fp32(x), at_least_fp32(router)).sigmoid()
    else:
        scores = at_least_fp32(F.linear(x, router)).softmax(-1)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if cfg.groups > 1:
        grouped = choice.unflatten(-1, (cfg.groups, -1))
        top = grouped.topk(1 if cfg.group_score == "max" else 2, -1).values.sum(-1)
        keep = torch.zeros_like(top).scatter(-1, top.topk(cfg.top_groups, -1).indices, 1.0).bool()
        choice = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(cfg.top_k, -1).indices
    weights = scores.gather(-1, ids)
    if cfg.normalize:
        tiny = 1e-20 if cfg.scoring == "sigmoid" else 0.0
        weights = weights / (weights.sum(-1, keepdim=True) + tiny)
    return Routing(ids, (weights * cfg.scale).to(x.dtype), scores)


def work_on_experts(
    x: Tensor,
    routing: Routing,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    cfg: Experts,
    ep: Group,
    dispatch: Dispatch | None,
) -> tuple[Tensor, Tensor]:
    assert ep.size == 1
    out = torch.zeros_like(x)
    for e in range(cfg.count):
        share = (routing.weights * (routing.ids == e)).sum(-1, keepdim=True)
        h = F.silu(F.linear(x, gate[e])) * F.linear(x, up[e])
        out = out + F.linear(h * share, down[e])
    return out, torch.tensor(routing.ids.numel(), device=x.device)

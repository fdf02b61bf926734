"""How evenly experts are used: what is counted along the layers, the loss and the bias that even it
out, what is reported."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from omnistep.core.batch import Batch
from omnistep.core.grad import LossOutput
from omnistep.core.tree import Tree
from omnistep.models.block import Load
from omnistep.models.config import Config, Experts
from omnistep.models.layers import at_least_fp32
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.mesh import Group, Mesh


@frozen(eq=False)
class Balance:
    """What a model with experts carries from layer to layer, and makes of it at the end.

    The carry is a dict: x, the hidden state; load [layers, experts], how many tokens each expert
    got; served, how many pairs of a token and an expert were worked on; where there is a
    load-balancing loss, chosen and scores [rows, experts], sums of `Load`'s over the layers. Counts
    are of this rank's tokens.
    """

    cfg: Experts
    layers: int
    """With experts, on all stages."""
    before: int
    """Of them, those of earlier stages."""
    sequence: Group
    """The ranks that share a row."""

    def begin(self, x: Tensor) -> dict[str, Tensor]:
        load = torch.zeros(self.layers, self.cfg.count, dtype=torch.int64, device=x.device)
        carry = {"x": x, "load": load, "served": load.new_zeros(())}
        if self.cfg.aux:
            chosen = load.new_zeros(x.shape[0], self.cfg.count, dtype=torch.int32)
            carry |= {"chosen": chosen, "scores": at_least_fp32(x.new_zeros(chosen.shape))}
        return carry

    def add(
        self, carry: Mapping[str, Tensor], x: Tensor, loads: Sequence[Load]
    ) -> dict[str, Tensor]:
        """The carry after a stage's layers; `loads` are those of its layers with experts."""
        here = torch.stack([load.chosen.sum(0) for load in loads])
        after = self.layers - self.before - len(loads)
        new = {
            "x": x,
            "load": carry["load"] + F.pad(here, (0, 0, self.before, after)),
            "served": carry["served"] + torch.stack([load.served for load in loads]).sum(),
        }
        for name in ("chosen", "scores") if self.cfg.aux else ():
            sums = torch.stack([getattr(load, name) for load in loads])
            new[name] = carry[name] + sums.sum(0, dtype=sums.dtype)  # else int32 becomes int64
        return new

    def finish(self, out: LossOutput, carry: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        tokens = carry["x"].shape[0] * carry["x"].shape[1]
        routed = torch.full_like(carry["served"], tokens * self.cfg.top_k * self.layers)
        sums = {"load": carry["load"], "served": carry["served"], "routed": routed}
        return out._replace(sums=sums, penalties=self._penalties(carry, batch))

    def _penalties(self, carry: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """experts x the sum over experts of (share of tokens) x (mean score), arXiv 2101.03961.

        Both are means over the tokens and layers of one row, so that the number does not depend on
        how rows are spread over micro-batches and ranks; a row counts as much as its targets weigh.
        For a batch of one row it is transformers' load_balancing_loss_func.
        """
        if not self.cfg.aux:
            return {}
        scores = carry["scores"]
        chosen = all_reduce(carry["chosen"].to(scores.dtype), self.sequence)
        tokens = (chosen.sum(-1, keepdim=True) / self.cfg.top_k).clamp(min=1)
        rows = self.cfg.count * (chosen / tokens * scores / tokens).sum(-1)
        weights = batch.weights.sum(-1, dtype=scores.dtype)
        return {"load_balancing_loss": self.cfg.aux * (weights * rows).sum()}

    def zero(self, number: Tensor) -> LossOutput:
        """What stages return that do not come last; `number` is a 0-d zero."""
        count = torch.zeros((), dtype=torch.int64, device=number.device)
        load = count.new_zeros(self.layers, self.cfg.count)
        penalties = {"load_balancing_loss": number} if self.cfg.aux else {}
        sums = {"load": load, "served": count, "routed": count}
        return LossOutput(number, number, penalties=penalties, sums=sums)

    def after(self, params: Tree, sums: Mapping[str, Tensor]) -> tuple[Tree, dict[str, Tensor]]:
        """Moves the router's bias by `bias_rate`, up for experts with fewer tokens than the mean of
        their layer, down for those with more (arXiv 2408.15664, algorithm 1)."""
        load = sums["load"]
        mean = load.double().mean(-1, keepdim=True)
        most = (load.amax(-1) / mean.squeeze(-1).clamp(min=1)).float()
        metrics = {
            "tokens_per_expert": load,
            "expert_imbalance": most.mean(),
            "worst_expert_imbalance": most.amax(),
            "dropped_tokens": sums["routed"] - sums["served"],
        }
        if not self.cfg.bias:
            return params, metrics
        bias: Any = params["router_bias"]
        here = slice(self.before, self.before + bias.shape[0])
        step = (mean[here] - load[here]).sign().to(bias.dtype)
        return {**params, "router_bias": bias + self.cfg.bias_rate * step}, metrics


def make_balance(cfg: Config, mesh: Mesh) -> Balance | None:
    """None for a model without experts."""
    if cfg.experts is None:
        return None
    layers = len(cfg.stacked_layers)
    before = layers // mesh.size("pp") * mesh.index("pp")
    return Balance(cfg.experts, layers, before, mesh.group("cp", "ulysses", "tp"))

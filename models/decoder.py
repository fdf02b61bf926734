"""A decoder: its layers and what stands before and after them, as the stages of a pipeline.

models/config.py says what is computed, models/params.py what is learned, models/block.py what one
layer is; `make_stages` and `make_logits` return the functions that compute the whole. The layers'
weights are stacked: one leaf [layers, ...] per weight. All functions see local tensors; what is
sent between ranks is written out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.batch import Batch, padding, positions, segment_starts
from omnistep.core.grad import LossOutput, Stages
from omnistep.core.param import Layout, one_rank
from omnistep.core.tree import Tree
from omnistep.models import attention, linear, moe
from omnistep.models.attention_cpu import start_compiling
from omnistep.models.balance import make_balance
from omnistep.models.block import add_experts, add_mlp, attend, check_mesh, ranks_of
from omnistep.models.config import Config
from omnistep.models.layers import at_least_fp32, rms_norm, rope_angles, rope_frequencies
from omnistep.models.loss import make_linear_cross_entropy
from omnistep.models.moe import Dispatch
from omnistep.models.params import params
from omnistep.models.stack import unstack, unstacked, with_weights
from omnistep.models.vision import make_see
from omnistep.parallel.collectives import all_gather, reduce_scatter
from omnistep.parallel.mesh import ALONE, Group, Mesh
from omnistep.parallel.remat import Remat
from omnistep.parallel.sequence import share
from omnistep.parallel.unshard import unshard

SAVED_OPS = attention.SAVED_OPS | linear.SAVED_OPS | moe.SAVED_OPS


def make_layer(
    cfg: Config,
    stack: str,
    window: int | None,
    layout: Layout,
    mode: Remat,
    *,
    dispatch: Dispatch | None = None,
    compile: bool,
) -> Callable[..., Any]:
    """Attention and an MLP, or for layers with experts these, with the weights gathered, under a
    memory policy: (x, weights, cos, sin, starts) -> x, or (x, weights, cos, sin, starts, real,
    bias) -> (x, Load); see models/block.py. `stack` is where the weights lie in the tree.
    """
    with_experts = cfg.experts is not None and stack == "layers"
    feed = partial(add_experts, dispatch=dispatch) if with_experts else add_mlp
    ranks = ranks_of(layout.mesh)

    def run(
        x: Tensor, w: Mapping[str, Tensor], cos: Tensor, sin: Tensor, starts: Tensor, *rest: Any
    ) -> Any:
        x = attend(x, w, cos, sin, starts, cfg, window, ranks)
        return feed(x, w, *rest, cfg=cfg, ranks=ranks)

    places = unstacked(layout.places[stack])
    return with_weights(run, places, layout, mode, SAVED_OPS, compile=compile)


def layers_of_stage(cfg: Config, mesh: Mesh) -> range:
    """The layers that this stage of a pipeline runs: an equal share of those that are stacked, and
    of the dense layers of a model with experts those that lie between."""
    stacked, stages, stage = cfg.stacked_layers, mesh.size("pp"), mesh.index("pp")
    here = len(stacked) // stages
    begin = 0 if stage == 0 else stacked[stage * here - 1] + 1
    end = cfg.layers if stage == stages - 1 else stacked[(stage + 1) * here - 1] + 1
    return range(begin, end)


def rope(
    cfg: Config, at: Int[Tensor, "rows seq"] | Int[Tensor, "rows seq 3"], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token's position, or with Config.rope_axes of its three."""
    scaling = cfg.rope_scaling
    frequencies, factor = rope_frequencies(cfg.rope_dim, cfg.rope_theta, scaling, at.device)
    if not cfg.rope_axes:
        return rope_angles(at.unsqueeze(-1), frequencies, factor, dtype)
    turned_by = torch.stack([at[..., axis] for axis in cfg.rope_axes], -1)
    return rope_angles(turned_by, frequencies, factor, dtype)


def rope_positions(cfg: Config, batch: Batch) -> Int[Tensor, "rows seq *three"]:
    if not cfg.rope_axes:
        return positions(batch)
    if batch.rope is None:
        raise ValueError("the model's tokens have three positions, but the batch has no `rope`")
    return batch.rope


def output_name(weights: Mapping[str, Any]) -> str:
    return "lm_head" if "lm_head" in weights else "embed"


def embed(
    tokens: Int[Tensor, "rows seq"],
    weight: Float[Tensor, "vocab embed"],
    dtype: torch.dtype,
    tp: Group = ALONE,
) -> Float[Tensor, "rows seq/tp embed"]:
    """With tp the rows of the weight are shared: each rank looks up the tokens it has the rows of,
    and the sum is scattered over the sequence."""
    if tp.size == 1:
        return F.embedding(tokens, weight).to(dtype)
    ids = tokens - tp.index * weight.shape[0]
    mine = (ids >= 0) & (ids < weight.shape[0])
    x = F.embedding(torch.where(mine, ids, 0), weight).to(dtype) * mine.unsqueeze(-1)
    return reduce_scatter(x, tp, 1)


def make_stages(
    cfg: Config,
    layout: Layout,
    *,
    mode: Remat = "none",
    dispatch: Dispatch | None = None,
    compile: bool = True,
) -> Stages:
    """Summed next-token cross entropy in nats, each target times its weight, in the stages of a
    pipeline: the embedding and the tower, the layers, the loss. With experts, what travels along
    the layers is models/balance.py's dict, of which "x" is the hidden state.

    On a mesh every rank gets the whole rows of its data rank and takes its share of the tokens
    itself. `compile`: each kind of layer and the softmax are compiled; the rest, a small part of
    the work, is not. `dispatch`: how tokens travel to experts; None is the rule of
    parallel/experts.py. Raises MeshError where heads do not fit the mesh.
    """
    mesh, dtype = layout.mesh, layout.dtype
    check_mesh(cfg, mesh)
    if mesh.device.type == "cpu":
        start_compiling()  # attention's kernel, while the layers are traced
    ranks = ranks_of(mesh)
    inner = mesh.group("ulysses", "tp")
    windows = cfg.windows or (None,) * cfg.layers
    balance = make_balance(cfg, mesh)
    numbers = layers_of_stage(cfg, mesh)
    here = [("dense_layers" if i in cfg.dense_layers else "layers", windows[i]) for i in numbers]
    layers = {
        kind: make_layer(cfg, *kind, layout, mode, dispatch=dispatch, compile=compile)
        for kind in sorted(set(here), key=str)
    }
    passed = {"layers": 0, "dense_layers": sum(i < numbers.start for i in cfg.dense_layers)}
    """Of each stack as this stage holds it, what earlier stages run."""
    see = make_see(cfg, layout, mode, compile=compile) if cfg.tower else None
    with_deepstack = cfg.tower is not None and bool(cfg.tower.deepstack) and numbers.start == 0
    outer = {name: at for name, at in layout.places.items() if not isinstance(at, dict)}
    cross_entropy = make_linear_cross_entropy(ranks.tp, compile=compile)

    def use(weights: Tree, name: str) -> Tensor:
        """Not cast where nothing is gathered: what reads it sums its gradient in its own dtype."""
        if not outer[name].inside:
            return weights[name]
        return unshard({name: weights[name]}, outer, dtype)[name]

    def tokens_of(x: Tensor, inside: Group) -> Tensor:
        return share(x, 1, ranks.cp, inside)

    def first(weights: Tree, batch: Batch) -> Tree:
        tokens = tokens_of(batch.tokens, ranks.ulysses)
        x, deepstack = embed(tokens, use(weights, "embed"), dtype, ranks.tp), None
        if see is not None:
            x, deepstack = see(weights, x, batch)
        x = x if balance is None else balance.begin(x)
        return x if deepstack is None else (x, deepstack)

    def middle(weights: Tree, x: Tree, batch: Batch) -> Tree:
        deepstack = ()
        if with_deepstack:
            x, added = x
            deepstack = added.unbind(2)
        cos, sin = rope(cfg, tokens_of(rope_positions(cfg, batch), ranks.ulysses), dtype)
        starts = segment_starts(batch)
        stacks = {
            stack: iter(unstack(weights[stack])[passed[stack] :]) for stack in {s for s, _ in here}
        }
        if balance is None:
            for i, (stack, window) in enumerate(here):
                x = layers[stack, window](x, next(stacks[stack]), cos, sin, starts)
                x = x + deepstack[i] if i < len(deepstack) else x
            return x
        biases = weights["router_bias"].unbind(0) if "router_bias" in weights else None
        real, h, loads = ~tokens_of(padding(batch), inner), x["x"], []
        for i, (stack, window) in enumerate(here):
            layer, w = layers[stack, window], next(stacks[stack])
            if stack == "dense_layers":
                h = layer(h, w, cos, sin, starts)
            else:
                bias = None if biases is None else biases[len(loads)]
                h, load = layer(h, w, cos, sin, starts, real, bias)
                loads.append(load)
            h = h + deepstack[i] if i < len(deepstack) else h
        return balance.add(x, h, loads)

    def last(weights: Tree, x: Tree, batch: Batch, key: Tensor) -> LossOutput:
        h = x if balance is None else x["x"]
        h = rms_norm(h, use(weights, "final_norm").to(dtype), cfg.norm_eps)
        h = all_gather(h, ranks.tp, 1)
        targets = tokens_of(batch.targets, ranks.ulysses)
        target_weights = tokens_of(batch.weights, ranks.ulysses)
        total = cross_entropy(
            h.flatten(0, 1),
            use(weights, output_name(weights)),
            targets.flatten(),
            target_weights.flatten(),
        )
        out = LossOutput(total, target_weights.sum() / ranks.tp.size)
        return out if balance is None else balance.finish(out, x, batch)

    def carry(batch: Batch) -> Tree:
        rows, row = batch.tokens.shape
        seq = row // mesh.size("cp", "ulysses", "tp")
        x = torch.empty((rows, seq, cfg.embed), dtype=dtype, device="meta")
        return x if balance is None else balance.begin(x)

    zero = at_least_fp32(torch.zeros((), dtype=dtype, device=mesh.device))
    if balance is None:
        return Stages(first, middle, last, carry, LossOutput(zero, zero))
    return Stages(first, middle, last, carry, balance.zero(zero), balance.after)


def make_logits(
    cfg: Config, *, dtype: torch.dtype
) -> Callable[[Tree, Batch], Float[Tensor, "rows seq vocab"]]:
    """All logits at once, on one rank: for tests and small inputs. Training uses `make_stages`."""
    stages = make_stages(cfg, one_rank(params(cfg), dtype), compile=False)

    def logits(weights: Tree, batch: Batch) -> Tensor:
        x = stages.middle(weights, stages.first(weights, batch), batch)
        x = x["x"] if cfg.experts else x
        h = rms_norm(x, weights["final_norm"].to(dtype), cfg.norm_eps)
        return F.linear(h, weights[output_name(weights)].to(dtype))

    return logits

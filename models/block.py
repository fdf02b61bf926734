"""One layer of a decoder: attention, then an MLP or a mixture of experts. Pure functions on local
tensors; what is sent between ranks is written out."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attrs import field, frozen
from jaxtyping import Bool, Float, Int
from torch import Tensor

from omnistep.models.attention import ring_attention
from omnistep.models.config import Config
from omnistep.models.latent import project_latent
from omnistep.models.layers import rms_norm, rotary
from omnistep.models.linear import linear
from omnistep.models.moe import Dispatch, route, work_on_experts
from omnistep.parallel.collectives import all_gather, all_to_all, reduce_scatter
from omnistep.parallel.mesh import ALONE, Group, Mesh, MeshError


def project_qkv(
    x: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    cfg: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [rows, seq, heads, head_dim], keys and values [rows, seq, kv_heads, head_dim], the
    first two normed (Qwen3) and rotated."""

    def project(name: str) -> Tensor:
        bias = w.get(f"{name}_bias")
        y = linear(x, w[name].flatten(0, 1), None if bias is None else bias.flatten())
        return y.unflatten(-1, w[name].shape[:2])

    q, k, v = project("q"), project("k"), project("v")
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    return rotary(q, cos, sin), rotary(k, cos, sin), v


def attention_output(
    a: Float[Tensor, "rows seq heads head_dim"], w: Mapping[str, Tensor], tp: Group = ALONE
) -> Float[Tensor, "rows seq/tp embed"]:
    """The sum over the heads of all ranks of tp, scattered over the sequence."""
    y = reduce_scatter(linear(a.flatten(-2), w["o"].flatten(-2)), tp, 1)
    return y + w["o_bias"] if "o_bias" in w else y


def mlp(
    x: Float[Tensor, "rows seq embed"], w: Mapping[str, Tensor], tp: Group = ALONE
) -> Float[Tensor, "rows seq embed"]:
    """SwiGLU (arXiv 2002.05202); the ranks of tp share its width."""
    x = all_gather(x, tp, 1)
    h = F.silu(linear(x, w["gate"], w.get("gate_bias")))
    h = h * linear(x, w["up"], w.get("up_bias"))
    y = reduce_scatter(linear(h, w["down"]), tp, 1)
    return y + w["down_bias"] if "down_bias" in w else y


@frozen
class Ranks:
    """The groups of the mesh that a layer talks to; of size 1 on one rank."""

    cp: Group = field(factory=Group)
    ulysses: Group = field(factory=Group)
    tp: Group = field(factory=Group)
    ep: Group = field(factory=Group)
    """shares the experts; all its ranks hold different tokens"""


def ranks_of(mesh: Mesh) -> Ranks:
    group = mesh.group
    return Ranks(group("cp"), group("ulysses"), group("tp"), group("ep"))


def check_mesh(cfg: Config, mesh: Mesh) -> None:
    """Raises MeshError where attention heads can't be shared by the ranks of tp and ulysses, or the
    first stage of a pipeline, which runs the tower, has too few layers for its deepstack."""
    added = len(cfg.tower.deepstack) if cfg.tower else 0
    stacked = len(cfg.stacked_layers)
    if (stages := mesh.size("pp")) > 1 and stacked // stages < added:
        raise MeshError(
            f"the tower adds to the first {added} layers, but of {stacked} layers the first of pp "
            f"= {stages} stages has {stacked // stages}; pp may be at most {stacked // added}"
        )
    tp, ulysses = mesh.size("tp"), mesh.size("ulysses")
    heads, kv_heads = cfg.heads // tp, max(cfg.kv_heads // tp, 1)
    if heads % ulysses or (kv_heads % ulysses and ulysses % kv_heads):
        fits = [
            n for n in range(1, heads + 1) if heads % n == 0 and not (kv_heads % n and n % kv_heads)
        ]
        raise MeshError(
            f"{heads} attention heads and {kv_heads} key/value heads"
            f"{f' (of each of tp = {tp} ranks)' if tp > 1 else ''} can't be shared by ulysses = "
            f"{ulysses} ranks; ulysses may be {', '.join(map(str, fits))}"
        )


def sequence_to_heads(
    q: Tensor, k: Tensor, v: Tensor, ulysses: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """From a share of the tokens and all heads to all tokens and a share of the heads, by one
    message (DeepSpeed-Ulysses, arXiv 2309.14509). Key/value heads are repeated where there are
    fewer than ranks."""
    if ulysses.size == 1:
        return q, k, v
    if k.shape[2] % ulysses.size:
        k, v = (x.repeat_interleave(ulysses.size // x.shape[2], 2) for x in (k, v))
    parts = [x.unflatten(2, (ulysses.size, -1)) for x in (q, k, v)]
    x = all_to_all(torch.cat(parts, 3), ulysses, 2, 1).squeeze(2)
    q, k, v = x.split([part.shape[3] for part in parts], 2)
    return q, k, v


def sinks_of(w: Mapping[str, Tensor], ulysses: Group = ALONE) -> Tensor | None:
    """Of the heads that this rank of ulysses attends with; None where there are none."""
    return w["sinks"].chunk(ulysses.size)[ulysses.index] if "sinks" in w else None


class Load(NamedTuple):
    """How a layer used its experts. `chosen` and `scores` leave padding out."""

    chosen: Int[Tensor, "rows experts"]
    """int32: how many of a row's tokens here went to each expert."""
    scores: Float[Tensor, "rows experts"]
    """The sum of their scores; differentiable."""
    served: Int[Tensor, ""]
    """Pairs of a token and one of its experts that this rank's experts worked on, for any rank."""


def attend(
    x: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    starts: Int[Tensor, "rows row"],
    cfg: Config,
    window: int | None,
    ranks: Ranks,
) -> Float[Tensor, "rows seq embed"]:
    """x and its attention; `w` holds a layer's weights, without the leading axis, as far as this
    rank of tp uses them. `seq` is this rank's share of the row; `starts` are those of the whole
    row; cos and sin belong to the share of (cp, ulysses), which tp gathers."""
    q, k, v = project(rms_norm(x, w["attn_norm"], cfg.norm_eps), w, cos, sin, cfg, ranks)
    scale, sinks = cfg.attention_scale, sinks_of(w, ranks.ulysses)
    a = ring_attention(q, k, v, starts, ranks.cp, scale=scale, window=window, sinks=sinks)
    a = a[..., : w["o"].shape[-1]]  # values may have been made wider
    return x + attention_output(all_to_all(a, ranks.ulysses, 1, 2), w, ranks.tp)


def project(
    h: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    cfg: Config,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for this rank's heads and the tokens of all ranks of ulysses and tp.
    All are [rows, seq, heads, head_dim]: attention takes values as wide as keys, so narrower ones
    end in zeros."""
    if cfg.latent is None:
        qkv = project_qkv(all_gather(h, ranks.tp, 1), w, cos, sin, cfg)
        return sequence_to_heads(*qkv, ranks.ulysses)
    q, k, v = project_latent(h, w, cos, sin, cfg, ranks.tp, ranks.ulysses)
    return q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1]))


def add_mlp(
    x: Float[Tensor, "rows seq embed"], w: Mapping[str, Tensor], cfg: Config, ranks: Ranks
) -> Float[Tensor, "rows seq embed"]:
    """x and its MLP."""
    return x + mlp(rms_norm(x, w["mlp_norm"], cfg.norm_eps), w, ranks.tp)


def add_experts(
    x: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    real: Bool[Tensor, "rows seq"],
    bias: Float[Tensor, " experts"] | None,
    cfg: Config,
    ranks: Ranks,
    dispatch: Dispatch | None = None,
) -> tuple[Float[Tensor, "rows seq embed"], Load]:
    """x and what its experts make of it.

    real: False for padding, which is routed, but not counted.
    bias: of the layer's router, where it has one (Experts.bias).
    dispatch: None is the rule of parallel/experts.py.
    """
    y, load = mixture(rms_norm(x, w["mlp_norm"], cfg.norm_eps), w, real, bias, cfg, ranks, dispatch)
    return x + y, load


def mixture(
    h: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    real: Bool[Tensor, "rows seq"],
    bias: Float[Tensor, " experts"] | None,
    cfg: Config,
    ranks: Ranks,
    dispatch: Dispatch | None = None,
) -> tuple[Float[Tensor, "rows seq embed"], Load]:
    """The experts' part of a layer, shared ones included. The tokens of a rank are its own: tp does
    not cut the experts, and gathers only what the shared ones read."""
    assert cfg.experts is not None
    tokens = h.flatten(0, 1)
    routing = route(tokens, w["router"], bias, cfg.experts, w.get("logit_bias"))
    names = ("gate", "up", "down")
    if cfg.experts.limit is not None:
        names = ("gate_up", "gate_up_bias", "down", "down_bias")
    experts = tuple(w[f"expert_{name}"] for name in names)
    y, served = work_on_experts(tokens, routing, experts, cfg.experts, ranks.ep, dispatch)
    y = y.view(h.shape)
    if cfg.experts.shared:
        shared = {name: w[f"shared_{name}"] for name in ("gate", "up", "down")}
        also = mlp(h, shared, ranks.tp)
        if cfg.experts.shared_gated:
            also = also * linear(h, w["shared_router"]).sigmoid()
        y = y + also
    rows, seq = real.shape
    hits = routing.ids.view(rows, -1, 1) == torch.arange(cfg.experts.count, device=h.device)
    hits = hits & real.repeat_interleave(cfg.experts.top_k, 1).unsqueeze(-1)
    scores = routing.scores.view(rows, seq, -1) * real.unsqueeze(-1)
    return y, Load(hits.sum(1, dtype=torch.int32), scores.sum(1), served)

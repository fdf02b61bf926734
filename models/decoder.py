"""The dense decoder: Llama, Qwen2, Qwen3, Mistral and Seed-OSS are settings of it.

`Config` says what is computed, `params` what is learned, `make_stages` and `make_logits` return the
functions that compute it. The layers' weights are stacked: one leaf [layers, ...] per weight.
All functions see local tensors; what is sent between ranks is written out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from attrs import field, frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.batch import Batch, positions, segment_starts
from omnistep.core.compile import compile_graph
from omnistep.core.grad import LossOutput, Stages
from omnistep.core.param import Layout, Param, constant, normal, one_rank
from omnistep.core.tree import Tree
from omnistep.models.attention import SAVED_OPS, ring_attention
from omnistep.models.attention_cpu import start_compiling
from omnistep.models.config import Config
from omnistep.models.layers import rms_norm, rope_angles, rope_frequencies, rotary
from omnistep.models.loss import make_linear_cross_entropy
from omnistep.parallel.collectives import all_gather, all_to_all, reduce_scatter
from omnistep.parallel.mesh import Group, Mesh, MeshError
from omnistep.parallel.remat import Remat, remat
from omnistep.parallel.sequence import share
from omnistep.parallel.unshard import unshard

ALONE = Group()


def params(cfg: Config) -> Tree:
    """The tree of Params: embed, layers.<weight> [layers, ...], final_norm, lm_head if untied."""
    L, D, H, K, E, M = cfg.layers, cfg.embed, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp
    init = normal(cfg.init_std)

    def matrix(shape: tuple[int, ...], *axes: str) -> Param:
        return Param((L, *shape), ("layers", *axes), init)

    def vector(shape: tuple[int, ...], *axes: str, value: float) -> Param:
        return Param((L, *shape), ("layers", *axes), constant(value), decay=False)

    layers = {
        "attn_norm": vector((D,), "embed", value=1.0),
        "q": matrix((H, E, D), "heads", "head_dim", "embed"),
        "k": matrix((K, E, D), "kv_heads", "head_dim", "embed"),
        "v": matrix((K, E, D), "kv_heads", "head_dim", "embed"),
        "o": matrix((D, H, E), "embed", "heads", "head_dim"),
        "mlp_norm": vector((D,), "embed", value=1.0),
        "gate": matrix((M, D), "mlp", "embed"),
        "up": matrix((M, D), "mlp", "embed"),
        "down": matrix((D, M), "embed", "mlp"),
    }
    if cfg.qk_norm:
        layers["q_norm"] = vector((E,), "head_dim", value=1.0)
        layers["k_norm"] = vector((E,), "head_dim", value=1.0)
    if cfg.qkv_bias:
        layers["q_bias"] = vector((H, E), "heads", "head_dim", value=0.0)
        layers["k_bias"] = vector((K, E), "kv_heads", "head_dim", value=0.0)
        layers["v_bias"] = vector((K, E), "kv_heads", "head_dim", value=0.0)
    if cfg.out_bias:
        layers["o_bias"] = vector((D,), "embed", value=0.0)
    if cfg.mlp_bias:
        layers["gate_bias"] = vector((M,), "mlp", value=0.0)
        layers["up_bias"] = vector((M,), "mlp", value=0.0)
        layers["down_bias"] = vector((D,), "embed", value=0.0)
    tree = {
        "embed": Param((cfg.vocab, D), ("vocab", "embed"), init),
        "layers": layers,
        "final_norm": Param((D,), ("embed",), constant(1.0), decay=False),
    }
    if not cfg.tied:
        tree["lm_head"] = Param((cfg.vocab, D), ("vocab", "embed"), init)
    return tree


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
        y = F.linear(x, w[name].flatten(0, 1), None if bias is None else bias.flatten())
        return y.unflatten(-1, w[name].shape[:2])

    q, k, v = project("q"), project("k"), project("v")
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    return rotary(q, cos, sin), rotary(k, cos, sin), v


def attention_output(
    a: Float[Tensor, "rows seq heads head_dim"], w: Mapping[str, Tensor], tp: Group = ALONE
) -> Float[Tensor, "rows seq/tp embed"]:
    """The sum over the heads of all ranks of tp, scattered over the sequence."""
    y = reduce_scatter(F.linear(a.flatten(-2), w["o"].flatten(-2)), tp, 1)
    return y + w["o_bias"] if "o_bias" in w else y


def mlp(
    x: Float[Tensor, "rows seq embed"], w: Mapping[str, Tensor], tp: Group = ALONE
) -> Float[Tensor, "rows seq embed"]:
    """SwiGLU (arXiv 2002.05202); the ranks of tp share its width."""
    x = all_gather(x, tp, 1)
    h = F.silu(F.linear(x, w["gate"], w.get("gate_bias")))
    h = h * F.linear(x, w["up"], w.get("up_bias"))
    y = reduce_scatter(F.linear(h, w["down"]), tp, 1)
    return y + w["down_bias"] if "down_bias" in w else y


@frozen
class Ranks:
    """The groups of the mesh that a layer talks to; of size 1 on one rank."""

    cp: Group = field(factory=Group)
    ulysses: Group = field(factory=Group)
    tp: Group = field(factory=Group)
    inner: Group = field(factory=Group)
    """ulysses and tp together"""


def ranks_of(mesh: Mesh) -> Ranks:
    group = mesh.group
    return Ranks(group("cp"), group("ulysses"), group("tp"), group("ulysses", "tp"))


def check_mesh(cfg: Config, mesh: Mesh) -> None:
    """Raises MeshError where attention heads can't be shared by the ranks of tp and ulysses."""
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


def block(
    x: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    starts: Int[Tensor, "rows row"],
    cfg: Config,
    window: int | None,
    ranks: Ranks,
) -> Float[Tensor, "rows seq embed"]:
    """One layer; `w` holds its weights, without the leading axis, as far as this rank of tp uses
    them. `seq` is this rank's share of the row; `starts` are those of the whole row; cos and sin
    belong to the share of (cp, ulysses), which tp gathers."""
    h = all_gather(rms_norm(x, w["attn_norm"], cfg.norm_eps), ranks.tp, 1)
    q, k, v = sequence_to_heads(*project_qkv(h, w, cos, sin, cfg), ranks.ulysses)
    a = ring_attention(q, k, v, starts, ranks.cp, scale=cfg.head_dim**-0.5, window=window)
    x = x + attention_output(all_to_all(a, ranks.ulysses, 1, 2), w, ranks.tp)
    return x + mlp(rms_norm(x, w["mlp_norm"], cfg.norm_eps), w, ranks.tp)


def make_layer(
    cfg: Config, window: int | None, layout: Layout, mode: Remat, *, compile: bool
) -> Callable[..., Tensor]:
    """`block` with its weights gathered, under a memory policy.

    It is compiled by itself and called for each layer, so that any number of layers compiles once.
    (A torch.compiler.nested_compile_region in a graph of all layers would do the same, but in
    torch 2.13 the gradients of a region that is called twice are wrong.)
    """
    ranks = ranks_of(layout.mesh)
    places = {name: at.unstacked() for name, at in layout.places["layers"].items()}
    use = partial(unshard, places=places, dtype=layout.dtype, bucket=layout.bucket)
    again = layout.strategy == "zero3"

    def run(x: Tensor, w: Mapping[str, Tensor], *rest: Any) -> Tensor:
        return block(x, use(w) if again else w, *rest, cfg=cfg, window=window, ranks=ranks)

    groups = {at.gather.name for at in places.values() if at.inside}
    kept = remat(run, mode, SAVED_OPS, frozenset(groups if again else ()))

    def layer(x: Tensor, w: Mapping[str, Tensor], *rest: Any) -> Tensor:
        return kept(x, w if again else use(w), *rest)

    return compile_graph(layer) if compile else layer


def unstack(stacked: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each layer's own weights."""
    per_weight = {name: weight.unbind(0) for name, weight in stacked.items()}
    count = len(next(iter(per_weight.values())))
    return [{name: layers[i] for name, layers in per_weight.items()} for i in range(count)]


def rope(cfg: Config, at: Int[Tensor, "rows seq"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies, factor = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return rope_angles(at, frequencies, factor, dtype)


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
    cfg: Config, layout: Layout, *, mode: Remat = "none", compile: bool = True
) -> Stages:
    """Summed next-token cross entropy in nats, each target times its weight, in the stages of a
    pipeline: the embedding, the layers, the loss.

    On a mesh every rank gets the whole rows of its data rank and takes its share of the tokens
    itself. `compile`: each kind of layer and the softmax are compiled; the rest, a small part of
    the work, is not. Raises MeshError where heads do not fit the mesh.
    """
    mesh, dtype = layout.mesh, layout.dtype
    check_mesh(cfg, mesh)
    if mesh.device.type == "cpu":
        start_compiling()  # attention's kernel, while the layers are traced
    ranks = ranks_of(mesh)
    windows = cfg.windows or (None,) * cfg.layers
    here = cfg.layers // mesh.size("pp")
    windows = windows[mesh.index("pp") * here : (mesh.index("pp") + 1) * here]
    layers = {
        w: make_layer(cfg, w, layout, mode, compile=compile) for w in sorted(set(windows), key=str)
    }
    outer = {name: at for name, at in layout.places.items() if name != "layers"}
    cross_entropy = make_linear_cross_entropy(ranks.tp, compile=compile)

    def use(weights: Tree, name: str) -> Tensor:
        """Not cast where nothing is gathered: what reads it sums its gradient in its own dtype."""
        if not outer[name].inside:
            return weights[name]
        return unshard({name: weights[name]}, outer, dtype)[name]

    def tokens_of(x: Tensor) -> Tensor:
        return share(x, 1, ranks.cp, ranks.ulysses)

    def first(weights: Tree, batch: Batch) -> Tensor:
        return embed(tokens_of(batch.tokens), use(weights, "embed"), dtype, ranks.tp)

    def middle(weights: Tree, x: Tensor, batch: Batch) -> Tensor:
        cos, sin = rope(cfg, tokens_of(positions(batch)), dtype)
        starts = segment_starts(batch)
        for w, window in zip(unstack(weights["layers"]), windows, strict=True):
            x = layers[window](x, w, cos, sin, starts)
        return x

    def last(weights: Tree, x: Tensor, batch: Batch, key: Tensor) -> LossOutput:
        h = rms_norm(x, use(weights, "final_norm").to(dtype), cfg.norm_eps)
        h = all_gather(h, ranks.tp, 1)
        targets, target_weights = tokens_of(batch.targets), tokens_of(batch.weights)
        total = cross_entropy(
            h.flatten(0, 1),
            use(weights, output_name(weights)),
            targets.flatten(),
            target_weights.flatten(),
        )
        return LossOutput(total, target_weights.sum() / ranks.tp.size)

    def carry(batch: Batch) -> Tensor:
        rows, row = batch.tokens.shape
        seq = row // mesh.size("cp", "ulysses", "tp")
        return torch.empty((rows, seq, cfg.embed), dtype=dtype, device="meta")

    return Stages(first, middle, last, carry)


def make_logits(
    cfg: Config, *, dtype: torch.dtype
) -> Callable[[Tree, Batch], Float[Tensor, "rows seq vocab"]]:
    """All logits at once, on one rank: for tests and small inputs. Training uses `make_stages`."""
    stages = make_stages(cfg, one_rank(params(cfg), dtype), compile=False)

    def logits(weights: Tree, batch: Batch) -> Tensor:
        x = stages.middle(weights, stages.first(weights, batch), batch)
        h = rms_norm(x, weights["final_norm"].to(dtype), cfg.norm_eps)
        return F.linear(h, weights[output_name(weights)].to(dtype))

    return logits


def flops(cfg: Config, tokens: float, visible: float) -> float:
    """Model FLOPs of one training step: 6 per matrix weight and token (2 forward, 4 backward), and
    attention's products over `visible` pairs of tokens (causal: about seq/2 a token), which is
    what is needed; recomputation and masked pairs do not count."""
    per_layer = cfg.head_dim * cfg.embed * (2 * cfg.heads + 2 * cfg.kv_heads)
    matrices = cfg.layers * (per_layer + 3 * cfg.embed * cfg.mlp) + cfg.vocab * cfg.embed
    return 6.0 * matrices * tokens + 12.0 * cfg.layers * cfg.heads * cfg.head_dim * visible


def visible_pairs(batch: Batch, cfg: Config) -> float:
    """How many (query, key) pairs attention looks at in a batch, averaged over the layers."""
    seen = positions(batch).double() + 1
    windows = cfg.windows or (None,)
    return sum((seen if w is None else seen.clamp(max=w)).sum().item() for w in windows) / len(
        windows
    )

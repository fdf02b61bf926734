"""The dense decoder: Llama, Qwen2, Qwen3, Mistral and Seed-OSS are settings of it.

`Config` says what is computed, `params` what is learned, `make_hidden_states`, `make_logits` and
`make_loss` return the functions that compute it. The layers' weights are stacked: one leaf
[layers, ...] per weight.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import field, frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.batch import Batch, positions, segment_starts
from omnistep.core.param import Param, constant, normal
from omnistep.core.step import LossFn, LossOutput
from omnistep.core.tree import Tree
from omnistep.models.attention import SAVED_OPS, attention
from omnistep.models.layers import gated_mlp, rms_norm, rope_angles, rope_frequencies, rotary
from omnistep.models.loss import linear_cross_entropy
from omnistep.parallel.remat import Remat, remat


@frozen
class Config:
    """Sizes and variants of a dense decoder."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(factory=dict)
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """For each layer how many tokens back a token sees, itself included; None: all."""
    init_std: float = 0.02

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} attention heads can't share {self.kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


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
    a: Float[Tensor, "rows seq heads head_dim"], w: Mapping[str, Tensor]
) -> Float[Tensor, "rows seq embed"]:
    return F.linear(a.flatten(-2), w["o"].flatten(-2), w.get("o_bias"))


def mlp(x: Float[Tensor, "rows seq embed"], w: Mapping[str, Tensor]) -> Tensor:
    biases = {name: w[f"{name}_bias"] for name in ("gate", "up", "down") if f"{name}_bias" in w}
    return gated_mlp(x, w["gate"], w["up"], w["down"], biases)


def block(
    x: Float[Tensor, "rows seq embed"],
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    starts: Int[Tensor, "rows seq"],
    cfg: Config,
    window: int | None,
) -> Float[Tensor, "rows seq embed"]:
    """One layer; `w` holds its weights, without the leading axis."""
    q, k, v = project_qkv(rms_norm(x, w["attn_norm"], cfg.norm_eps), w, cos, sin, cfg)
    a = attention(q, k, v, starts, scale=cfg.head_dim**-0.5, window=window)
    x = x + attention_output(a, w)
    return x + mlp(rms_norm(x, w["mlp_norm"], cfg.norm_eps), w)


def make_layer(cfg: Config, window: int | None, mode: Remat) -> Callable[..., Tensor]:
    """`block` under a memory policy.

    It is not a torch.compiler.nested_compile_region, which would compile equal layers once: in
    torch 2.13 the gradients of a region that is called twice are wrong
    (tests/models/test_compiled.py would fail).
    """

    def run(*inputs: Any) -> Tensor:
        return block(*inputs, cfg=cfg, window=window)

    return remat(run, mode, SAVED_OPS)


def unstack(stacked: Mapping[str, Tensor], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Each layer's own weights, in the compute dtype."""
    per_weight = {name: weight.to(dtype).unbind(0) for name, weight in stacked.items()}
    count = len(next(iter(per_weight.values())))
    return [{name: layers[i] for name, layers in per_weight.items()} for i in range(count)]


def rope(cfg: Config, at: Int[Tensor, "rows seq"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies, factor = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return rope_angles(at, frequencies, factor, dtype)


def output_weight(weights: Tree) -> Float[Tensor, "vocab embed"]:
    return weights.get("lm_head", weights["embed"])


def make_hidden_states(
    cfg: Config, *, dtype: torch.dtype, mode: Remat = "none"
) -> Callable[[Tree, Batch], Float[Tensor, "rows seq embed"]]:
    """(weights, batch) -> what the output projection reads, after the final norm.

    `dtype` is what products are computed in, whatever the weights are kept in.
    """
    windows = cfg.windows or (None,) * cfg.layers
    by_window = {window: make_layer(cfg, window, mode) for window in set(windows)}

    def hidden_states(weights: Tree, batch: Batch) -> Tensor:
        cos, sin = rope(cfg, positions(batch), dtype)
        starts = segment_starts(batch)
        x = F.embedding(batch.tokens, weights["embed"]).to(dtype)
        for w, window in zip(unstack(weights["layers"], dtype), windows, strict=True):
            x = by_window[window](x, w, cos, sin, starts)
        return rms_norm(x, weights["final_norm"].to(dtype), cfg.norm_eps)

    return hidden_states


def make_logits(
    cfg: Config, *, dtype: torch.dtype
) -> Callable[[Tree, Batch], Float[Tensor, "rows seq vocab"]]:
    """All logits at once: for tests and small inputs. Training uses `make_loss`."""
    hidden_states = make_hidden_states(cfg, dtype=dtype)
    return lambda weights, batch: F.linear(
        hidden_states(weights, batch), output_weight(weights).to(dtype)
    )


def make_loss(cfg: Config, *, dtype: torch.dtype, mode: Remat = "none") -> LossFn:
    """Summed next-token cross entropy in nats, each target times its weight."""
    hidden_states = make_hidden_states(cfg, dtype=dtype, mode=mode)

    def loss(weights: Tree, batch: Batch, key: Tensor) -> LossOutput:
        h = hidden_states(weights, batch).flatten(0, 1)
        targets, target_weights = batch.targets.flatten(), batch.weights.flatten()
        total = linear_cross_entropy(h, output_weight(weights), targets, target_weights)
        return LossOutput(total, batch.weights.sum())

    return loss


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

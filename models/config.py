"""What a decoder is: its sizes and variants. Every family is a setting of `Config`."""

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen

from omnistep.models.layers import rope_frequencies, yarn_magnitude


@frozen
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads
    are made from one small vector a token, queries from another (or from the token itself).

    A head's query and key have `Config.head_dim` = nope + rope elements, of which the last `rope`
    are rotated; the rotated part of the key is the same for all heads.
    """

    kv: int
    """Width of the vector that keys and values are made from."""
    nope: int
    rope: int
    value: int
    """Width of a head's value."""
    q: int | None = None
    """Width of the vector that queries are made from; None: they are made from the token."""
    interleaved: bool = True
    """Neighbouring elements are rotated together, not element i with i + rope/2."""


@frozen
class Experts:
    """A mixture of experts in place of the MLP: each token goes to `top_k` of `count` SwiGLUs."""

    count: int
    top_k: int
    mlp: int
    """Width of one expert."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    exact_logits: bool = False
    """The router's logits are computed in fp32 or better, not in the dtype of the activations."""
    normalize: bool = False
    """The weights of a token's experts add up to 1 (before `scale`)."""
    scale: float = 1.0
    groups: int = 1
    """Experts lie in groups, of which a token uses `top_groups` only."""
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group is as good as its best expert, or as its best two together."""
    bias: bool = False
    """A bias on the scores chooses, but does not weigh, experts; it is moved by `bias_rate` a step
    towards those with too few tokens (arXiv 2408.15664)."""
    bias_rate: float = 1e-3
    aux: float = 0.0
    """Coefficient of the load-balancing loss (Switch Transformer, arXiv 2101.03961)."""
    limit: float | None = None
    """gpt-oss's experts, clamped at this, with biases, which its router has too."""
    shared: int = 0
    """Width of the expert that every token uses besides; 0: there is none."""
    shared_gated: bool = False
    """The shared expert's output is times a sigmoid of the token (Qwen2-MoE)."""
    dense: tuple[int, ...] = ()
    """Layers that have an MLP of width Config.mlp instead of experts."""

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"a token can't use {self.top_k} of {self.count} experts")
        if self.count % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"{self.count} experts can't lie in {self.groups} groups of which a token uses "
                f"{self.top_groups}"
            )
        if self.top_groups * (self.count // self.groups) < self.top_k:
            raise ValueError(
                f"{self.top_groups} groups of {self.count // self.groups} experts hold fewer than "
                f"the {self.top_k} a token uses"
            )


@frozen
class Tower:
    """What turns the patches of images and videos into vectors that stand among a language model's
    token embeddings: a transformer without causality, and a projector of two layers with a GELU
    between, which joins `merge` x `merge` neighbouring patches.

    A patch is `frames` x `patch` x `patch` pixels of `channels` values.
    """

    layers: int
    embed: int
    heads: int
    mlp: int
    patch: int
    frames: int = 1
    channels: int = 3
    merge: int = 1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Of each channel: a pixel's values, 0 to 1, are taken less this and divided by `std`."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    gated: bool = False
    """The MLP is a gated one (SwiGLU with silu)."""
    patch_bias: bool = True
    rotary: bool = False
    """Queries and keys are rotated by row and column: half of the angles each."""
    rope_theta: float = 10000.0
    side: int = 0
    """A learned vector for each place of a square grid of `side` x `side`, between which is
    interpolated where a frame's grid is another one; 0: there are none."""
    class_token: bool = False
    """Each frame begins with a token that is no patch (CLIP). It is learned, and not handed on."""
    pre_norm: bool = False
    """A norm before the first layer."""
    post_norm: bool = False
    """A norm after the last layer."""
    window: int | None = None
    """A patch attends to those in its window: of this many merged patches a side; None: to its
    whole frame."""
    full_layers: tuple[int, ...] = ()
    """With windows, the layers in which it attends to its whole frame nevertheless."""
    deepstack: tuple[int, ...] = ()
    """Layers whose output, through a projector of its own each, is added after the first layers of
    the language model (arXiv 2406.04334)."""
    init_std: float = 0.02
    projector_norm: Literal["layer", "rms"] | None = "layer"
    """Before patches are joined; None: no norm. That of `deepstack` comes after they are joined."""
    projector: int | None = None
    """Width between the projector's two layers; None: embed * merge * merge."""
    projector_bias: bool = True

    def __attrs_post_init__(self) -> None:
        if self.embed % self.heads:
            raise ValueError(f"a tower of width {self.embed} can't have {self.heads} heads")
        if not self.channels == len(self.mean) == len(self.std):
            raise ValueError(
                f"pixels of {self.channels} channels can't have {len(self.mean)} means and "
                f"{len(self.std)} deviations"
            )
        if self.rotary and self.embed // self.heads % 4:
            raise ValueError(
                f"rotation by row and column needs heads of a multiple of 4 elements, not "
                f"{self.embed // self.heads}"
            )
        wrong = [i for i in (*self.full_layers, *self.deepstack) if not 0 <= i < self.layers]
        if wrong:
            raise ValueError(f"a tower of {self.layers} layers has no layer {wrong[0]}")

    @property
    def values(self) -> int:
        """Of a patch: channels x frames x patch x patch, in this order."""
        return self.channels * self.frames * self.patch**2

    @property
    def unit(self) -> int:
        """How many patches become one token."""
        return self.merge**2


@frozen
class Config:
    """Sizes and variants of a decoder, and of the tower in front of it, where there is one."""

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
    sinks: bool = False
    """Each head has a score besides that takes weight and has no value (gpt-oss)."""
    windows: tuple[int | None, ...] = ()
    """For each layer how many tokens back a token sees, itself included; None: all."""
    init_std: float = 0.02
    latent: Latent | None = None
    experts: Experts | None = None
    tower: Tower | None = None
    rope_axes: tuple[int, ...] = ()
    """A token has three positions, in time, height and width (M-RoPE, arXiv 2409.12191); for each
    frequency, of rope_dim / 2, which of them it turns by. Empty: a token has one position."""

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} attention heads can't share {self.kv_heads} key/value heads evenly"
            )
        if self.rope_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.rope_dim}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        if self.latent and self.latent.nope + self.latent.rope != self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} is not {self.latent.nope} + {self.latent.rope}"
            )
        if self.latent and self.latent.value > self.head_dim:
            raise ValueError(
                f"values of {self.latent.value} can't be wider than keys of {self.head_dim}"
            )
        if self.rope_axes and len(self.rope_axes) != self.rope_dim // 2:
            raise ValueError(
                f"{len(self.rope_axes)} frequencies have an axis (mrope_section), but there are "
                f"{self.rope_dim // 2}"
            )
        wrong = [i for i in self.dense_layers if not 0 <= i < self.layers]
        if wrong or len(self.dense_layers) == self.layers:
            raise ValueError(f"layers {wrong or 'all'} of {self.layers} are to have no experts")
        rope_frequencies(self.rope_dim, self.rope_theta, self.rope_scaling)

    @property
    def rope_dim(self) -> int:
        """How many elements of a query and key are rotated."""
        return self.latent.rope if self.latent else self.head_dim

    @property
    def attention_scale(self) -> float:
        """Scores are this times query times key. With latent attention YaRN's magnitude (arXiv
        2309.00071) is in here, not in the angles, for what is not rotated has it too."""
        magnitude = 1.0
        if self.latent and self.rope_scaling.get("rope_type", "default") != "default":
            share = self.rope_scaling.get("mscale_all_dim") or 0.0
            magnitude = yarn_magnitude(float(self.rope_scaling.get("factor", 1.0)), share)
        return self.head_dim**-0.5 * magnitude**2

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Of a model with experts, the layers that have none, in order."""
        return tuple(sorted(self.experts.dense)) if self.experts else ()

    @property
    def stacked_layers(self) -> tuple[int, ...]:
        """The layers whose weights lie in `layers`; those in dense_layers lie in `dense_layers`."""
        return tuple(i for i in range(self.layers) if i not in self.dense_layers)

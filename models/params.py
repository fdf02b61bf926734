"""What a decoder learns: one tree of Params, derived from its Config."""

from attrs import frozen

from omnistep.core.config_rules import PARTS
from omnistep.core.param import Param, constant, normal
from omnistep.core.tree import Tree
from omnistep.models.config import Config, Experts, Latent, Tower


def part_of(name: str) -> str:
    """Which of PARTS the leaf of that dotted name belongs to."""
    first = name.partition(".")[0]
    return first if first in PARTS else "language_model"


@frozen
class _Stack:
    """Makes weights of `count` layers, one leaf for all."""

    axis: str
    count: int
    std: float

    def matrix(self, shape: tuple[int, ...], *axes: str) -> Param:
        return Param((self.count, *shape), (self.axis, *axes), normal(self.std))

    def vector(self, shape: tuple[int, ...], *axes: str, value: float = 0.0) -> Param:
        return Param((self.count, *shape), (self.axis, *axes), constant(value), decay=False)


@frozen
class _One:
    """Makes weights that are not stacked."""

    std: float

    def matrix(self, shape: tuple[int, ...], *axes: str) -> Param:
        return Param(shape, axes, normal(self.std))

    def vector(self, shape: tuple[int, ...], *axes: str, value: float = 0.0) -> Param:
        return Param(shape, axes, constant(value), decay=False)


def params(cfg: Config) -> Tree:
    """The tree of Params: embed, layers.<weight> [layers, ...], final_norm, lm_head if untied.

    With experts, `layers` are those that have some; those without are dense_layers.<weight>
    [dense layers, ...]. router_bias [layers, experts], where there is one, gets no gradient.
    With a tower in front: encoder.<weight>, encoder.layers.<weight> [layers, ...],
    projector.<weight>, and with deepstack projector.deepstack.<weight> [such layers, ...].
    """
    tree = {
        "embed": Param((cfg.vocab, cfg.embed), ("vocab", "embed"), normal(cfg.init_std)),
        "layers": _layers(cfg, "layers", len(cfg.stacked_layers), cfg.experts),
        "final_norm": Param((cfg.embed,), ("embed",), constant(1.0), decay=False),
    }
    if cfg.dense_layers:
        tree["dense_layers"] = _layers(cfg, "dense_layers", len(cfg.dense_layers), None)
    if cfg.experts and cfg.experts.bias:
        shape = (len(cfg.stacked_layers), cfg.experts.count)
        bias = Param(
            shape, ("layers", "choices"), constant(0.0), decay=False, exact=True, learned=False
        )
        tree["router_bias"] = bias
    if cfg.tower:
        tree["encoder"] = _encoder(cfg.tower)
        tree["projector"] = _projector(cfg.tower, cfg.embed)
    if not cfg.tied:
        tree["lm_head"] = Param((cfg.vocab, cfg.embed), ("vocab", "embed"), normal(cfg.init_std))
    return tree


def _layers(cfg: Config, axis: str, count: int, experts: Experts | None) -> dict[str, Param]:
    stack = _Stack(axis, count, cfg.init_std)
    attention = _attention(cfg, stack) if cfg.latent is None else _latent(cfg, cfg.latent, stack)
    return {
        "attn_norm": stack.vector((cfg.embed,), "embed", value=1.0),
        **attention,
        "mlp_norm": stack.vector((cfg.embed,), "embed", value=1.0),
        **(_mlp(cfg, stack) if experts is None else _experts(cfg, experts, stack)),
    }


def _attention(cfg: Config, stack: _Stack) -> dict[str, Param]:
    D, H, K, E = cfg.embed, cfg.heads, cfg.kv_heads, cfg.head_dim
    layers = {
        "q": stack.matrix((H, E, D), "heads", "head_dim", "embed"),
        "k": stack.matrix((K, E, D), "kv_heads", "head_dim", "embed"),
        "v": stack.matrix((K, E, D), "kv_heads", "head_dim", "embed"),
        "o": stack.matrix((D, H, E), "embed", "heads", "head_dim"),
    }
    if cfg.qk_norm:
        layers["q_norm"] = stack.vector((E,), "head_dim", value=1.0)
        layers["k_norm"] = stack.vector((E,), "head_dim", value=1.0)
    if cfg.qkv_bias:
        layers["q_bias"] = stack.vector((H, E), "heads", "head_dim")
        layers["k_bias"] = stack.vector((K, E), "kv_heads", "head_dim")
        layers["v_bias"] = stack.vector((K, E), "kv_heads", "head_dim")
    if cfg.out_bias:
        layers["o_bias"] = stack.vector((D,), "embed")
    if cfg.sinks:
        layers["sinks"] = stack.vector((H,), "heads")
    return layers


def _latent(cfg: Config, latent: Latent, stack: _Stack) -> dict[str, Param]:
    D, H, E = cfg.embed, cfg.heads, cfg.head_dim
    if latent.q is None:
        layers = {"q": stack.matrix((H, E, D), "heads", "head_dim", "embed")}
    else:
        layers = {
            "q_a": stack.matrix((latent.q, D), "latent", "embed"),
            "q_a_norm": stack.vector((latent.q,), "latent", value=1.0),
            "q_b": stack.matrix((H, E, latent.q), "heads", "head_dim", "latent"),
        }
        if cfg.qkv_bias:
            layers["q_a_bias"] = stack.vector((latent.q,), "latent")
    wide, both = latent.kv + latent.rope, latent.nope + latent.value
    layers["kv_a"] = stack.matrix((wide, D), "latent", "embed")
    layers["kv_a_norm"] = stack.vector((latent.kv,), "latent", value=1.0)
    layers["kv_b"] = stack.matrix((H, both, latent.kv), "heads", "head_dim", "latent")
    layers["o"] = stack.matrix((D, H, latent.value), "embed", "heads", "head_dim")
    if cfg.qkv_bias:
        layers["kv_a_bias"] = stack.vector((wide,), "latent")
    if cfg.out_bias:
        layers["o_bias"] = stack.vector((D,), "embed")
    return layers


def _mlp(cfg: Config, stack: _Stack) -> dict[str, Param]:
    D, M = cfg.embed, cfg.mlp
    layers = {
        "gate": stack.matrix((M, D), "mlp", "embed"),
        "up": stack.matrix((M, D), "mlp", "embed"),
        "down": stack.matrix((D, M), "embed", "mlp"),
    }
    if cfg.mlp_bias:
        layers["gate_bias"] = stack.vector((M,), "mlp")
        layers["up_bias"] = stack.vector((M,), "mlp")
        layers["down_bias"] = stack.vector((D,), "embed")
    return layers


def _experts(cfg: Config, experts: Experts, stack: _Stack) -> dict[str, Param]:
    D, X, M, S = cfg.embed, experts.count, experts.mlp, experts.shared
    layers = {"router": stack.matrix((X, D), "choices", "embed")}
    if experts.limit is None:
        layers["expert_gate"] = stack.matrix((X, M, D), "experts", "expert_mlp", "embed")
        layers["expert_up"] = stack.matrix((X, M, D), "experts", "expert_mlp", "embed")
        layers["expert_down"] = stack.matrix((X, D, M), "experts", "embed", "expert_mlp")
    else:
        layers["logit_bias"] = stack.vector((X,), "choices")
        layers["expert_gate_up"] = stack.matrix((X, D, 2 * M), "experts", "embed", "expert_mlp")
        layers["expert_gate_up_bias"] = stack.vector((X, 2 * M), "experts", "expert_mlp")
        layers["expert_down"] = stack.matrix((X, M, D), "experts", "expert_mlp", "embed")
        layers["expert_down_bias"] = stack.vector((X, D), "experts", "embed")
    if S:
        layers["shared_gate"] = stack.matrix((S, D), "mlp", "embed")
        layers["shared_up"] = stack.matrix((S, D), "mlp", "embed")
        layers["shared_down"] = stack.matrix((D, S), "embed", "mlp")
        if experts.shared_gated:
            layers["shared_router"] = stack.matrix((1, D), "one", "embed")
    return layers


def _encoder(tower: Tower) -> Tree:
    """Its axes have names of their own: a tower is not cut by the axes of the mesh that cut the
    language model."""
    D, V, one = tower.embed, tower.values, _One(tower.init_std)
    tree: dict[str, Tree] = {"patch": one.matrix((D, V), "vision", "values")}
    if tower.patch_bias:
        tree["patch_bias"] = one.vector((D,), "vision")
    if tower.class_token:
        tree["class_token"] = Param((D,), ("vision",), normal(tower.init_std), decay=False)
    if tower.side:
        places = tower.side**2 + tower.class_token
        tree["places"] = one.matrix((places, D), "places", "vision")
    for name in ["pre_norm"] * tower.pre_norm + ["post_norm"] * tower.post_norm:
        tree |= _norm(tower.norm, one, name, D, "vision")
    tree["layers"] = _tower_layers(tower)
    return tree


def _tower_layers(tower: Tower) -> dict[str, Param]:
    D, M, stack = tower.embed, tower.mlp, _Stack("vision_layers", tower.layers, tower.init_std)
    layers = {
        **_norm(tower.norm, stack, "attn_norm", D, "vision"),
        "qkv": stack.matrix((3, D, D), "qkv", "vision_heads", "vision"),
        "qkv_bias": stack.vector((3, D), "qkv", "vision_heads"),
        "o": stack.matrix((D, D), "vision", "vision_heads"),
        "o_bias": stack.vector((D,), "vision"),
        **_norm(tower.norm, stack, "mlp_norm", D, "vision"),
        "up": stack.matrix((M, D), "vision_mlp", "vision"),
        "up_bias": stack.vector((M,), "vision_mlp"),
        "down": stack.matrix((D, M), "vision", "vision_mlp"),
        "down_bias": stack.vector((D,), "vision"),
    }
    if tower.gated:
        layers["gate"] = stack.matrix((M, D), "vision_mlp", "vision")
        layers["gate_bias"] = stack.vector((M,), "vision_mlp")
    return layers


def _projector(tower: Tower, embed: int) -> Tree:
    one = _One(tower.init_std)
    tree = _joiner(tower, one, embed, tower.embed)
    if tower.deepstack:
        stack = _Stack("deepstack", len(tower.deepstack), tower.init_std)
        tree["deepstack"] = _joiner(tower, stack, embed, tower.embed * tower.unit)
    return tree


def _joiner(tower: Tower, stack: "_Stack | _One", embed: int, normed: int) -> dict[str, Tree]:
    """Two layers from a unit of patches to the language model's width; `normed`: the norm's."""
    joined = tower.embed * tower.unit
    hidden = tower.projector or joined
    tree = {
        "up": stack.matrix((hidden, joined), "projector", "joined"),
        "down": stack.matrix((embed, hidden), "embed", "projector"),
    }
    if tower.projector_norm:
        tree |= _norm(tower.projector_norm, stack, "norm", normed, "joined")
    if tower.projector_bias:
        tree["up_bias"] = stack.vector((hidden,), "projector")
        tree["down_bias"] = stack.vector((embed,), "embed")
    return dict(tree)


def _norm(kind: str, stack: "_Stack | _One", name: str, size: int, axis: str) -> dict[str, Param]:
    norm = {name: stack.vector((size,), axis, value=1.0)}
    return norm | ({f"{name}_bias": stack.vector((size,), axis)} if kind == "layer" else {})

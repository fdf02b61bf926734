"""The names that files in Hugging Face's layout give to our weights. Sources: transformers 5.23,
models/<model_type>/modeling_*.py, and conversion_mapping.py for experts, which are one tensor a
layer in its modules, but in files one each."""

import itertools
import re
from collections.abc import Iterator, Mapping

from attrs import frozen

from omnistep.core.param import Param, is_param
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.models.config import Config

Shape = tuple[int, ...]

OUTER = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "router_bias": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
}
LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_bias": "self_attn.q_a_proj.bias",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{expert}.gate_proj.weight",
    "expert_up": "mlp.experts.{expert}.up_proj.weight",
    "expert_down": "mlp.experts.{expert}.down_proj.weight",
    "sinks": "self_attn.sinks",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}
FAMILY = {
    "qwen2_moe": {
        "shared_gate": "mlp.shared_expert.gate_proj.weight",
        "shared_up": "mlp.shared_expert.up_proj.weight",
        "shared_down": "mlp.shared_expert.down_proj.weight",
        "shared_router": "mlp.shared_expert_gate.weight",
    },
    "gpt_oss": {
        "router": "mlp.router.weight",
        "logit_bias": "mlp.router.bias",
        "expert_gate_up": "mlp.experts.gate_up_proj",
        "expert_gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "expert_down": "mlp.experts.down_proj",
        "expert_down_bias": "mlp.experts.down_proj_bias",
    },
    "mixtral": {
        "router": "block_sparse_moe.gate.weight",
        "expert_gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "expert_up": "block_sparse_moe.experts.{expert}.w3.weight",
        "expert_down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
}
"""Where a family's names of a layer's weights are not those of LAYER."""


@frozen
class Part:
    """A tensor in a file, and the part of our leaf that it is."""

    theirs: str
    ours: str
    """Dotted name of the leaf."""
    param: Param
    at: tuple[int, ...]
    """Its place along the leaf's first dimensions, those that are not one tensor there."""

    @property
    def shape(self) -> Shape:
        return hf_shape(self.param, len(self.at))


@frozen(eq=False)
class Names:
    """How a model's weights are named in files."""

    templates: Mapping[str, str]
    """Last name of our leaf -> theirs, with {layer} and {expert} for the first dimensions of
    stacked leaves."""
    layers: Mapping[str, tuple[int, ...]]
    """Axis of a stack of layers -> the number that each of them has in the model."""

    def parts(self, ours: str, param: Param) -> Iterator[Part]:
        """The tensors that one of our leaves is made of, in its order."""
        template = self.templates[ours.rpartition(".")[2]]
        for at in itertools.product(*(range(n) for n in param.shape[: template.count("{")])):
            numbers = dict(zip(("layer", "expert"), at, strict=False))
            if at:
                numbers["layer"] = self.layers[param.axes[0]][at[0]]
            yield Part(template.format(**numbers), ours, param, at)

    def all_parts(self, params: Tree) -> Iterator[Part]:
        """Every tensor of a model."""
        for ours, param in leaves_with_names(params, is_leaf=is_param).items():
            yield from self.parts(ours, param)


def weight_names(family: str, cfg: Config) -> Names:
    """Those of a family, by its model_type."""
    layer = LAYER | FAMILY.get(family, {})
    return Names(
        OUTER | {ours: "model.layers.{layer}." + theirs for ours, theirs in layer.items()},
        {"layers": cfg.stacked_layers, "dense_layers": cfg.dense_layers},
    )


_EXPERT = re.compile(
    r"(?P<layer>.*)\.(mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\."
    r"((?P<gate>gate_proj|w1)|(?P<up>up_proj|w3)|down_proj|w2)\.weight"
)


@frozen
class Fused:
    """Where transformers' modules, and what is saved of them, hold a tensor of a file."""

    name: str
    expert: int | None = None
    """Of those that are one tensor there; None: it is a tensor there too."""
    half: int | None = None
    """Of an expert's rows; None: it is all of them."""


def fused(theirs: str) -> Fused:
    found = _EXPERT.fullmatch(theirs)
    if found is None:
        return Fused(theirs.replace(".block_sparse_moe.", ".mlp."))
    half = 0 if found["gate"] else 1 if found["up"] else None
    folder, kind = f"{found['layer']}.mlp.experts", "down_proj" if half is None else "gate_up_proj"
    return Fused(f"{folder}.{kind}", int(found["expert"]), half)


def hf_shape(param: Param, stacked: int) -> Shape:
    """The shape there of a part of a leaf whose first `stacked` dimensions are split: `heads ×
    head_dim` is one dimension."""
    shape: list[int] = []
    for axis, size in zip(param.axes[stacked:], param.shape[stacked:], strict=True):
        if axis == "head_dim" and shape:
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)

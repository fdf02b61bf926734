"""The names that files in Hugging Face's layout give to our weights. Sources: transformers 5.23,
models/<model_type>/modeling_*.py, and conversion_mapping.py for how files differ from its modules:
in experts, which are one tensor a layer in these, but in most files one each, and in the names that
the parts of a vision-language model have."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from attrs import field, frozen

from omnistep.core.param import Param, is_param
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.models.config import Config
from omnistep.models.hf_config import text_family
from omnistep.models.hf_text import Json
from omnistep.models.hf_vision import tower_kind
from omnistep.models.hf_vision_names import tower_names, unused

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
    "qwen3_vl_moe_text": {
        "expert_gate": "mlp.experts.gate_up_proj",
        "expert_up": "mlp.experts.gate_up_proj",
        "expert_down": "mlp.experts.down_proj",
    },
}
"""Where a family's names of a layer's weights are not those of LAYER."""

HALVES = {"layers.expert_gate": 0, "layers.expert_up": 1}
"""Where two of our leaves have one template: which rows of each expert in the tensor."""

TEXT_PREFIX = {
    "qwen3_vl": ("model.", "model.language_model."),
    "qwen3_vl_moe": ("model.", "model.language_model."),
    "llava": ("", "language_model."),
}
"""How the names of the text model's tensors begin in a vision-language family's files, in the place
of how they do alone."""
TOWER_PREFIX = {
    "qwen2_vl": "visual.",
    "qwen2_5_vl": "visual.",
    "qwen3_vl": "model.visual.",
    "qwen3_vl_moe": "model.visual.",
    "llava": "vision_tower.",
}

Rules = Sequence[tuple[str, str]]
_QWEN2_VL: Rules = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
)
SPELLINGS: dict[str, Rules] = {
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "llava": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
}
"""Patterns in the names of a family's other files, by other versions of transformers, and what
stands there in those that 5.23 writes."""


@frozen
class Part:
    """A tensor in a file, and the part of our leaf that it is."""

    theirs: str
    ours: str
    """Dotted name of the leaf."""
    param: Param
    at: tuple[int, ...]
    """Its place along the leaf's first dimensions, those that are not one tensor there."""
    shape: Shape
    """Of the tensor."""
    half: int | None = None
    """Where a tensor has the rows of two parts, for each expert first those of one, then those of
    the other: which of them this is. None: it is all of the tensor."""


@frozen(eq=False)
class Names:
    """How a model's weights are named in files."""

    templates: Mapping[str, str]
    """Dotted name of our leaf -> theirs, with {layer}, {expert} and {qkv} for the first dimensions
    of stacked leaves. Those of dense_layers are those of layers."""
    stacks: Mapping[str, tuple[int, ...]]
    """Axis of a stack of layers -> the number that each of them has in the model."""
    shapes: Mapping[str, Shape] = field(factory=dict)
    """Where a leaf's last dimension is several there: the tensor's shape."""
    spellings: Rules = ()
    """See SPELLINGS."""
    constants: Mapping[str, tuple[Shape, float]] = field(factory=dict)
    """Tensors that transformers wants to be there though nothing comes of them: shape and value."""
    turned_experts: bool = False
    """A layer's experts are one tensor, and in some files the matrices of each are [in, out]."""

    def parts(self, ours: str, param: Param) -> Iterator[Part]:
        """The tensors that one of our leaves is made of, in its order."""
        leaf = re.sub("^dense_layers", "layers", ours)
        template = self.templates[leaf]
        fields = re.findall(r"{(\w+)}", template)
        half = HALVES[leaf] if leaf in HALVES and "expert" not in fields else None
        shape = self.shapes.get(ours) or hf_shape(param, len(fields))
        if half is not None:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        for at in itertools.product(*(range(n) for n in param.shape[: len(fields)])):
            numbers: dict[str, int | str] = dict(zip(fields, at, strict=True))
            if "layer" in numbers:
                numbers["layer"] = self.stacks[param.axes[0]][at[0]]
            if "qkv" in numbers:
                numbers["qkv"] = "qkv"[at[-1]]
            yield Part(template.format(**numbers), ours, param, at, shape, half)

    def all_parts(self, params: Tree) -> Iterator[Part]:
        """Every part of a model; of a tensor that has two, each."""
        for ours, param in leaves_with_names(params, is_leaf=is_param).items():
            yield from self.parts(ours, param)

    def tensors(self, params: Tree) -> dict[str, tuple[Part, ...]]:
        """Every tensor of a model, and its parts in order."""
        found: dict[str, tuple[Part, ...]] = {}
        for part in self.all_parts(params):
            found[part.theirs] = (*found.get(part.theirs, ()), part)
        return found

    def spelled(self, name: str) -> str:
        """The name by which we know a tensor of a file that may be of another version."""
        for pattern, ours in self.spellings:
            name = re.sub(pattern, ours, name)
        return name


def weight_names(raw: Json, cfg: Config) -> Names:
    """Those that transformers 5.23 writes for the model of a config.json."""
    family, text = str(raw["model_type"]), text_family(raw)
    layer = LAYER | FAMILY.get(text, {})
    templates = OUTER | {f"layers.{n}": f"model.layers.{{layer}}.{t}" for n, t in layer.items()}
    old, new = TEXT_PREFIX.get(family, ("", ""))
    templates = {
        ours: new + theirs[len(old) :] if theirs.startswith(old) else theirs
        for ours, theirs in templates.items()
    }
    stacks = {"layers": cfg.stacked_layers, "dense_layers": cfg.dense_layers}
    if cfg.tower is None:
        return Names(templates, stacks)
    tower = cfg.tower
    kind, prefix = tower_kind(raw), TOWER_PREFIX[family]
    frames = (tower.frames,) if kind.startswith("qwen") else ()  # a Conv3d's weight, or a Conv2d's
    patch = (tower.embed, tower.channels, *frames, tower.patch, tower.patch)
    return Names(
        templates | tower_names(kind, prefix),
        stacks
        | {"vision_layers": tuple(range(tower.layers))}
        | {"deepstack": tuple(range(len(tower.deepstack)))},
        {"encoder.patch": patch},
        SPELLINGS.get(family, ()),
        unused(kind, prefix, tower.embed),
        text == "qwen3_vl_moe_text",
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
    """The shape there of a part of a leaf whose first `stacked` dimensions are split: those that
    `joins` its predecessor are one dimension with it."""
    axes, shape = param.axes[stacked:], list[int]()
    for i, size in enumerate(param.shape[stacked:]):
        if joins(axes, i):
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)


def joins(axes: Sequence[str], i: int) -> bool:
    """Whether dimension i of a leaf is one with the dimension before it in files: heads and
    head_dim, and queries, keys and values."""
    return i > 0 and (axes[i] == "head_dim" or axes[i - 1] == "qkv")

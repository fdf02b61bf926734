"""The names that files in Hugging Face's layout give to the weights of a vision tower and its
projector. Source: transformers 5.23, models/{qwen2_vl,qwen2_5_vl,qwen3_vl,clip,siglip,llava}/
modeling_*.py."""

from collections.abc import Iterable

_QWEN = {
    "encoder.patch": "patch_embed.proj",
    "encoder.places": "pos_embed",
    "encoder.layers.attn_norm": "blocks.{layer}.norm1",
    "encoder.layers.qkv": "blocks.{layer}.attn.qkv",
    "encoder.layers.o": "blocks.{layer}.attn.proj",
    "encoder.layers.mlp_norm": "blocks.{layer}.norm2",
}
_QWEN2_MERGER = {
    "projector.norm": "merger.ln_q",
    "projector.up": "merger.mlp.0",
    "projector.down": "merger.mlp.2",
}
_QWEN3 = _QWEN | {
    "encoder.layers.up": "blocks.{layer}.mlp.linear_fc1",
    "encoder.layers.down": "blocks.{layer}.mlp.linear_fc2",
    "projector.norm": "merger.norm",
    "projector.up": "merger.linear_fc1",
    "projector.down": "merger.linear_fc2",
    "projector.deepstack.norm": "deepstack_merger_list.{layer}.norm",
    "projector.deepstack.up": "deepstack_merger_list.{layer}.linear_fc1",
    "projector.deepstack.down": "deepstack_merger_list.{layer}.linear_fc2",
}
_FIXED = {
    "encoder.patch": "embeddings.patch_embedding",
    "encoder.places": "embeddings.position_embedding",
    "encoder.pre_norm": "pre_layrnorm",  # so misspelt there
    "encoder.post_norm": "post_layernorm",
    "encoder.layers.attn_norm": "encoder.layers.{layer}.layer_norm1",
    "encoder.layers.qkv": "encoder.layers.{layer}.self_attn.{qkv}_proj",
    "encoder.layers.o": "encoder.layers.{layer}.self_attn.out_proj",
    "encoder.layers.mlp_norm": "encoder.layers.{layer}.layer_norm2",
    "encoder.layers.up": "encoder.layers.{layer}.mlp.fc1",
    "encoder.layers.down": "encoder.layers.{layer}.mlp.fc2",
}
MODULES = {
    "qwen2_vl_vision": _QWEN
    | _QWEN2_MERGER
    | {
        "encoder.layers.up": "blocks.{layer}.mlp.fc1",
        "encoder.layers.down": "blocks.{layer}.mlp.fc2",
    },
    "qwen2_5_vl_vision": _QWEN
    | _QWEN2_MERGER
    | {
        "encoder.layers.gate": "blocks.{layer}.mlp.gate_proj",
        "encoder.layers.up": "blocks.{layer}.mlp.up_proj",
        "encoder.layers.down": "blocks.{layer}.mlp.down_proj",
    },
    "qwen3_vl_vision": _QWEN3,
    "qwen3_vl_moe_vision": _QWEN3,
    "clip_vision_model": _FIXED,
    "siglip_vision_model": _FIXED,
}
"""Of a tower, by its model_type: our leaf -> the module whose weight it is; <leaf>_bias is its
bias."""
LLAVA_PROJECTOR = {
    "projector.up": "multi_modal_projector.linear_1",
    "projector.down": "multi_modal_projector.linear_2",
}

PREFIXES = (
    "model.visual.",
    "visual.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
    "",
)
"""How the names of a tower's tensors may begin in files: those of a whole model of any version, or
of the tower alone."""


def tower_names(kind: str, prefix: str) -> dict[str, str]:
    """Dotted name of our leaf -> their template, for a tower whose names begin with `prefix`, and
    its projector."""
    modules = {ours: prefix + module for ours, module in MODULES[kind].items()}
    if MODULES[kind] is _FIXED:
        modules |= LLAVA_PROJECTOR
    weights = {ours: f"{module}.weight" for ours, module in modules.items()}
    biases = {f"{ours}_bias": f"{module}.bias" for ours, module in modules.items()}
    return weights | biases | {"encoder.class_token": f"{prefix}embeddings.class_embedding"}


def unused(kind: str, prefix: str, width: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """The tensors of a tower in LLaVA that have no part in what it computes, with shape and value:
    CLIP and SigLIP have a norm after their last layer, which is passed by."""
    if MODULES[kind] is not _FIXED:
        return {}
    norm = f"{prefix}{_FIXED['encoder.post_norm']}"
    return {f"{norm}.weight": ((width,), 1.0), f"{norm}.bias": ((width,), 0.0)}


def tower_prefix(kind: str, held: Iterable[str]) -> str | None:
    """How the names of a tower's tensors begin in a file that holds these; None: it has none."""
    names, patch = set(held), MODULES[kind]["encoder.patch"]
    return next((p for p in PREFIXES if f"{p}{patch}.weight" in names), None)

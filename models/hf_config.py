"""A model's Config from Hugging Face's `config.json`, for the families that are built; and the
config.json of a language model with a vision tower in front. Source of what keys mean: transformers
5.23, models/<model_type>/configuration_*.py and modeling_*.py."""

import json
from pathlib import Path
from typing import Any

from attrs import evolve

from omnistep.models.config import Config, Tower
from omnistep.models.hf_text import TEXT_FAMILIES, ConfigJsonError, Json, shown, text_config
from omnistep.models.hf_vision import TOWERS, is_qwen, read_tower, tower_kind

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
"""The families that are built, by model_type, and what transformers calls them."""

TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
LLAVA_KEYS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "multimodal_projector_bias",
    "projector_hidden_act",
)


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The JSON object at `path`, a config.json or the directory that holds it. Raises
    ConfigJsonError."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    raw = read_json_beside(file, file.name)
    if raw is None:
        raise ConfigJsonError(f"no model configuration at {file}")
    return raw


def read_json_beside(path: str | Path, name: str) -> dict[str, Any] | None:
    """The JSON object in the file of that name beside a config.json, which `path` is or is the
    directory of; None: there is no such file. Raises ConfigJsonError where it can't be read."""
    place = Path(path)
    file = (place if place.is_dir() else place.parent) / name
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError, OSError) as error:  # bad JSON, no UTF-8, too deep
        raise ConfigJsonError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigJsonError(f"{file} holds a JSON {type(raw).__name__}, not an object")
    return raw


def decoder_config(raw: Json) -> Config:
    """The model that a config.json describes. Raises ConfigJsonError for an unknown family, a
    variant that is not built, or sizes that do not fit together."""
    family = raw.get("model_type")
    _check_tokens(raw)
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigJsonError(
            f"model_type {family!r} is not built; there are {', '.join(sorted(ARCHITECTURES))}"
        )
    if family in TEXT_FAMILIES:
        return text_config(family, raw)
    return _llava(raw) if family == "llava" else _qwen_vl(family, raw)


def _check_tokens(raw: Json) -> None:
    """Raises ConfigJsonError where the ids of special tokens are none."""
    texts = [raw, *(raw[name] for name in ("text_config",) if isinstance(raw.get(name), dict))]
    for text in texts:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = text.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int for token in ids):
                raise ConfigJsonError(f"{key} is {shown(value)}; it must be an id or a list of ids")
    for name in ("text_config", "vision_config"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ConfigJsonError(f"{name} is {shown(raw[name])}; it must be an object")


def text_family(raw: Json) -> str:
    """The model_type of the text model that a config.json describes, or has inside."""
    family = str(raw.get("model_type"))
    if family == "llava":
        return str((raw.get("text_config") or {}).get("model_type", "llama"))
    return family if family in TEXT_FAMILIES else f"{family}_text"


def _qwen_vl(family: str, raw: Json) -> Config:
    """Older files have the text model's keys beside vision_config, not in a text_config."""
    text = raw.get("text_config") or raw
    tied = raw.get("tie_word_embeddings", False)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        tied = tied or text.get("tie_word_embeddings", False)
    cfg = text_config(text_family(raw), {**text, "tie_word_embeddings": tied})
    tower, width = read_tower(tower_kind(raw), raw.get("vision_config") or {})
    _check_width(width, cfg.embed)
    return evolve(cfg, tower=tower)


def _check_width(width: int | None, embed: int) -> None:
    if width not in (None, embed):
        raise ConfigJsonError(
            f"the vision tower's output is {width} wide (out_hidden_size; Qwen2-VL: hidden_size), "
            f"but the language model's hidden_size is {embed}"
        )


def _llava(raw: Json) -> Config:
    """LLaVA (arXiv 2310.03744), with any text model and any tower; transformers has no Qwen towers
    in it. Tokens have one position."""
    family, text = text_family(raw), raw.get("text_config") or {}
    if family not in TEXT_FAMILIES:
        raise ConfigJsonError(
            f"the text model {family!r} is not built for llava; there are "
            f"{', '.join(TEXT_FAMILIES)}"
        )
    tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    cfg = text_config(family, {**text, "tie_word_embeddings": tied})
    if not isinstance(raw.get("vision_config"), dict):
        raise ConfigJsonError("vision_config is missing: which vision tower the llava has")
    kind = tower_kind(raw)
    tower, width = read_tower(kind, raw["vision_config"])
    _check_width(width, cfg.embed)
    return evolve(cfg, tower=_cut(raw, kind, tower, cfg.embed))


def _cut(raw: Json, kind: str, tower: Tower, embed: int) -> Tower:
    """The tower's layers up to those whose output LLaVA takes, with LLaVA's projector. A Qwen tower
    has its own, after all its layers."""
    default = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    if is_qwen(kind):
        default = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    c = default | {k: v for k, v in raw.items() if v is not None}
    layer, select = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    if not isinstance(layer, int):
        raise ConfigJsonError(f"vision_feature_layer {layer} is not built; only one number")
    layers = layer if layer >= 0 else tower.layers + 1 + layer
    if not 1 <= layers <= tower.layers or (is_qwen(kind) and layers != tower.layers):
        allowed = "-1" if is_qwen(kind) else f"1 to {tower.layers}, or -1 to -{tower.layers}"
        raise ConfigJsonError(
            f"vision_feature_layer {layer} of a tower of {tower.layers} layers is not built; "
            f"only {allowed}"
        )
    if select != ("default" if tower.class_token else "full"):
        reason = "leaves out the class token" if tower.class_token else "has no class token to drop"
        raise ConfigJsonError(
            f"vision_feature_select_strategy {select!r} is not built for {kind}, which {reason}; "
            f"only {'default' if tower.class_token else 'full'!r}"
        )
    if c.get("projector_hidden_act", "gelu") != "gelu":
        raise ConfigJsonError(
            f"projector_hidden_act {c['projector_hidden_act']!r} is not built; only 'gelu'"
        )
    bias = bool(c.get("multimodal_projector_bias", True))
    if is_qwen(kind):
        if not bias:
            raise ConfigJsonError(f"multimodal_projector_bias false is not built for {kind}")
        return tower
    return evolve(tower, layers=layers, projector=embed, projector_bias=bias)


def written_config(raw: Json, cfg: Config) -> dict[str, Any]:
    """The config.json beside exported weights: LLaVA's tower has no layers there but those
    that were built, and no pooling behind them."""
    if raw["model_type"] != "llava" or is_qwen(tower_kind(raw)) or cfg.tower is None:
        return dict(raw)
    kind = tower_kind(raw)
    vision = {**raw["vision_config"], "model_type": kind, "num_hidden_layers": cfg.tower.layers}
    if kind == "siglip_vision_model":
        vision["vision_use_head"] = False
    return {**raw, "vision_config": vision, "vision_feature_layer": -1}


def compose(language: Json, encoder: Json, **overrides: Any) -> dict[str, Any]:
    """The config.json, of LLaVA's schema, of a vision tower in front of a text model.

    `encoder` is a vision_config, or the config.json of a model that has one: a CLIP, SigLIP,
    Qwen2-VL, LLaVA ... `overrides` named in TOKEN_KEYS and LLAVA_KEYS are keys of the whole, others
    of its vision_config. A Qwen tower's output becomes as wide as the text model.

    Raises ConfigJsonError where `language` is no text model, an override is no key, or
    image_token_id is missing.
    """
    family = language.get("model_type")
    if family not in TEXT_FAMILIES:
        raise ConfigJsonError(
            f"a tower can't be put in front of a {family!r}; there are {', '.join(TEXT_FAMILIES)}"
        )
    kind = tower_kind(encoder)
    known = (*TOKEN_KEYS, *LLAVA_KEYS, *TOWERS[kind])
    if unknown := [key for key in overrides if key not in known]:
        raise ConfigJsonError(
            f"{unknown[0]!r} is no key of an encoder {kind}; there are {', '.join(sorted(known))}"
        )
    if overrides.get("image_token_id") is None:
        raise ConfigJsonError(
            "image_token_id is missing: the token of the text model's vocabulary that is to stand "
            "for images"
        )
    inner = encoder.get("vision_config")
    vision = {**(encoder if inner is None else inner), "model_type": kind}
    vision |= {key: value for key, value in overrides.items() if key in TOWERS[kind]}
    if is_qwen(kind):
        out = "hidden_size" if kind == "qwen2_vl_vision" else "out_hidden_size"
        vision[out] = text_config(family, language).embed
    selected = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    if kind != "clip_vision_model":
        selected = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    top = {k: v for k, v in overrides.items() if k in (*TOKEN_KEYS, *LLAVA_KEYS)}
    dtype = {k: language[k] for k in ("dtype", "torch_dtype") if k in language}
    return {
        "model_type": "llava",
        **dtype,
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        "text_config": dict(language),
        "vision_config": vision,
        **selected,
        **top,
        "image_token_index": overrides["image_token_id"],  # transformers' name of it
    }


def unused_dropout(raw: Json) -> float:
    """The largest dropout a config.json asks for; Omnistep trains without dropout."""
    parts = [raw, raw.get("text_config") or {}, raw.get("vision_config") or {}]
    keys = ("attention_dropout", "residual_dropout")
    return max(part.get(key) or 0.0 for part in parts for key in keys)

"""A text model's Config from Hugging Face's `config.json`, or from the text_config inside that of a
vision-language model. Sources: transformers 5.23, models/<model_type>/configuration_*.py for the
defaults, modeling_*.py for what they mean."""

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from omnistep.models.config import Config, Experts, Latent

Json = Mapping[str, Any]


class ConfigJsonError(ValueError):
    """A config.json that can't be read, or asks for what is not built."""


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
_QWEN = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "sliding_window": 4096,
}  # fmt: skip
_MISTRAL = _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8}
_QWEN_MOE = _QWEN | {
    "hidden_size": 2048, "num_hidden_layers": 24, "decoder_sparse_step": 1, "mlp_only_layers": (),
    "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_DEEPSEEK = _LLAMA | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}  # fmt: skip
_QWEN2_VL = _QWEN | {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "max_window_layers": 80, "qkv_bias": True, "mrope_section": (16, 24, 24),
}  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _QWEN | {"qkv_bias": True},
    "qwen3": _QWEN | {"head_dim": 128},
    "mistral": _MISTRAL | {"sliding_window": 4096},
    "seed_oss": _LLAMA | {
        "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128,
        "attention_bias": True,
    },
    "mixtral": _MISTRAL | {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
    },
    "qwen2_moe": _QWEN_MOE | {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "qkv_bias": True,
    },
    "qwen3_moe": _QWEN_MOE | {
        "intermediate_size": 6144, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "deepseek_v2": _DEEPSEEK | {
        "vocab_size": 102400, "num_experts": 64, "moe_intermediate_size": 1407,
        "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": _DEEPSEEK | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "n_group": 8, "topk_group": 4,
    },
    "gpt_oss": {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128,
        "attention_bias": True, "num_experts": 128, "num_experts_per_tok": 4,
        "swiglu_limit": 7.0, "router_aux_loss_coef": 0.001, "norm_topk_prob": True,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
    },
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": _QWEN | {
        "head_dim": 128, "rope_theta": 5e5, "mrope_section": (24, 20, 20),
    },
    "qwen3_vl_moe_text": _QWEN_MOE | {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "norm_topk_prob": True, "rope_theta": 5e5, "mrope_section": (24, 20, 20),
    },
}  # fmt: skip
"""What a family takes a key for that its config.json leaves out."""

KIN = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""The text models of vision-language models, each that of another family with other defaults, whose
tokens have three positions."""

TEXT_FAMILIES = tuple(sorted(DEFAULTS.keys() - KIN.keys()))
"""The families that stand alone, by their model_type."""

BUILT: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": {"router_jitter_noise": (0,)},
    "deepseek_v2": {
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),  # transformers ignores it, DeepSeek's own code does not
        "moe_layer_freq": (1,),
        "mlp_bias": (False,),
    },
    "deepseek_v3": {
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
        "moe_layer_freq": (1,),
    },
    "gpt_oss": {"swiglu_alpha": (1.702,)},
    "qwen3_vl_text": {"use_sliding_window": (False,)},
    "qwen3_vl_moe_text": {"use_sliding_window": (False,), "norm_topk_prob": (True,)},
}
"""The only values that are built of a family's keys; one that is left out has the first."""

BIASES = {
    "llama": ("attention_bias", "attention_bias"),
    "qwen2": ("qkv_bias", None),
    "qwen3": ("attention_bias", "attention_bias"),
    "seed_oss": ("attention_bias", "attention_out_bias"),
    "qwen2_moe": ("qkv_bias", None),
    "qwen3_moe": ("attention_bias", "attention_bias"),
    "deepseek_v2": ("attention_bias", "attention_bias"),
    "deepseek_v3": ("attention_bias", "attention_bias"),
    "gpt_oss": ("attention_bias", "attention_bias"),
}
"""The keys that give a family biases in attention: before it, and after it."""

OTHER_NAMES = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
NULL_MEANS_NONE = ("sliding_window", "q_lora_rank", "n_group", "topk_group")
"""Any other key that is null is as if it were left out."""


def text_config(family: str, raw: Json) -> Config:
    """The text model that a config.json describes; `family`, a key of DEFAULTS, is its model_type.
    Raises ConfigJsonError for a variant that is not built, or sizes that do not fit together."""
    given = {OTHER_NAMES.get(k, k): v for k, v in raw.items()}
    if given.get("num_key_value_heads", 0) is None:  # which a family's default is not
        given["num_key_value_heads"] = given.get("num_attention_heads")
    c = DEFAULTS[family] | {k: v for k, v in given.items() if v is not None or k in NULL_MEANS_NONE}
    check_numbers(c)
    _check_built(family, c)
    try:
        return _config(family, c)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigJsonError(
            f"the {family} configuration does not fit together: {error}"
        ) from None


SIZES = {
    "vocab_size": 10**8,
    "num_hidden_layers": 10**4,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts"), 10**5),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 10**7),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim"), 10**6),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "num_experts_per_tok"), 10**6),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 10**12),
    **dict.fromkeys(("sliding_window", "depth", "num_heads"), 10**7),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts"), 10**7),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "n_group", "topk_group"), 10**7),
}
"""Keys that are whole numbers, each with more than any model has."""
MAY_BE_ZERO = (
    *("num_experts", "shared_expert_intermediate_size", "n_shared_experts"),
    *("first_k_dense_replace", "max_window_layers", "sliding_window"),
)
NUMBERS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), (0.0, 1.0)),
    "rope_theta": (1e-6, 1e30),
    "initializer_range": (0.0, 1e6),
    **dict.fromkeys(("router_aux_loss_coef", "routed_scaling_factor", "swiglu_limit"), (0.0, 1e9)),
}
"""Keys that are any number, with the least and the greatest."""


def check_numbers(c: Json) -> None:
    """Raises ConfigJsonError where a number of a configuration is none, or is out of range."""
    for key, most in SIZES.items():
        least, value = int(key not in MAY_BE_ZERO), c.get(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise ConfigJsonError(
                f"{key} is {shown(value)}; it must be a whole number from {least} to {most}"
            )
    for key, (least, most) in NUMBERS.items():
        value = c.get(key)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            raise ConfigJsonError(
                f"{key} is {shown(value)}; it must be a number from {least:g} to {most:g}"
            )


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_built(family: str, c: Json) -> None:
    for key, built in ({"hidden_act": ("silu",)} | BUILT.get(family, {})).items():
        if c.get(key, built[0]) not in built:
            raise ConfigJsonError(
                f"{key} {c[key]!r} is not built for {family}; only {', '.join(map(str, built))}"
            )


def _config(family: str, c: Json) -> Config:
    if family in KIN:
        return _with_three_positions(family, c)
    heads, embed, layers = c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]
    before, after = BIASES.get(family, (None, None))
    theta, scaling = _rope(c)
    latent, experts = _latent(family, c), _experts(family, c)
    return Config(
        vocab=c["vocab_size"],
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else c.get("num_key_value_heads", heads),
        head_dim=latent.nope + latent.rope if latent else c.get("head_dim", embed // heads),
        mlp=c["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=c["rms_norm_eps"],
        tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=bool(c.get(before, False)),
        out_bias=bool(c.get(after, False)),
        mlp_bias=family in ("llama", "seed_oss") and bool(c.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        sinks=family == "gpt_oss",
        windows=_windows(family, c, layers),
        init_std=c.get("initializer_range", 0.02),
        latent=latent,
        experts=experts,
    )


def _rope(c: Json) -> tuple[float, dict[str, Any]]:
    """The base, and the rest of rope_parameters; older files have rope_theta and rope_scaling."""
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    theta = float(rope.pop("rope_theta", c.get("rope_theta", 10000.0)))
    if rope.get("rope_type") in ("yarn", "llama3"):
        # beside the others it wins (transformers' standardize_rope_params, modeling_rope_utils.py)
        if (before := c.get("original_max_position_embeddings")) is not None:
            rope["original_max_position_embeddings"] = before
        rope.setdefault("original_max_position_embeddings", c.get("max_position_embeddings"))
    part = rope.pop("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise ValueError(f"partial_rotary_factor {part} is not built; only 1")
    return theta, rope


def _with_three_positions(family: str, c: Json) -> Config:
    """The rotary embedding's keys, but for its sections, mean what they do in other families."""
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    sections = tuple(rope.pop("mrope_section", None) or c["mrope_section"])
    rope.pop("mrope_interleaved", None)  # follows from the family
    kinds = {key: "default" for key in ("type", "rope_type") if rope.get(key) == "mrope"}
    cfg = _config(KIN[family], {**c, "rope_scaling": None, "rope_parameters": rope | kinds})
    return evolve(cfg, rope_axes=_rope_axes(family, sections, cfg.rope_dim // 2))


def _rope_axes(family: str, sections: tuple[int, ...], frequencies: int) -> tuple[int, ...]:
    """For each frequency the position (time, height, width) that it turns by. `sections` are how
    many frequencies each has: one after another (Qwen2-VL), or in turns, the last ones by time
    (Qwen3-VL). Source: recomposition_frequencies of the families' rotary embeddings."""
    if len(sections) != 3 or sum(sections) != frequencies:
        raise ValueError(
            f"mrope_section is {list(sections)}, but should be 3 numbers that add up to the "
            f"{frequencies} frequencies of a head"
        )
    if family.startswith("qwen3"):
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(frequencies))
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))


def _windows(family: str, c: Json, layers: int) -> tuple[int | None, ...]:
    every, window = ("mistral", "mixtral", "qwen3_moe"), c.get("sliding_window")
    if family not in (*every, "qwen2", "qwen3", "qwen2_moe", "gpt_oss") or window is None:
        return ()
    if family.startswith("qwen") and not c.get("use_sliding_window", False):
        return ()
    if family in every:
        return (window,) * layers
    first = c.get("max_window_layers", 28)

    def slides(i: int) -> bool:
        if family == "gpt_oss":
            return i % 2 == 0
        return i < first and i % 2 == 0 if family == "qwen2_moe" else i >= first

    kinds = c.get("layer_types") or [
        "sliding_attention" if slides(i) else "" for i in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _latent(family: str, c: Json) -> Latent | None:
    if family not in ("deepseek_v2", "deepseek_v3"):
        return None
    heads = c["num_attention_heads"]
    if c.get("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"num_key_value_heads {c['num_key_value_heads']} with {heads} attention heads: latent "
            "attention has as many of both"
        )
    if c.get("head_dim", c["qk_rope_head_dim"]) != c["qk_rope_head_dim"]:
        raise ValueError(
            f"head_dim {c['head_dim']} with qk_rope_head_dim {c['qk_rope_head_dim']}: transformers "
            "takes both for the rotated part of a head; leave head_dim out"
        )
    return Latent(
        kv=c["kv_lora_rank"],
        nope=c["qk_nope_head_dim"],
        rope=c["qk_rope_head_dim"],
        value=c["v_head_dim"],
        q=c["q_lora_rank"],
        interleaved=family == "deepseek_v2" or bool(c.get("rope_interleave", True)),
    )


def _experts(family: str, c: Json) -> Experts | None:
    """None also for a family with experts where no layer has them."""
    layers, deepseek = c["num_hidden_layers"], family.startswith("deepseek")
    if deepseek:
        dense = tuple(range(min(c["first_k_dense_replace"], layers)))
    elif family in ("qwen2_moe", "qwen3_moe"):
        only, step = c["mlp_only_layers"], c["decoder_sparse_step"]
        dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    else:
        dense = ()
    if "num_experts" not in DEFAULTS[family] or c["num_experts"] == 0 or len(dense) == layers:
        return None
    one_width = family in ("mixtral", "gpt_oss")
    width = c["intermediate_size" if one_width else "moe_intermediate_size"]
    grouped = family == "deepseek_v3" or c.get("topk_method") == "group_limited_greedy"
    shared = width * c["n_shared_experts"] if deepseek else c.get("shared_expert_intermediate_size")
    return Experts(
        count=c["num_experts"],
        top_k=c["num_experts_per_tok"],
        mlp=width,
        scoring="sigmoid" if family == "deepseek_v3" else "softmax",
        exact_logits=deepseek,
        normalize=bool(c.get("norm_topk_prob", False)),
        scale=float(c["routed_scaling_factor"]) if deepseek else 1.0,
        groups=(c.get("n_group") or 1) if grouped else 1,
        top_groups=(c.get("topk_group") or 1) if grouped else 1,
        group_score="top2" if family == "deepseek_v3" else "max",
        bias=family == "deepseek_v3",
        limit=c["swiglu_limit"] if family == "gpt_oss" else None,
        aux=float(c["router_aux_loss_coef"]) if _has_aux(family, c) else 0.0,
        shared=(shared or 0) if deepseek or family == "qwen2_moe" else 0,
        shared_gated=family == "qwen2_moe",
        dense=dense,
    )


def _has_aux(family: str, c: Json) -> bool:
    """transformers adds the load-balancing loss only where router logits are asked for, and never
    for DeepSeek."""
    return bool(c.get("output_router_logits", False)) and not family.startswith("deepseek")

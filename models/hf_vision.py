"""Vision towers from Hugging Face's vision_config, and which tokens stand for images. Sources:
transformers 5.23, models/<family>/configuration_*.py for the defaults, modeling_*.py for what they
mean."""

from collections.abc import Mapping
from typing import Any, Literal

from attrs import evolve, frozen

from omnistep.models.config import Tower
from omnistep.models.hf_text import ConfigJsonError, Json, check_numbers

_QWEN = {
    "depth": 32, "num_heads": 16, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "initializer_range": 0.02, "rope_parameters": {},
}  # fmt: skip
_QWEN3 = _QWEN | {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304,
    "patch_size": 16, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}  # fmt: skip
_FIXED = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "initializer_range": 0.02,
}  # fmt: skip

TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl_vision": _QWEN | {
        "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4,
    },
    "qwen2_5_vl_vision": _QWEN | {
        "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420,
        "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
    },
    "qwen3_vl_vision": _QWEN3,
    "qwen3_vl_moe_vision": _QWEN3,
    "clip_vision_model": _FIXED | {
        "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": _FIXED | {
        "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
"""By a vision_config's model_type, what is taken for a key that it leaves out."""

FAMILY_TOWERS = {
    "qwen2_vl": "qwen2_vl_vision",
    "qwen2_5_vl": "qwen2_5_vl_vision",
    "qwen3_vl": "qwen3_vl_vision",
    "qwen3_vl_moe": "qwen3_vl_moe_vision",
    "llava": "clip_vision_model",
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
}
"""By a whole model's model_type, that of its vision_config where this does not say, or (as Qwen's
older files do) says the model's."""

ACTIVATIONS: dict[str, Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
OTHER_NAMES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}
"""Of a Qwen tower's keys."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""transformers, image_utils.py"""


def is_qwen(kind: str) -> bool:
    """Whether a vision_config's model_type is a Qwen tower's, whose merger is the projector."""
    return kind.startswith("qwen")


def tower_kind(raw: Json) -> str:
    """The model_type, a key of TOWERS, of the vision_config in a whole model's config.json, or of a
    vision_config itself. Raises ConfigJsonError where that is not built."""
    whole = str(raw.get("model_type"))
    inner = raw.get("vision_config")
    kind = whole if inner is None else str(inner.get("model_type") or whole)
    kind = FAMILY_TOWERS.get(kind, kind)
    if kind not in TOWERS:
        raise ConfigJsonError(
            f"the vision tower {kind!r} is not built; there are {', '.join(sorted(TOWERS))}"
        )
    return kind


def read_tower(kind: str, vision: Json) -> tuple[Tower, int | None]:
    """A vision_config's tower, with all its layers, and how wide its projector's output is (None:
    it has no projector). Raises ConfigJsonError for what is not built or does not fit together."""
    other = OTHER_NAMES if is_qwen(kind) else {}
    given = {other.get(k, k): v for k, v in vision.items() if v is not None}
    c = TOWERS[kind] | given
    check_numbers(c)
    try:
        if c["hidden_act"] not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {c['hidden_act']!r} is not built; only {', '.join(ACTIVATIONS)}"
            )
        return _qwen(kind, c) if is_qwen(kind) else (_fixed(kind, c), None)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigJsonError(f"the tower {kind} does not fit together: {error}") from None


def _qwen(kind: str, c: Json) -> tuple[Tower, int]:
    rope = c["rope_parameters"]
    if rope.get("rope_type", "axial") != "axial":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not built; only 'axial'")
    patch, merge = _side(c, "patch_size"), c["spatial_merge_size"]
    embed = c["embed_dim"] if kind == "qwen2_vl_vision" else c["hidden_size"]
    tower = Tower(
        layers=c["depth"],
        embed=embed,
        heads=c["num_heads"],
        mlp=c.get("intermediate_size", 0),
        patch=patch,
        frames=_side(c, "temporal_patch_size"),
        channels=c["in_channels"],
        merge=merge,
        activation=ACTIVATIONS[c["hidden_act"]],
        patch_bias=False,
        rotary=True,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        init_std=c["initializer_range"],
    )
    if kind == "qwen2_vl_vision":
        tower = evolve(tower, mlp=int(embed * c["mlp_ratio"]), mean=CLIP_MEAN, std=CLIP_STD)
        return tower, c["hidden_size"]
    if kind == "qwen2_5_vl_vision":
        tower = evolve(
            tower,
            norm="rms",
            projector_norm="rms",
            gated=True,
            window=c["window_size"] // patch // merge,
            full_layers=tuple(sorted(c["fullatt_block_indexes"])),
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )
        if not tower.window:
            raise ValueError(
                f"window_size {c['window_size']} (pixels) is less than a token's {merge} x {patch}"
            )
        return tower, c["out_hidden_size"]
    side = round(c["num_position_embeddings"] ** 0.5)
    if side**2 != c["num_position_embeddings"]:
        raise ValueError(f"num_position_embeddings {c['num_position_embeddings']} is no square")
    deepstack = tuple(c["deepstack_visual_indexes"])
    return evolve(tower, patch_bias=True, side=side, deepstack=deepstack), c["out_hidden_size"]


def _fixed(kind: str, c: Json) -> Tower:
    """CLIP's or SigLIP's, for images of one size. A norm after the last layer is not in it: LLaVA
    takes what the layers return."""
    clip, patch, size = kind == "clip_vision_model", _side(c, "patch_size"), _side(c, "image_size")
    if size < patch:
        raise ValueError(f"images of {size} pixels a side can't be cut into patches of {patch}")
    return Tower(
        layers=c["num_hidden_layers"],
        embed=c["hidden_size"],
        heads=c["num_attention_heads"],
        mlp=c["intermediate_size"],
        patch=patch,
        channels=c["num_channels"],
        norm_eps=c["layer_norm_eps"],
        activation=ACTIVATIONS[c["hidden_act"]],
        patch_bias=not clip,
        side=size // patch,
        class_token=clip,
        pre_norm=clip,
        init_std=c["initializer_range"],
        projector_norm=None,
        mean=CLIP_MEAN if clip else (0.5, 0.5, 0.5),
        std=CLIP_STD if clip else (0.5, 0.5, 0.5),
    )


def _side(c: Json, key: str) -> int:
    """A length that may be given as one number, or as several equal ones."""
    sides = set(c[key]) if isinstance(c[key], (list, tuple)) else {c[key]}
    if len(sides) != 1:
        raise ValueError(f"{key} {c[key]} is not built; only one number for all sides")
    return sides.pop()


def with_preprocessor(tower: Tower, raw: Json) -> Tower:
    """The tower with the pixels' mean and deviation of a `preprocessor_config.json`. Raises
    ConfigJsonError where this is for patches of another size, for another number of channels, or
    for other than 0 to 255."""
    sizes = {"patch_size": tower.patch, "temporal_patch_size": tower.frames}
    sizes["merge_size"] = tower.merge
    for key, size in sizes.items():
        if raw.get(key, size) != size:
            raise ConfigJsonError(
                f"preprocessor_config.json has {key} {raw[key]}, but the model's is {size}"
            )
    factor = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        raise ConfigJsonError(
            f"preprocessor_config.json multiplies pixels by {factor} before they are normalised; "
            "only 1/255 is built"
        )
    if not raw.get("do_normalize", True):
        return evolve(tower, mean=(0.0,) * tower.channels, std=(1.0,) * tower.channels)
    mean, std = raw.get("image_mean") or tower.mean, raw.get("image_std") or tower.std
    try:
        return evolve(tower, mean=tuple(mean), std=tuple(std))
    except ValueError as error:
        raise ConfigJsonError(f"preprocessor_config.json: {error}") from None


@frozen
class ImageTokens:
    """The tokens of a model's vocabulary that stand for images, and around them."""

    image: int
    """Each stands for one vector of the tower."""
    video: int | None = None
    """The same of videos; None: the family has none."""
    start: int | None = None
    """Before an image's or a video's tokens."""
    end: int | None = None
    """After them."""

    @classmethod
    def of(cls, raw: Json) -> "ImageTokens":
        """Those of a vision-language model's config.json. Raises ConfigJsonError where the
        vocabulary does not have one."""
        defaults = {
            "image": ("image_token_id", 151655),
            "video": ("video_token_id", 151656),
            "start": ("vision_start_token_id", 151652),
            "end": ("vision_end_token_id", 151653),
        }
        if raw.get("model_type") == "llava":
            raw = {"image_token_id": raw.get("image_token_index", 32000)} | dict(raw)
            defaults = {name: (key, None) for name, (key, _) in defaults.items()}
        ids = {n: raw.get(key, default) for n, (key, default) in defaults.items()}
        text: Mapping[str, Any] = raw.get("text_config") or raw
        vocabulary = text.get("vocab_size")
        for name, token in ids.items():
            if token is not None and vocabulary is not None and not 0 <= token < vocabulary:
                raise ConfigJsonError(
                    f"{defaults[name][0]} is {token}, but the vocabulary has {vocabulary} tokens"
                )
        return cls(**ids)

"""config.json files of vision-language models as they lie on the hub, new and old; composed ones;
and what is refused of them."""

from typing import Any

import pytest
import torch
import transformers
from attrs import evolve

from omnistep.core import param
from omnistep.models.config import Tower
from omnistep.models.hf_config import (
    ConfigJsonError,
    compose,
    decoder_config,
    unused_dropout,
    written_config,
)
from omnistep.models.hf_vision import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTokens,
    read_tower,
    tower_kind,
    with_preprocessor,
)
from omnistep.models.params import params

QWEN2_VL: dict[str, Any] = {  # Qwen/Qwen2-VL-2B-Instruct
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
QWEN2_5_VL: dict[str, Any] = {  # Qwen/Qwen2.5-VL-3B-Instruct
    **{k: v for k, v in QWEN2_VL.items() if k != "vision_token_id"},
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
QWEN3_VISION: dict[str, Any] = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_VL: dict[str, Any] = {  # Qwen/Qwen3-VL-4B-Instruct
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": QWEN3_VISION,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
QWEN3_VL_MOE: dict[str, Any] = {  # Qwen/Qwen3-VL-30B-A3B-Instruct
    **QWEN3_VL,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **QWEN3_VL["text_config"],
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        **QWEN3_VISION,
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl_moe",
        "out_hidden_size": 2048,
    },
}
LLAVA: dict[str, Any] = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
SIGLIP: dict[str, Any] = {  # google/siglip-base-patch16-224
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {"model_type": "siglip_text_model"},
    "vision_config": {"model_type": "siglip_vision_model"},
}
QWEN3_TEXT: dict[str, Any] = {  # Qwen/Qwen3-0.6B
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def tower_of(raw: dict[str, Any]) -> Tower:
    tower = decoder_config(raw).tower
    assert tower is not None
    return tower


CLIP_REST = 2 * 1024 + 12_596_224
"""What LLaVA-1.5 does not use of its CLIP: the norm at the end, and the last layer."""


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (QWEN2_VL, 2_208_985_600),
        (QWEN2_5_VL, 3_754_622_976),
        (QWEN3_VL, 4_437_815_808),
        (QWEN3_VL_MOE, 31_070_754_032),
        (LLAVA, 7_063_427_072 - CLIP_REST),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_on_the_hub_have_as_many_parameters_as_transformers(raw, count):
    assert param.count(params(decoder_config(raw))) == count
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    tied = [] if decoder_config(raw).tied else list(model.lm_head.parameters())
    theirs = sum(p.numel() for p in [*model.model.parameters(), *tied])
    assert theirs == count + (CLIP_REST if raw is LLAVA else 0)


def test_towers_of_models_on_the_hub():
    qwen = Tower(
        layers=32, embed=1280, heads=16, mlp=5120, patch=14, frames=2, merge=2, rotary=True,
        activation="quick_gelu", patch_bias=False, mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip
    assert tower_of(QWEN2_VL) == qwen
    assert tower_of(QWEN2_5_VL) == Tower(
        layers=32, embed=1280, heads=16, mlp=3420, patch=14, frames=2, merge=2, rotary=True,
        activation="silu", gated=True, norm="rms", projector_norm="rms", patch_bias=False,
        window=4, full_layers=(7, 15, 23, 31), mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip
    assert tower_of(QWEN3_VL) == Tower(
        layers=24, embed=1024, heads=16, mlp=4096, patch=16, frames=2, merge=2, rotary=True,
        activation="gelu_tanh", side=48, deepstack=(5, 11, 17),
    )  # fmt: skip
    assert tower_of(LLAVA) == Tower(
        layers=23, embed=1024, heads=16, mlp=4096, patch=14, activation="quick_gelu", side=24,
        class_token=True, pre_norm=True, patch_bias=False, norm_eps=1e-5, projector_norm=None,
        projector=4096, mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip
    siglip = compose(QWEN3_TEXT, SIGLIP, image_token_id=7)
    assert tower_of(siglip) == Tower(
        layers=12, embed=768, heads=12, mlp=3072, patch=16, activation="gelu_tanh", side=14,
        projector_norm=None, projector=1024,
    )  # fmt: skip


def test_heads_of_a_qwen2_vl_tower_divide_its_own_width():
    vision = {"embed_dim": 192, "num_heads": 3, "hidden_size": 256}
    tower, width = read_tower("qwen2_vl_vision", vision)
    assert (tower.embed, tower.heads, tower.mlp, width) == (192, 3, 768, 256)


def test_rope_axes():
    """Chunked or in turns, as mrope_section says."""
    chunked = decoder_config(QWEN2_VL)
    assert chunked.rope_axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert chunked.rope_scaling == {"rope_type": "default"}
    interleaved = decoder_config(QWEN3_VL).rope_axes
    assert interleaved == (0, 1, 2) * 20 + (0,) * 4
    assert decoder_config(LLAVA).rope_axes == ()


def test_families_may_leave_keys_out():
    """What transformers takes for them."""
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        whole = transformers.AutoConfig.for_model(family)
        text, vision = whole.text_config.hidden_size, whole.vision_config.to_dict()
        out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
        given = {"model_type": family, "vision_config": {out: text}}
        whole = {**whole.to_dict(), "vision_config": {**vision, out: text}}
        assert evolve(decoder_config(given), rope_scaling={"rope_type": "default"}) == (
            decoder_config(whole)
        )


def test_keys_have_older_names_and_places():
    text = {
        k: v
        for k, v in QWEN2_VL.items()
        if not k.startswith(("vision", "image", "video", "tie", "arch", "rope"))
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    nested = {
        "model_type": "qwen2_vl",
        "text_config": {**text, "model_type": "qwen2_vl_text", "rope_parameters": rope},
        "vision_config": {**QWEN2_VL["vision_config"], "model_type": "qwen2_vl_vision"},
        "tie_word_embeddings": True,
    }
    assert decoder_config(nested) == decoder_config(QWEN2_VL)
    inside = {**nested["text_config"], "tie_word_embeddings": True}
    nested = {k: v for k, v in nested.items() if k != "tie_word_embeddings"}
    assert not decoder_config(nested).tied
    assert decoder_config({**nested, "text_config": inside}).tied
    # Qwen3-VL's text_config does not tie, and Qwen3-VL-MoE's says so by default
    outside = {k: v for k, v in QWEN3_VL.items() if k != "tie_word_embeddings"}
    assert not decoder_config(outside).tied
    yarn = {"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}
    scaling = decoder_config({**QWEN2_VL, "rope_scaling": yarn}).rope_scaling
    assert scaling["rope_type"] == "yarn"
    assert scaling["original_max_position_embeddings"] == 32768


def test_sliding_windows_of_the_text_model():
    few = {"num_hidden_layers": 3, "max_window_layers": 2, "sliding_window": 9}
    assert decoder_config({**QWEN2_VL, **few}).windows == ()
    slides = {**QWEN2_VL, **few, "use_sliding_window": True}
    assert decoder_config(slides).windows == (None, None, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert decoder_config({**slides, "layer_types": kinds}).windows == (9, None, None)


def test_text_models_inside_llava():
    for text in (QWEN3_TEXT, {"model_type": "mixtral"}, {"model_type": "deepseek_v3"}):
        cfg = decoder_config({**LLAVA, "text_config": text})
        alone = decoder_config(text)
        assert (cfg.embed, cfg.experts, cfg.latent) == (alone.embed, alone.experts, alone.latent)
        assert cfg.tied == alone.tied
        assert cfg.tower is not None
        assert cfg.tower.projector == cfg.embed


def test_feature_layers():
    def layers(layer: int | None) -> int:
        return tower_of({**LLAVA, "vision_feature_layer": layer}).layers

    assert [layers(n) for n in (-1, -2, -24, 1, 24, None)] == [24, 23, 1, 1, 24, 23]


def test_image_tokens():
    assert ImageTokens.of(QWEN2_VL) == ImageTokens(151655, 151656, 151652, 151653)
    assert ImageTokens.of({"model_type": "qwen3_vl"}) == ImageTokens(151655, 151656, 151652, 151653)
    assert ImageTokens.of(LLAVA) == ImageTokens(32000)
    renamed = {k: v for k, v in LLAVA.items() if k != "image_token_index"} | {"image_token_id": 5}
    assert ImageTokens.of(renamed) == ImageTokens(5)
    composed = compose(QWEN3_TEXT, QWEN2_VL, image_token_id=151655, video_token_id=151656)
    assert ImageTokens.of(composed) == ImageTokens(151655, 151656)
    with pytest.raises(ConfigJsonError, match="video_token_id is 151656, but the vocabulary has"):
        ImageTokens.of({**QWEN2_VL, "image_token_id": 1, "vocab_size": 100})


def test_preprocessor_config():
    tower = tower_of(QWEN2_VL)
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "patch_size": 14}
    read = with_preprocessor(
        tower, given | {"merge_size": 2, "rescale_factor": 0.00392156862745098}
    )
    assert (read.mean, read.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert with_preprocessor(tower, {}) == tower
    plain = with_preprocessor(tower, given | {"do_normalize": False})
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ConfigJsonError, match="patch_size 16, but the model's is 14"):
        with_preprocessor(tower, {"patch_size": 16})
    with pytest.raises(ConfigJsonError, match="3 channels can't have 1 means"):
        with_preprocessor(tower, {"image_mean": [0.5]})
    with pytest.raises(ConfigJsonError, match=r"multiplies pixels by 1\.0"):
        with_preprocessor(tower, {"do_rescale": False})


def test_compose_puts_a_tower_in_front_of_a_text_model():
    raw = compose(QWEN3_TEXT, LLAVA, image_token_id=9, vision_feature_layer=-3, image_size=224)
    cfg = decoder_config(raw)
    assert decoder_config(written_config(raw, cfg)) == cfg
    assert written_config(QWEN3_TEXT, decoder_config(QWEN3_TEXT)) == QWEN3_TEXT
    assert cfg.tied
    assert raw["torch_dtype"] == "bfloat16"
    assert cfg.tower is not None
    assert (cfg.tower.layers, cfg.tower.side, cfg.tower.projector) == (22, 16, 1024)
    assert transformers.LlavaConfig(**raw).image_token_id == 9


@pytest.mark.parametrize("encoder", [QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE])
def test_compose_with_a_qwen_tower(encoder):
    """Of a whole model or alone; the output's width becomes that of the text model."""
    raw = compose(QWEN3_TEXT, encoder, image_token_id=9, spatial_merge_size=1)
    cfg = decoder_config(raw)
    kind = tower_kind(encoder)
    whole, _ = read_tower(kind, {**encoder["vision_config"], "spatial_merge_size": 1})
    assert cfg.tower == whole
    assert cfg.rope_axes == ()
    alone = {**encoder["vision_config"], "model_type": kind}
    assert compose(QWEN3_TEXT, alone, image_token_id=9, spatial_merge_size=1) == raw


def test_dropout_may_be_asked_for_inside():
    assert unused_dropout({**LLAVA, "text_config": {"attention_dropout": 0.1}}) == 0.1
    assert unused_dropout(LLAVA) == 0


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (QWEN2_VL, {"hidden_size": 1024, "num_attention_heads": 8}, "output is 1536 wide"),
        (QWEN2_VL, {"rope_scaling": {"mrope_section": [8, 8, 8]}}, "add up to the 64 frequencies"),
        (QWEN3_VL, {"vision_config": QWEN3_VISION | {"hidden_act": "relu"}}, "'relu' is not built"),
        (
            QWEN3_VL,
            {"vision_config": QWEN3_VISION | {"num_position_embeddings": 2305}},
            "2305 is no square",
        ),
        (
            QWEN3_VL,
            {"vision_config": QWEN3_VISION | {"patch_size": [16, 14]}},
            r"patch_size \[16, 14\] is not built",
        ),
        (
            QWEN3_VL,
            {"vision_config": QWEN3_VISION | {"deepstack_visual_indexes": [24]}},
            "a tower of 24 layers has no layer 24",
        ),
        (
            QWEN3_VL_MOE,
            {"text_config": QWEN3_VL_MOE["text_config"] | {"norm_topk_prob": False}},
            "norm_topk_prob False is not built",
        ),
        (QWEN3_VL, {"vision_config": {"model_type": "dinov2"}}, "tower 'dinov2' is not built"),
        (
            LLAVA,
            {"vision_feature_layer": [-2, -1]},
            r"vision_feature_layer \[-2, -1\] is not built",
        ),
        (LLAVA, {"vision_feature_layer": 25}, "of 24 layers is not built; only 1 to 24, or -1"),
        (LLAVA, {"vision_feature_layer": 0}, "vision_feature_layer 0 of a tower"),
        (LLAVA, {"vision_feature_select_strategy": "full"}, "leaves out the class token"),
        (LLAVA, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not built"),
        (LLAVA, {"text_config": {"model_type": "opt"}}, "text model 'opt' is not built for llava"),
        (
            LLAVA,
            {"vision_config": SIGLIP["vision_config"]},
            "'default' is not built for siglip_vision_model, which has no class token",
        ),
    ],
)
def test_what_is_not_built_is_named(raw, change, message):
    with pytest.raises(ConfigJsonError, match=message):
        decoder_config({**raw, **change})


@pytest.mark.parametrize(
    ("language", "encoder", "overrides", "message"),
    [
        (QWEN2_VL, LLAVA, {"image_token_id": 1}, "can't be put in front of a 'qwen2_vl'"),
        (QWEN3_TEXT, LLAVA, {}, "image_token_id is missing"),
        (QWEN3_TEXT, LLAVA, {"image_token_id": 1, "depth": 3}, "'depth' is no key of an encoder"),
        (QWEN3_TEXT, {"model_type": "bert"}, {"image_token_id": 1}, "tower 'bert' is not built"),
    ],
)
def test_compose_says_what_is_wrong(language, encoder, overrides, message):
    with pytest.raises(ConfigJsonError, match=message):
        compose(language, encoder, **overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, "of 32 layers is not built; only -1"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias false is not built"),
        ({"vision_feature_select_strategy": "default"}, "only 'full'"),
    ],
)
def test_a_qwen_tower_has_its_own_projector_after_all_its_layers(change, message):
    raw = compose(QWEN3_TEXT, QWEN2_VL, image_token_id=1, **change)
    with pytest.raises(ConfigJsonError, match=message):
        decoder_config(raw)

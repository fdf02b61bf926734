"""config.json files as they lie on the hub, new and old, and what is refused of them."""

import json
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from omnistep.core import param
from omnistep.models.config import Experts, Latent
from omnistep.models.hf_config import ConfigJsonError, decoder_config, read_config_json
from omnistep.models.params import params

MIXTRAL = {  # mistralai/Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3 = {  # Qwen/Qwen3-30B-A3B
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = {  # Qwen/Qwen1.5-MoE-A2.7B
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V2_LITE = {  # deepseek-ai/DeepSeek-V2-Lite
    "aux_loss_alpha": 0.001,
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V3 = {  # deepseek-ai/DeepSeek-V3
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (MIXTRAL, 46_702_792_704),
        (QWEN3, 30_532_122_624),
        (QWEN2, 14_315_784_192),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (DEEPSEEK_V3, 671_026_419_200),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_on_the_hub_have_as_many_parameters_as_they_say(raw, count):
    assert param.count(params(decoder_config(raw))) == count


def test_deepseek_v3():
    cfg = decoder_config(DEEPSEEK_V3)
    assert cfg.latent == Latent(kv=512, nope=128, rope=64, value=128, q=1536)
    assert cfg.experts == Experts(
        count=256,
        top_k=8,
        mlp=2048,
        scoring="sigmoid",
        normalize=True,
        scale=2.5,
        groups=8,
        top_groups=4,
        group_score="top2",
        bias=True,
        exact_logits=True,
        shared=2048,
        dense=(0, 1, 2),
    )
    assert cfg.head_dim == 192
    assert cfg.attention_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)


def test_deepseek_v2_lite():
    cfg = decoder_config(DEEPSEEK_V2_LITE)
    assert cfg.latent == Latent(kv=512, nope=128, rope=64, value=128, q=None)
    assert cfg.experts == Experts(
        count=64, top_k=6, mlp=1408, exact_logits=True, shared=2816, dense=(0,)
    )


def test_qwen2_moe():
    cfg = decoder_config(QWEN2)
    assert cfg.qkv_bias
    assert not cfg.out_bias
    assert cfg.windows == ()
    assert cfg.experts == Experts(count=60, top_k=4, mlp=1408, shared=5632, shared_gated=True)


def test_the_load_balancing_loss_is_asked_for_by_output_router_logits():
    def aux(raw: dict[str, Any]) -> float:
        cfg = decoder_config(raw)
        assert cfg.experts is not None
        return cfg.experts.aux

    assert aux(MIXTRAL) == 0
    assert aux({**MIXTRAL, "output_router_logits": True}) == 0.02
    assert aux({**DEEPSEEK_V3, "output_router_logits": True}) == 0  # transformers has none


def test_layers_without_experts():
    def dense(**change: Any) -> tuple[int, ...]:
        return decoder_config({**QWEN3, "num_hidden_layers": 6, **change}).dense_layers

    assert dense() == ()
    assert dense(mlp_only_layers=[4, 0]) == (0, 4)
    assert dense(decoder_sparse_step=2) == (0, 2, 4)
    assert dense(decoder_sparse_step=3, mlp_only_layers=[2]) == (0, 1, 2, 3, 4)
    assert decoder_config({**QWEN3, "decoder_sparse_step": 99}).experts is None
    assert decoder_config({**DEEPSEEK_V3, "first_k_dense_replace": 99}).experts is None


def test_which_layers_have_a_window():
    def windows(raw: dict[str, Any], **change: Any) -> tuple[int | None, ...]:
        few = {"num_hidden_layers": 4, "sliding_window": 9, "use_sliding_window": True}
        return decoder_config({**raw, **few, **change}).windows

    assert windows(MIXTRAL) == (9,) * 4
    assert windows(QWEN3) == (9,) * 4
    assert windows(QWEN3, use_sliding_window=False) == ()
    assert windows(QWEN2) == (9, None, 9, None)  # every other layer, of the first max_window_layers
    assert windows(QWEN2, max_window_layers=2) == (9, None, None, None)
    assert windows(QWEN2, layer_types=["full_attention"] * 3 + ["sliding_attention"])[3] == 9
    assert windows({"model_type": "qwen3"}, max_window_layers=2) == (None, None, 9, 9)


def test_null_is_not_always_the_default():
    assert decoder_config({"model_type": "mistral", "sliding_window": None}).windows == ()
    assert decoder_config({"model_type": "mistral"}).windows == (4096,) * 32
    assert decoder_config({**MIXTRAL, "rope_theta": None}).rope_theta == 1e6
    latent = decoder_config({**DEEPSEEK_V3, "q_lora_rank": None}).latent
    assert latent is not None
    assert latent.q is None


def test_keys_have_older_names():
    new = {k: v for k, v in DEEPSEEK_V3.items() if not k.startswith("rope_")}
    rope = {**DEEPSEEK_V3["rope_scaling"], "rope_theta": 10000.0}
    new["rope_parameters"] = {k.replace("type", "rope_type"): v for k, v in rope.items()}
    assert decoder_config(new) == decoder_config(DEEPSEEK_V3)
    renamed = {k.replace("num_experts", "num_local_experts"): v for k, v in QWEN3.items()}
    renamed["num_experts_per_tok"] = renamed.pop("num_local_experts_per_tok")
    assert decoder_config(renamed) == decoder_config(QWEN3)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not built for mixtral"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "only greedy, group_limited_greedy"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob True is not built"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not built"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not built"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "latent attention has as many of both"),
        (DEEPSEEK_V3, {"head_dim": 192}, "head_dim 192 with qk_rope_head_dim 64"),
        (DEEPSEEK_V3, {"v_head_dim": 256}, "values of 256 can't be wider than keys of 192"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not built"),
        (QWEN3, {"num_experts_per_tok": 200}, "a token can't use 200 of 128 experts"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not built"),
    ],
)
def test_what_is_not_built_is_named(raw, change, message):
    with pytest.raises(ConfigJsonError, match=message):
        decoder_config({**raw, **change})


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 2.0},
        {"hidden_size": True},
        {"hidden_size": "32"},
        {"intermediate_size": 10**11},
        {"vocab_size": [64]},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1e-6},
        {"rope_theta": float("inf")},
        {"initializer_range": {}},
        {"max_position_embeddings": 0},
        {"eos_token_id": {}},
        {"eos_token_id": ["</s>"]},
        {"text_config": 3},
        {"model_type": []},
        {"model_type": None},
    ],
    ids=str,
)
def test_what_is_no_number_is_named(change):
    ((key, value),) = change.items()
    with pytest.raises(ConfigJsonError, match=rf"^{key} ") as caught:
        decoder_config(LLAMA | change)
    assert repr(value)[:20] in str(caught.value)


def test_configurations_too_deep_are_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ConfigJsonError, match=r"config\.json can't be read as JSON"):
        read_config_json(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_key_value_heads_of_null_are_as_many_as_heads(family):
    raw = LLAMA | {"model_type": family, "num_key_value_heads": None}
    theirs = AutoConfig.for_model(**raw)
    assert decoder_config(raw).kv_heads == theirs.num_key_value_heads == 4


@pytest.mark.parametrize("place", ["top", "inside", "both"])
def test_the_original_length_may_stand_at_the_top(place):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    raw = LLAMA | {"max_position_embeddings": 512, "rope_scaling": yarn}
    if place in ("top", "both"):
        raw["original_max_position_embeddings"] = 128
    if place in ("inside", "both"):
        raw["rope_scaling"] = yarn | {"original_max_position_embeddings": 64}
    theirs: Any = LlamaConfig(**json.loads(json.dumps(raw)))
    LlamaRotaryEmbedding(theirs)  # which is when they look at the top
    ours = decoder_config(raw).rope_scaling
    key = "original_max_position_embeddings"
    assert ours[key] == theirs.rope_parameters[key] == {"inside": 64}.get(place, 128)

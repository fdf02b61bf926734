"""Families with experts, and with latent attention, against transformers: logits, the gradient of
every parameter, the load-balancing loss, weights in and out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from omnistep.core import param, rng
from omnistep.core.grad import value_and_grad
from omnistep.models import decoder
from omnistep.models.config import Config
from tests.models.reference import (
    exported,
    imported,
    make_batch,
    make_reference,
    names_of,
    relative_errors,
    split_experts,
)

QWEN: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "rms_norm_eps": 1e-5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.9,
    "mscale_all_dim": 0.6,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", {"sliding_window": 7, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 40}),
    "qwen2_moe-dense": (
        "qwen2_moe",
        {
            **QWEN,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "num_hidden_layers": 4,
        },
    ),
    "qwen2_moe-window": (
        "qwen2_moe",
        {**QWEN, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-dense": (
        "qwen3_moe",
        {**QWEN, "mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe-window": ("qwen3_moe", {**QWEN, "use_sliding_window": True, "sliding_window": 6}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v2-lite": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
            "attention_bias": True,
            "rope_parameters": YARN,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3-halves": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": True,
        },
    ),
}


def reference(case: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, Config]:
    family, extra = CASES[case]
    return make_reference(family, extra, dtype)


PRECISION = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def their_gradients(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return split_experts(grads, model.config.model_type)


def our_gradients(model, cfg: Config, weights, batch, dtype: torch.dtype):
    """(result, gradient by name); the router's bias, which has none, is left out."""
    tree = decoder.params(cfg)
    loss = decoder.make_stages(cfg, param.one_rank(tree, dtype), compile=False)
    result, grads = value_and_grad(loss)(weights, [batch], [rng.key(0)])
    named = exported(tree, names_of(model, cfg), grads)
    return result, {k: v for k, v in named.items() if "e_score_correction_bias" not in k}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@PRECISION
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_match_transformers(case, dtype, tolerance, packed):
    model, cfg = reference(case, dtype)
    batch = make_batch(packed)
    out = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    losses = F.cross_entropy(out.flatten(0, 1), batch.targets.flatten(), reduction="none")
    (losses * batch.weights.flatten()).sum().backward()

    weights = imported(model, cfg, dtype)
    ours = decoder.make_logits(cfg, dtype=dtype)(weights, batch)
    assert ((ours - out).norm() / out.norm()).item() < tolerance
    result, grads = our_gradients(model, cfg, weights, batch, dtype)
    assert result.weight == batch.weights.sum()
    errors = relative_errors(grads, their_gradients(model))
    assert max(errors.values()) < tolerance, errors

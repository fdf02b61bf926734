"""Families with experts, and with latent attention, against transformers: logits, the gradient of
every parameter, the load-balancing loss, weights in and out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.checkpoint.weight_files import write_weights
from omnistep.core.grad import value_and_grad
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder, hf
from omnistep.models.config import Config
from tests.models.reference import (
    CPU,
    exported,
    imported,
    make_batch,
    make_reference,
    masks,
    names_of,
    relative_errors,
    split_experts,
    tensors_of,
)

QWEN: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
GPT_OSS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
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
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "sliding_window": 7}),
    "gpt_oss-full": (
        "gpt_oss",
        {
            **GPT_OSS,
            "layer_types": ["full_attention"] * 3,
            "swiglu_limit": 0.5,  # so that much is clamped
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "attention_bias": False,
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
    inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, **masks(model, batch)}
    out = model(**inputs, use_cache=False).logits
    losses = F.cross_entropy(out.flatten(0, 1), batch.targets.flatten(), reduction="none")
    (losses * batch.weights.flatten()).sum().backward()

    weights = imported(model, cfg, dtype)
    ours = decoder.make_logits(cfg, dtype=dtype)(weights, batch)
    assert ((ours - out).norm() / out.norm()).item() < tolerance
    result, grads = our_gradients(model, cfg, weights, batch, dtype)
    assert result.weight == batch.weights.sum()
    errors = relative_errors(grads, their_gradients(model))
    assert max(errors.values()) < tolerance, errors


@PRECISION
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe-dense", "qwen3_moe-dense", "gpt_oss"])
def test_loss_with_load_balancing_matches_transformers(case, dtype, tolerance):
    """Their mean loss of one row, times its weight: coefficient, sum over layers, gradients."""
    family, extra = CASES[case]
    changed = {**extra, "output_router_logits": True, "router_aux_loss_coef": 0.3}
    model, cfg = make_reference(family, changed, dtype)
    assert cfg.experts is not None
    assert cfg.experts.aux == 0.3
    tokens = make_batch(packed=True).tokens
    seq = tokens.shape[1]
    first = 0 if family == "gpt_oss" else 10  # of two samples; gpt_oss does not read positions
    positions = torch.cat((torch.arange(first), torch.arange(seq - first)))[None]
    weights = (positions % 4 != 3).float()
    weights[:, -1] = 0
    labels = torch.where(weights.roll(1, 1) > 0, tokens, -100)
    theirs = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False)
    assert theirs.aux_loss > 1
    (theirs.loss * weights.sum()).backward()

    batch = Batch(tokens, tokens.roll(-1, 1), weights, positions=positions)
    loaded = imported(model, cfg, dtype)
    result, grads = our_gradients(model, cfg, loaded, batch, dtype)
    torch.testing.assert_close(
        result.objective / result.weight, theirs.loss.detach(), rtol=tolerance, atol=0
    )
    errors = relative_errors(grads, their_gradients(model))
    assert max(errors.values()) < tolerance, errors


ONE_OF_EACH = ["mixtral", "qwen2_moe-dense", "qwen3_moe-dense", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_what_transformers_saves_is_read_and_what_is_exported_it_loads(case, tmp_path):
    model, cfg = reference(case, torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    source, tree, names = (
        open_weights(tmp_path / "theirs"),
        decoder.params(cfg),
        names_of(model, cfg),
    )
    parts = {part.theirs for part in names.all_parts(tree)}
    assert parts == source.infos.keys()  # nothing is left unread
    weights = hf.import_weights(tree, names, source, torch.float32, CPU)

    write_weights(tmp_path / "ours", hf.export_weights(tree, names, weights))
    model.config.save_pretrained(tmp_path / "ours")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    again, info = loaded
    assert not any(info.values()), info
    theirs = model.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_weights_are_relayed_and_streamed_as_they_are_imported(case):
    """bin/convert: between files and to a checkpoint, in another dtype."""
    model, cfg = reference(case, torch.float32)
    source, tree, names = hf.InMemory(tensors_of(model)), decoder.params(cfg), names_of(model, cfg)
    weights = hf.import_weights(tree, names, source, torch.bfloat16, CPU)
    relayed = hf.relayed_weights(tree, names, source, torch.bfloat16)
    exported = hf.export_weights(tree, names, weights)
    assert relayed.keys() == exported.keys()
    for name, tensor in exported.items():
        value = relayed[name].read()
        assert (relayed[name].shape, relayed[name].dtype) == (tensor.shape, tensor.dtype)
        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(value, tensor.read()), name
    leaves = leaves_with_names(weights)
    for name, p in leaves_with_names(tree, is_leaf=param.is_param).items():
        whole = torch.full(p.shape, torch.nan, dtype=leaves[name].dtype)
        for offset, block in hf.import_blocks(name, p, names, source, torch.bfloat16):
            assert block.dtype == whole.dtype
            whole[tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))] = block
        assert torch.equal(whole, leaves[name]), name


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_experts_may_be_fused_as_in_transformers_modules(case):
    model, cfg = reference(case, torch.float32)
    source = hf.FusedExperts.of(hf.InMemory(model.state_dict()))
    tree, names = decoder.params(cfg), names_of(model, cfg)
    weights = hf.import_weights(tree, names, source, torch.float32, CPU)
    for name, value in exported(tree, names, weights).items():
        assert source.shape(name) == value.shape
        assert torch.equal(value, tensors_of(model)[name]), name


def test_the_routers_bias_stays_exact():
    model, cfg = reference("deepseek_v3", torch.float32)
    weights = imported(model, cfg, torch.bfloat16)
    theirs = torch.stack(
        [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers[2:]]
    )
    assert weights["router_bias"].dtype == torch.float32
    assert torch.equal(weights["router_bias"], theirs)
    assert weights["layers"]["router"].dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_parameter_count_is_transformers(case):
    model, cfg = reference(case, torch.float32)
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    theirs = sum(p.numel() for p in [*model.parameters(), *biases])
    assert param.count(decoder.params(cfg)) == theirs


def test_quantized_weights_are_refused():
    model, cfg = reference("deepseek_v3", torch.float32)
    tensors = tensors_of(model)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{name} holds torch.float8_e4m3fn, but quantized"):
        hf.import_weights(
            decoder.params(cfg), names_of(model, cfg), hf.InMemory(tensors), torch.float32, CPU
        )

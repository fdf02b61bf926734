"""Dense decoders against transformers: logits and the gradient of every parameter."""

import collections

import pytest
import torch
import torch.nn.functional as F
import transformers

from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.grad import value_and_grad
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder, hf
from omnistep.models.hf_config import ConfigJsonError, decoder_config, read_config_json
from omnistep.models.hf_names import weight_names
from tests.models.reference import (
    SIZES,
    exported,
    imported,
    make_batch,
    make_reference,
    names_of,
    relative_errors,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "seed_oss-out-bias": (
        "seed_oss",
        {
            "attention_out_bias": True,
            "head_dim": 8,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    ),
}


def reference(case: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, decoder.Config]:
    family, extra = CASES[case]
    return make_reference(family, extra, dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_match_transformers(case, dtype, tolerance, packed):
    model, cfg = reference(case, dtype)
    batch = make_batch(packed)
    out = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    losses = F.cross_entropy(out.flatten(0, 1), batch.targets.flatten(), reduction="none")
    (losses * batch.weights.flatten()).sum().backward()
    their_grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    tree = decoder.params(cfg)
    weights = imported(model, cfg, dtype)
    ours = decoder.make_logits(cfg, dtype=dtype)(weights, batch)
    assert ((ours - out).norm() / out.norm()).item() < tolerance
    loss = decoder.make_stages(cfg, param.one_rank(tree, dtype), compile=False)
    result, grads = value_and_grad(loss)(weights, [batch], [rng.key(0)])
    assert result.weight == batch.weights.sum()
    errors = relative_errors(exported(tree, names_of(model, cfg), grads), their_grads)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(mode):
    _, cfg = reference("qwen3", torch.float64)
    weights = param.initialize(decoder.params(cfg), rng.key(3), torch.float64, torch.device("cpu"))
    batch = make_batch(packed=True)
    layout = param.one_rank(decoder.params(cfg), torch.float64)
    plain = decoder.make_stages(cfg, layout, compile=False)
    again = decoder.make_stages(cfg, layout, mode=mode, compile=False)
    plain, again = (value_and_grad(x)(weights, [batch], [rng.key(0)]) for x in (plain, again))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_cu_seqlens_and_positions_give_the_same_numbers():
    _, cfg = reference("qwen3", torch.float32)
    weights = param.initialize(decoder.params(cfg), rng.key(3), torch.float32, torch.device("cpu"))
    by_positions = make_batch(packed=True)
    by_lengths = Batch(
        by_positions.tokens,
        by_positions.targets,
        by_positions.weights,
        cu_seqlens=torch.tensor([[0, 9, 10, 24, 24]], dtype=torch.int32),
    )
    logits = decoder.make_logits(cfg, dtype=torch.float32)
    torch.testing.assert_close(
        logits(weights, by_lengths), logits(weights, by_positions), rtol=0, atol=0
    )


def test_export_returns_what_import_read():
    model, cfg = reference("qwen3", torch.float32)
    tensors = dict(model.named_parameters())
    tree = decoder.params(cfg)
    ours = exported(tree, names_of(model, cfg), imported(model, cfg, torch.float32))
    assert ours.keys() == tensors.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, tensors[name].detach(), rtol=0, atol=0)


def test_parameter_count_is_transformers():
    for case in CASES:
        model, cfg = reference(case, torch.float32)
        assert param.count(decoder.params(cfg)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not built; there are deepseek_v2, "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not built"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3 key/value heads"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not one of"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
    ],
)
def test_what_is_not_built_is_named(change, message):
    with pytest.raises(ConfigJsonError, match=message):
        decoder_config({"model_type": "llama", **SIZES, **change})


def test_bad_config_files_are_named(tmp_path):
    with pytest.raises(ConfigJsonError, match="no model configuration at"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigJsonError, match=r"config\.json can't be read as JSON"):
        read_config_json(tmp_path)


def test_a_weight_of_another_shape_is_named():
    _, cfg = reference("qwen3", torch.float32)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has shape \(3, 3\)"):
        hf.import_weights(
            decoder.params(cfg),
            weight_names({"model_type": "qwen3"}, cfg),
            hf.InMemory(collections.defaultdict(lambda: torch.zeros(3, 3))),
            torch.float32,
            torch.device("cpu"),
        )


def test_leaves_are_stacked():
    _, cfg = reference("qwen3", torch.float32)
    shapes = {
        name: p.shape
        for name, p in leaves_with_names(decoder.params(cfg), is_leaf=param.is_param).items()
    }
    assert shapes["layers.q"] == (3, 4, 16, 32)
    assert "lm_head" not in shapes

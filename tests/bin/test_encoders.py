"""model.encoders: a tower in front of a language model, from the configuration and weights of each;
parts of it frozen, or with a learning rate of their own."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from omnistep.bin import train
from omnistep.core.checkpoint.store import open_store
from omnistep.core.logs import read_metrics
from omnistep.data.tokenizer import load_tokenizer
from tests.bin.runs import ROOT, Files, call, content, settings, succeeded, words

TOKENIZER = ROOT / "data/emoji/tokenizer"
IMAGE = load_tokenizer(str(TOKENIZER)).token_id("<|image_pad|>")


@frozen
class Parts:
    language: Path
    encoder: Path
    data: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    """A Qwen3 and a CLIP, saved by transformers; 24 images with captions."""
    place = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=load_tokenizer(str(TOKENIZER)).vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(text).save_pretrained(place / "language")
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    CLIPVisionModel(vision).save_pretrained(place / "encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(
        place / "encoder"
    )
    lines = (ROOT / "data/emoji/train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (place / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Parts(place / "language", place / "encoder", place / "data.jsonl")


def run(parts: Parts, output: Path, encoder: dict | None = None, **changes):
    """2 steps of packed rows."""
    paths = {"config_path": str(parts.encoder), "model_path": str(parts.encoder)}
    encoders = {"image": {**(paths if encoder is None else encoder), "image_token_id": IMAGE}}
    given = {
        "model_config_path": None,
        "model_model_path": parts.language,
        "model_tokenizer_path": TOKENIZER,
        "model_encoders": json.dumps(encoders),
        "data_data_type": "conversation",
        "data_chat_template": "chatml",
        "data_max_seq_len": 64,
        "data_max_patches": 36,
        "data_train_size": 256,
        "train_save_hf_weights": True,
    }
    files = Files(parts.data.parent, parts.language, *[parts.data] * 3)
    fields = settings(files, output, **{**given, **changes})
    return call(train.main, words(fields))


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "hf/model.safetensors")


def saved(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


@pytest.fixture(scope="module")
def projector_only(parts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("projector") / "run"
    frozen = '["encoder", "language_model"]'
    result = succeeded(run(parts, output, train_freeze=frozen))
    assert "frozen  encoder, language_model" in result.out
    assert "at most 36 patches a sample, 1 a token" in result.out
    return output


def test_the_weights_of_both_are_read_and_what_is_frozen_stays(parts, projector_only):
    found, language, encoder = exported(projector_only), saved(parts.language), saved(parts.encoder)
    for name, value in language.items():
        assert torch.equal(found[f"language_model.{name}"], value), name
    for name, value in encoder.items():
        if ".layers.2." in name or "post_layernorm" in name:
            continue  # LLaVA takes what the layer before the last returns
        assert torch.equal(found[f"vision_tower.{name.removeprefix('vision_model.')}"], value), name
    rows = [row for row in read_metrics(projector_only / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2
    assert rows[0]["grad_norm"] > 0


def test_transformers_reads_the_export(projector_only):
    """And makes the same pixels: preprocessor_config.json stands beside it."""
    read: Any = LlavaForConditionalGeneration.from_pretrained
    model, info = read(projector_only / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.image_token_id == IMAGE
    there = json.loads((projector_only / "hf/preprocessor_config.json").read_text())
    assert there["crop_size"] == {"height": 16, "width": 16}


def test_only_the_projector_has_optimizer_state(projector_only):
    store = open_store(projector_only / "checkpoints")
    moments = {name for name in store.stored(2) if name.startswith("state.opt_state.mu.")}
    store.close()
    assert moments
    assert all(name.startswith("state.opt_state.mu.projector.") for name in moments)


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("encoder", "has no optimizer state of embed, .* which were frozen"),
        (
            '["encoder", "projector"]',
            "has no optimizer state of embed, .* To train them start a new run from its weights",
        ),
    ],
)
def test_what_was_frozen_has_to_stay_so(parts, projector_only, freeze, said):
    before = content(projector_only / "checkpoints")
    changes = {"train_freeze": freeze, "train_load_checkpoint_path": "auto"}
    result = run(parts, projector_only, data_train_size=512, **changes)
    assert result.code == 1
    assert re.search(said, result.err), result.err
    assert content(projector_only / "checkpoints") == before


def test_parts_may_start_at_random(parts, tmp_path):
    """Of the encoder only the configuration: its weights are another seed's."""
    output = tmp_path / "run"
    only = {"config_path": str(parts.encoder)}
    succeeded(run(parts, output, only, train_freeze='["encoder", "language_model"]'))
    found, encoder = exported(output), saved(parts.encoder)
    name = "encoder.layers.0.mlp.fc1.weight"
    theirs = next(value for key, value in encoder.items() if key.endswith(name))
    assert not torch.equal(found[f"vision_tower.{name}"], theirs)
    language = saved(parts.language)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found["language_model.model.layers.0.mlp.up_proj.weight"], language)


def test_a_rate_of_its_own(parts, tmp_path):
    """At 0 the encoder stays; the projector moves further than at train.lr."""
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    succeeded(run(parts, slow, train_lr=1e-3, train_encoder_lr=0))
    succeeded(run(parts, fast, train_lr=1e-3, train_encoder_lr=0, train_projector_lr=0.1))
    encoder = saved(parts.encoder)
    for output in (slow, fast):
        found = exported(output)["vision_tower.encoder.layers.0.mlp.fc1.weight"]
        theirs = next(v for k, v in encoder.items() if k.endswith("layers.0.mlp.fc1.weight"))
        assert torch.equal(found, theirs)
    name = "multi_modal_projector.linear_1.bias"  # 0 at first
    assert exported(fast)[name].norm() > 10 * exported(slow)[name].norm() > 0


@pytest.mark.parametrize(
    ("encoder", "changes", "said"),
    [
        ({"config_path": "nowhere"}, {}, "model.encoders.image: no model configuration at nowhere"),
        ({}, {}, "an encoder is {image: {config_path: ..., model_path: ...}}"),
        ({"model_path": 7}, {}, "an encoder is {image: {config_path: ..., model_path: ...}}"),
        ({"model_path": None}, {}, "an encoder is {image: {config_path: ..., model_path: ...}}"),
        (None, {"train_freeze": "vision"}, "'vision' is not one of encoder, projector, language"),
        (
            None,
            {"train_freeze": '["encoder", "projector", "language_model"]'},
            "names all parts .*: nothing would learn",
        ),
        (
            None,
            {"train_freeze": "encoder", "train_encoder_lr": 1e-3},
            "the encoder is frozen: leave its learning rate out",
        ),
        (None, {"model_encoders": '{"sound": {}}'}, "not of 'sound'"),
        (
            None,
            {"model_encoders": "{}", "train_freeze": "encoder"},
            "train.freeze is about the encoder, but a qwen3 has none; it has language_model",
        ),
        (None, {"model_encoders": "{}"}, "data.max_patches = 36, but a qwen3 takes no images"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(parts, tmp_path, encoder, changes, said):
    result = run(parts, tmp_path / "run", encoder, **changes)
    assert result.code in (1, 2)
    assert re.search(said, result.err), result.err
    assert not (tmp_path / "run").exists()


def test_encoder_weights_without_the_tower_are_refused(parts, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(parts.encoder, wrong)
    shutil.copy(parts.language / "model.safetensors", wrong / "model.safetensors")
    paths = {"config_path": str(wrong), "model_path": str(wrong)}
    result = run(parts, tmp_path / "run", paths)
    assert result.code == 1
    assert "the weights of the encoder hold no clip_vision_model" in result.err

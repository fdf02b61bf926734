"""What a model's files say beside its config.json: which tensors there are, where answers end."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from omnistep.bin import sample, train
from omnistep.bin.model import read_model, stop_tokens
from omnistep.core.config import ModelArguments
from omnistep.data.tokenizer import load_tokenizer
from tests.bin.runs import TOKENIZER, call, settings, succeeded, words

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A small Llama with the tokenizer of the tests, tied."""
    torch.manual_seed(0)
    place = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(place)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(place)
    (place / "generation_config.json").unlink(missing_ok=True)
    return place


def change(place, **tensors):
    file = place / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def spoken(place, *more):
    argv = [f"--infer.model_path={place}", "--infer.prompt=To be", "--infer.max_tokens=12"]
    argv += ["--infer.do_sample=false", "--infer.compile=false", *more]
    return succeeded(call(sample.main, argv))


def greedy(place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer("To be", return_tensors="pt", add_special_tokens=False).input_ids
    theirs: Any = AutoModelForCausalLM.from_pretrained(place)
    out = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_head_of_its_own_is_not_tied(model):
    torch.manual_seed(1)
    change(model, **{"lm_head.weight": torch.randn(4096, 32)})
    result = spoken(model)
    assert "config.json ties the output layer, but lm_head.weight is another tensor" in result.err
    assert result.out.rstrip("\n") == greedy(model).rstrip("\n")


def test_a_head_that_is_the_embedding_stays_tied(model):
    embed = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    change(model, **{"lm_head.weight": embed.clone()})
    found = read_model(ModelArguments(config_path=str(model), model_path=str(model)))
    assert found.cfg.tied
    assert found.notes == ()


def test_tensors_without_a_place_are_told(model, files, tmp_path):
    extra = {f"model.layers.1.mtp.{i}.weight": torch.zeros(2) for i in range(5)}
    change(model, **extra, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    note = "5 tensors of the files have no place in the model: model.layers.1.mtp.0.weight, "
    assert note in spoken(model).err
    chosen = settings(files, tmp_path / "run", model_model_path=model, train_max_steps=1)
    del chosen["model.config_path"]
    assert note in succeeded(call(train.main, words(chosen))).out


def test_weights_that_are_no_numbers_are_an_error(model):
    change(model, **{"model.norm.weight": torch.full((32,), float("nan"))})
    argv = [f"--infer.model_path={model}", "--infer.prompt=x", "--infer.compile=false"]
    result = call(sample.main, argv)
    assert result.code == 1
    assert "are damaged: final_norm holds NaN or infinity" in result.err


def test_a_prompt_beyond_what_the_model_was_made_for_is_told_once(model):
    assert "max_position_embeddings" not in spoken(model).err
    result = spoken(model, "--infer.max_tokens=70")
    assert result.err.count("made for 64 (max_position_embeddings)") == 1


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, [7, 9, 5, 0]),
        ({"eos_token_id": 7}, {"eos_token_id": [7, 8]}, [7, 8, 0]),
        ({}, {"eos_token_id": None}, [0]),
        ({"eos_token_id": "x"}, {}, [2, 0]),
    ],
)
def test_answers_end_where_the_files_say(generation, config, ends, model):
    (model / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2} | config))
    found = read_model(ModelArguments(config_path=str(model)))
    assert stop_tokens(found, load_tokenizer(model).eos_id) == ends


def test_each_of_several_ends_stops_an_answer(model):
    whole = spoken(model).out.rstrip("\n")
    tokenizer = load_tokenizer(model)
    end = tokenizer.encode("To be" + whole)[4:5]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [4095, *end]}))
    said = spoken(model).out.rstrip("\n")
    assert said + tokenizer.decode(end) == greedy(model)  # theirs has the end, too
    assert len(said) < len(whole)


def test_an_export_keeps_what_the_base_had(model, files, tmp_path):
    generation = {"eos_token_id": [7, 9], "temperature": 0.6, "pad_token_id": 3}
    (model / "generation_config.json").write_text(json.dumps(generation))
    (model / "tokenizer.model").write_bytes(b"pieces")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    output = tmp_path / "run"
    more = {"model_model_path": model, "train_max_steps": 1, "train_save_hf_weights": True}
    chosen = settings(files, output, **more) | {"model.tokenizer_path": model}
    del chosen["model.config_path"]
    succeeded(call(train.main, words(chosen)))
    written = json.loads((output / "hf/generation_config.json").read_text())
    base = json.loads((model / "config.json").read_text())["eos_token_id"]
    eos = load_tokenizer(model).eos_id
    assert written == generation | {"eos_token_id": list(dict.fromkeys([7, 9, base, eos]))}
    assert (output / "hf/tokenizer.model").read_bytes() == b"pieces"
    place = output / "hf/additional_chat_templates/tool_use.jinja"
    assert place.read_text() == "{{ tools }}"

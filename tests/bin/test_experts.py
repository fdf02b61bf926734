"""A model with experts, a router's bias and latent attention, through the commands: trained,
exported, converted there and back, asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from omnistep.bin import convert, sample, train
from omnistep.core.checkpoint.safetensors import Weights, open_weights
from tests.bin.runs import (
    CONFIG,
    TOKENIZER,
    Files,
    call,
    content,
    losses,
    settings,
    succeeded,
    words,
)
from tests.forkserver.client import ForkServer

EXPERTS = CONFIG | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,  # what is rotated
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def mixture(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a finished run of 6 steps, with an export."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "config.json").write_text(json.dumps(EXPERTS))
    chosen = settings(
        files,
        folder / "run",
        model_config_path=folder / "config.json",
        train_save_hf_weights=True,
    )
    succeeded(call(train.main, words(chosen)))
    return folder / "run"


def converted(source: Path, target: Path, *arguments: str) -> Path:
    succeeded(call(convert.main, [str(source), str(target), *arguments]))
    return target


def test_the_export_is_transformers(mixture: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(mixture / "hf", output_loading_info=True)
    theirs, info = loaded
    assert not any(info.values()), info
    ours = open_weights(mixture / "hf")
    assert (
        theirs.model.layers[2].mlp.gate.e_score_correction_bias.tolist() == ours.read(BIAS).tolist()
    )
    assert ours.read(BIAS).abs().max() >= 0.001  # six steps have moved it


@pytest.mark.slow
def test_ranks_that_share_experts_train_and_export_what_one_does(
    files: Files, tmp_path: Path, server: ForkServer
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))

    def export(name: str, ranks: int, **changes: Any) -> Weights:
        chosen = settings(
            files,
            tmp_path / name,
            model_config_path=tmp_path / "config.json",
            train_save_hf_weights=True,
            train_enable_mixed_precision=False,
            train_compute_dtype="float64",
            train_global_batch_size=4,
            **changes,
        )
        succeeded(server.run("train", words(chosen), ranks=ranks))
        return open_weights(tmp_path / name / "hf")

    one = export("one", 1)
    sizes = {"train_tensor_parallel_size": 2, "train_expert_parallel_size": 2}
    two = export("two", 2, train_data_parallel_mode="fsdp2", **sizes)
    assert one.infos.keys() == two.infos.keys()
    for name in one.infos:
        a, b = one.read(name), two.read(name)
        assert (a - b).norm() <= 1e-10 * a.norm(), name


def test_there_and_back(mixture: Path, tmp_path: Path) -> None:
    assert content(converted(mixture, tmp_path / "hf")) == content(mixture / "hf")
    checkpoint = converted(mixture / "hf", tmp_path / "checkpoints")
    arguments = (checkpoint, tmp_path / "back", f"--model.tokenizer_path={mixture / 'hf'}")
    assert content(converted(*arguments)) == content(mixture / "hf")


def test_what_was_saved_of_transformers_modules(mixture: Path, tmp_path: Path) -> None:
    """There the experts of a layer are one tensor."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(mixture / "hf").state_dict()
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    arguments = (f"--model.config_path={mixture / 'hf'}", f"--model.tokenizer_path={TOKENIZER}")
    target = converted(tmp_path / "dcp", tmp_path / "hf", *arguments)
    ours, theirs = open_weights(target), open_weights(mixture / "hf")
    assert ours.infos.keys() == theirs.infos.keys()
    for name in theirs.infos:
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_a_routers_bias_stays_in_fp32(mixture: Path, tmp_path: Path) -> None:
    ours = open_weights(converted(mixture, tmp_path / "hf", "--dtype", "bfloat16"))
    assert ours.dtype(BIAS) == torch.float32
    assert {ours.dtype(name) for name in ours.infos if "e_score" not in name} == {torch.bfloat16}


def test_a_run_goes_on_from_the_export(mixture: Path, files: Files, tmp_path: Path) -> None:
    chosen = settings(files, tmp_path / "run", model_model_path=mixture / "hf", data_train_size=64)
    chosen["model.config_path"] = None
    succeeded(call(train.main, words(chosen)))
    assert losses(tmp_path / "run")[1] < losses(mixture)[1] - 0.1


def test_it_speaks_as_with_transformers(mixture: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(mixture / "hf")
    tokenizer = AutoTokenizer.from_pretrained(mixture / "hf")
    prompt = "ROMEO. But soft"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    asked = {
        "infer.model_path": mixture / "hf",
        "infer.prompt": prompt,
        "infer.do_sample": False,
        "infer.max_tokens": 12,
        "infer.compile": False,
    }
    said = succeeded(call(sample.main, words(asked)))
    assert said.out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"

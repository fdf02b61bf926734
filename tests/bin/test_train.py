"""What a run leaves behind: metrics, picture, recipe, checkpoints, weights others can read."""

import gzip
import json
import math

import pytest
import torch
import yaml

from omnistep.bin import build, sample, train
from omnistep.bin.model import read_model, read_weights
from omnistep.core.batch import Batch
from omnistep.core.config import ModelArguments
from omnistep.core.logs import read_metrics
from omnistep.models import decoder
from tests.bin.runs import (
    call,
    losses,
    process,
    saved_steps,
    settings,
    succeeded,
    words,
)


def test_a_run_leaves_what_it_promises(trained):
    rows = read_metrics(trained / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert {"loss", "lr", "grad_norm", "weight", "tokens", "skipped"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert {"tokens_per_second", "eta_seconds", "data_wait_share"} <= steps[-1].keys()
    assert steps[-1]["tokens"] == sum(row["weight"] for row in steps)
    assert steps[0]["lr"] == pytest.approx(1e-2)
    assert steps[0]["lr"] > steps[-1]["lr"] > 1e-7
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 6]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evaluated[0] == pytest.approx(math.log(4096), abs=0.5)
    assert evaluated[-1] < evaluated[0] - 0.2
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    # due: 2, 3 (an epoch), 4, 6 (steps, an epoch and the last at once); the newest two are kept
    assert saved_steps(trained) == [4, 6]


def test_the_recipe_is_the_same_run(trained, tmp_path):
    recipe = trained / "recipe.yaml"
    again = succeeded(call(train.main, [str(recipe), f"--train.output_dir={tmp_path / 'again'}"]))
    assert losses(tmp_path / "again") == losses(trained)
    first, second = (
        yaml.safe_load(p.read_text()) for p in (recipe, tmp_path / "again/recipe.yaml")
    )
    second["train"]["output_dir"] = first["train"]["output_dir"]
    assert first == second
    assert str(tmp_path / "again" / "hf") in again.out
    for weights in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again/hf" / weights).read_bytes() == (
            trained / "hf" / weights
        ).read_bytes()


def test_everything_saved_is_kept_when_asked(files, tmp_path):
    chosen = settings(
        files, tmp_path / "run", train_save_steps=1, train_keep_checkpoints=0, data_train_size=250
    )
    succeeded(call(train.main, words(chosen)))
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4]
    assert not (tmp_path / "run/hf").exists()


def test_nothing_asked_still_saves_the_last_step(files, tmp_path):
    chosen = settings(files, tmp_path / "run", train_save_epochs=0, data_train_size=190)
    succeeded(call(train.main, words(chosen)))
    assert saved_steps(tmp_path / "run") == [3]


def test_transformers_reads_the_export(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(trained / "hf")
    their_tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    place = ModelArguments(config_path=str(trained / "hf"), tokenizer_path=str(trained / "hf"))
    model = read_model(place)
    tokenizer = build.read_tokenizer(place, model.cfg)
    params = read_weights(str(trained / "hf"), model, torch.float32, torch.device("cpu"))
    text = "HAMLET. To be, or not to be: that is the question"
    ids = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == tokenizer.eos_id == theirs.config.eos_token_id
    tokens = torch.tensor([ids])
    batch = Batch(
        tokens, tokens, torch.ones(tokens.shape), torch.arange(len(ids), dtype=torch.int32)[None]
    )
    with torch.no_grad():
        ours = decoder.make_logits(model.cfg, dtype=torch.float32)(params, batch)
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_a_run_goes_on_from_exported_weights(trained, files, tmp_path):
    chosen = settings(
        files,
        tmp_path / "run",
        model_config_path=None,
        model_tokenizer_path=None,
        model_model_path=trained / "hf",
        data_eval_path=files.held_out,
        data_train_size=64,
    )
    succeeded(call(train.main, words(chosen)))
    before = [row for row in read_metrics(trained / "metrics.jsonl") if "eval_loss" in row][-1]
    start = read_metrics(tmp_path / "run/metrics.jsonl")[0]
    assert start["step"] == 0
    assert start["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)


def test_the_export_takes_a_tokenizer_file_of_any_name(trained, files, tmp_path):
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "mine.json").write_bytes((trained / "hf/tokenizer.json").read_bytes())
    (own / "tokenizer_config.json").write_bytes((trained / "hf/tokenizer_config.json").read_bytes())
    chosen = settings(
        files,
        tmp_path / "run",
        model_tokenizer_path=own / "mine.json",
        data_train_size=64,
        train_save_hf_weights=True,
    )
    succeeded(call(train.main, words(chosen)))
    answer = {
        "infer.model_path": tmp_path / "run/hf",
        "infer.prompt": "Hark",
        "infer.max_tokens": 1,
    }
    succeeded(call(sample.main, words({**answer, "infer.compile": False})))


@pytest.mark.slow
def test_the_whole_path_compiled_as_a_user_starts_it(files, tmp_path):
    """Packed with accumulation; eager and compiled agree."""
    common = {
        "data_train_size": 3 * 128,
        "train_global_batch_size": 4,
        "data_num_workers": 1,
        "data_eval_path": files.held_out,
        "train_lr": 1e-3,
        "train_save_hf_weights": True,
        "infer_prompt": "HAMLET.",
        "infer_max_tokens": 3,
        "infer_compile": False,
    }
    compiled = settings(files, tmp_path / "run", train_enable_manual_eager=None, **common)
    result = succeeded(process("train", words(compiled)))
    assert "compiled" in result.out
    assert "\nHAMLET." in result.out
    assert result.err == ""
    eager = settings(files, tmp_path / "eager", **common)
    succeeded(call(train.main, words(eager)))
    expected = losses(tmp_path / "eager")
    assert len(expected) == 3
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    norms = [
        [
            row["grad_norm"]
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
            if "loss" in row
        ]
        for name in ("run", "eager")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # fp32; wrong gradients are far off


@pytest.mark.slow
def test_wandb_without_a_key_is_recorded_offline(files, tmp_path, plain_server):
    chosen = settings(
        files, tmp_path / "run", train_use_wandb=True, train_wandb_name="tiny", data_train_size=64
    )
    result = succeeded(plain_server.run("train", words(chosen)))
    said = [line for line in result.out.splitlines() if line.startswith("wandb: ")]
    assert len(said) == 1
    assert "offline" in said[0]
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))


def test_profiling_writes_a_trace_of_the_chosen_steps(files, tmp_path):
    chosen = settings(
        files,
        tmp_path / "run",
        data_train_size=4 * 64,
        train_enable_profiling=True,
        train_profile_start_step=2,
        train_profile_end_step=3,
        train_profile_trace_dir=tmp_path / "trace",
        train_profile_with_stack=False,
    )
    succeeded(call(train.main, words(chosen)))
    (trace,) = (tmp_path / "trace").glob("*.json.gz")
    assert "2-2" in trace.name
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::mm", "omnistep::linear"} & set(names)

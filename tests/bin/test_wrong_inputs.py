"""What a user may get wrong, one thing at a time: one clear message, and nothing is harmed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from omnistep.bin import train
from tests.bin.runs import (
    CONFIG,
    PADDED,
    call,
    content,
    process,
    settings,
    succeeded,
    words,
    write_documents,
)


@pytest.fixture(scope="module")
def checkpoints(files, tmp_path_factory):
    """A run of 4 steps, saved at 2 and 4."""
    output = tmp_path_factory.mktemp("checkpoints") / "run"
    chosen = settings(files, output, train_save_steps=2, data_train_size=4 * 64)
    succeeded(call(train.main, words(chosen)))
    return output


def refused(argv, *, code=1, begun=False):
    """The message of a run that must not start (or not go on); without the word before it."""
    result = call(train.main, argv)
    assert result.code == code, f"exit {result.code}\n{result.out}\n{result.err}"
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err + result.out
    assert ("step 1" in result.out) == begun
    return result.err.removeprefix("error: ").strip()


def one_line(message):
    assert "\n" not in message
    return message


def test_a_process_ends_with_the_message_and_its_code(files, tmp_path):
    """All of this file's other tests ask `main`; this is what a shell sees."""
    chosen = settings(files, tmp_path / "run", data_train_path=tmp_path / "nothing.jsonl")
    result = process("train", words(chosen))
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("error: data.train_path: nothing matches")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- the configuration: exit code 2


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--train.lrr=1", r"train\.lrr.*no such argument; did you mean train\.lr\?"),
        ("--data.max_seqlen=64", r"did you mean data\.max_seq_len\?"),
        ("--lr=1", r"did you mean train\.lr\?"),
        ("--train.lr=much", r'train\.lr = "much" .*number'),
        ("--train.micro_batch_size=1.5", r"train\.micro_batch_size = 1\.5 .*whole number|integer"),
        ("--train.rmpad=perhaps", r'train\.rmpad = "perhaps" .*true'),
        ("--train.optimizer=sgd", r'train\.optimizer = "sgd" .*adamw'),
        ("--train.global_batch_size=3", r"multiple of micro_batch_size.*2 or 4"),
        ("--train.max_steps=0", r"train\.max_steps = 0 .*at least 1"),
        ("--train.rmpad=true", r"rmpad_with_pos_ids.*one of them"),
        ("--train.expert_parallel_size=2", r"train\.expert_parallel_size = 2.*--nproc 2"),
        ("--train.tensor_parallel_size=2", r"train\.tensor_parallel_size = 2.*--nproc 2"),
        ("--train.dyn_bsz_margin=64", r"below the 64 tokens"),
        ("--train.lr", r"train\.lr.*needs a value"),
    ],
)
def test_an_argument(word, expected, files, tmp_path):
    message = one_line(refused([*words(settings(files, tmp_path / "run")), word], code=2))
    assert re.search(expected, message), message
    assert not (tmp_path / "run").exists()


def test_all_wrong_arguments_are_named_at_once(files, tmp_path):
    wrong = ["--train.lr=much", "--train.seeed=1", "--train.max_steps=0"]
    message = refused([*words(settings(files, tmp_path / "run")), *wrong], code=2)
    assert message.startswith("3 problems")
    assert all(name in message for name in ("train.lr", "did you mean train.seed", "at least 1"))


def test_no_recipe_there(tmp_path):
    message = one_line(refused([str(tmp_path / "missing.yaml")], code=2))
    assert "missing.yaml" in message
    assert "No such file" in message


def test_a_recipe_that_is_no_yaml(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train:\n  lr: [1\n")
    assert re.search(r"r\.yaml:\d+: not valid YAML", one_line(refused([str(recipe)], code=2)))


def test_what_is_required_is_asked_for():
    message = refused([], code=2)
    assert all(name in message for name in ("train_path", "output_dir", "config_path"))


# ---- the data


def test_no_records(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    chosen = settings(files, tmp_path / "run", data_train_path=tmp_path / "empty.jsonl")
    assert "the data is empty" in one_line(refused(words(chosen)))


@pytest.mark.parametrize("mode", [{}, PADDED])
def test_no_token_in_any_record(mode, files, tmp_path):
    write_documents(tmp_path / "blank.jsonl", ["", ""])
    chosen = settings(files, tmp_path / "run", **mode, data_train_path=tmp_path / "blank.jsonl")
    message = one_line(refused(words(chosen), begun=True))
    assert "no token to learn" in message
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_text_that_is_not_utf8(name, files, tmp_path):
    line = '{"content_split": "ça va"}' if name.endswith("jsonl") else "ça va"
    (tmp_path / name).write_bytes(b"\n" + line.encode("latin-1") + b"\n")
    chosen = settings(files, tmp_path / "run", data_train_path=tmp_path / name)
    message = one_line(refused(words(chosen)))
    assert f"{name}, line 2: not UTF-8" in message


def test_held_out_data_is_checked_too(files, tmp_path):
    chosen = settings(files, tmp_path / "run", data_eval_path=tmp_path / "nothing.txt")
    message = one_line(refused(words(chosen)))
    assert "data.eval_path" in message
    assert "nothing matches" in message


def test_a_record_without_the_key(files, tmp_path):
    chosen = settings(files, tmp_path / "run", data_text_keys="body")
    message = one_line(refused(words(chosen)))
    assert "body" in message
    assert "content_split" in message
    assert "line" in message


def test_less_data_than_one_batch(files, tmp_path):
    chosen = settings(
        files, tmp_path / "run", **PADDED, data_train_path=files.short, train_global_batch_size=64
    )
    message = one_line(refused(words(chosen)))
    assert "5 sequences" in message
    assert "train.global_batch_size = 64" in message
    assert "data.drop_last false" in message


# ---- the model


def test_no_configuration(files, tmp_path):
    chosen = settings(files, tmp_path / "run", model_config_path=tmp_path / "c.json")
    assert f"no model configuration at {tmp_path / 'c.json'}" in one_line(refused(words(chosen)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "JSON"),
        ("[]", "not an object"),
        (json.dumps(CONFIG | {"model_type": "gpt9"}), "model_type 'gpt9' is not built"),
        (json.dumps(CONFIG | {"num_key_value_heads": 3}), "does not fit together"),
        (json.dumps(CONFIG | {"hidden_size": "wide"}), "must be a whole number"),
    ],
)
def test_a_configuration_that_cannot_be_used(text, expected, files, tmp_path):
    (tmp_path / "c.json").write_text(text)
    chosen = settings(files, tmp_path / "run", model_config_path=tmp_path / "c.json")
    assert expected in one_line(refused(words(chosen)))


def test_a_tokenizer_that_does_not_fit_the_vocabulary(files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG | {"vocab_size": 4000}))
    chosen = settings(files, tmp_path / "run", model_config_path=tmp_path / "c.json")
    message = one_line(refused(words(chosen)))
    assert "ids up to 4095" in message
    assert "vocabulary is 4000" in message


def test_no_tokenizer(files, tmp_path):
    chosen = settings(files, tmp_path / "run", model_tokenizer_path=tmp_path)
    assert "no tokenizer at" in one_line(refused(words(chosen)))


def broken_weights(kind, hf):
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "header":
        file.write_bytes(b"\xff" * 8 + whole[8:])
    elif kind == "other shapes":
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif kind == "more layers":
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif kind == "a tensor missing":
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "safetensors"),
        ("empty", "model.safetensors"),
        ("cut", "model.safetensors"),
        ("header", "model.safetensors"),
        ("other shapes", r"mlp\.\w+_proj\.weight has shape .* asks for"),
        ("more layers", r"model\.layers\.2"),
        ("a tensor missing", r"model\.norm\.weight"),
    ],
)
def test_weights_that_cannot_be_used(kind, expected, trained, files, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(trained / "hf", hf)
    broken_weights(kind, hf)
    chosen = settings(files, tmp_path / "run", model_model_path=hf, model_config_path=hf)
    message = one_line(refused(words(chosen)))
    assert message.startswith(f"the weights at {hf} can't be used: ")
    assert re.search(expected, message), message


# ---- where a run is saved, and gone on with


def test_an_output_dir_that_cannot_be_written(files, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        message = one_line(refused(words(settings(files, place))))
        assert message.startswith(f"train.output_dir: nothing can be written to {place}")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere", "train.load_checkpoint_path: there is no directory"),
        ("empty", "holds no complete checkpoint"),
        ("run/checkpoints/3", r"there is no directory|holds no step 3"),
    ],
)
def test_no_checkpoint_there(path, expected, checkpoints, files, tmp_path):
    (tmp_path / "empty").mkdir()
    place = checkpoints.parent / path if path.startswith("run") else tmp_path / path
    chosen = settings(files, tmp_path / "new", train_load_checkpoint_path=place)
    assert re.search(expected, one_line(refused(words(chosen))))


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({}, {"hidden_size": 64}, r"params\.embed: asked for float32\[4096, 64\], stored"),
        ({}, {"num_hidden_layers": 3}, r"layers\.\w+: asked for"),
        ({}, {"model_type": "llama"}, r"no place for: .*k_norm.*another model"),
        ({}, {"tie_word_embeddings": False}, r"lm_head: asked for .* stored is nothing"),
        ({"train_optimizer": "anyprecision_adamw"}, {}, r"bfloat16.*stored is"),
        ({"data_max_seq_len": 16}, {}, r"data\.max_seq_len was 32, is 16"),
        ({"data_train_path": "short"}, {}, r"number of samples was 150, is 5"),
        ({"train_seed": 1}, {}, r"train\.seed was 42, is 1"),
    ],
)
def test_a_checkpoint_of_something_else(changes, config, expected, checkpoints, files, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(checkpoints, output)
    before = content(output)
    (tmp_path / "c.json").write_text(json.dumps(CONFIG | config))
    if "data_train_path" in changes:
        changes = {"data_train_path": files.short}
    chosen = settings(
        files,
        output,
        train_load_checkpoint_path="auto",
        model_config_path=tmp_path / "c.json",
        **changes,
    )
    message = refused(words(chosen))
    assert re.search(expected, message), message
    assert content(output) == before


def test_a_checkpoint_of_a_larger_optimizer(files, tmp_path):
    """All that adamw asks for is there, in bfloat16 too; the compensation would be lost."""
    whole = {"train_enable_mixed_precision": False, "train_compute_dtype": "bfloat16"}
    chosen = settings(
        files, tmp_path / "run", **whole, train_optimizer="anyprecision_adamw", data_train_size=64
    )
    succeeded(call(train.main, words(chosen)))
    chosen |= {"train.optimizer": "adamw", "train.load_checkpoint_path": "auto"}
    message = one_line(refused(words(chosen)))
    assert re.search(r"no place for: state\.opt_state\.compensation.*train\.optimizer", message)


def test_a_truncated_checkpoint(checkpoints, files, tmp_path):
    """Every file of the newest step in turn, cut in half or gone."""
    output = tmp_path / "run"
    shutil.copytree(checkpoints, output)
    newest = output / "checkpoints/4/state"
    argv = words(settings(files, tmp_path / "new", train_load_checkpoint_path=newest.parent))
    # what only another writer reads, or orbax for its own bookkeeping
    spared = ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding", "array_metadatas")
    damaged = [
        path
        for path in sorted(newest.rglob("*"))
        if path.is_file()
        and not path.name.startswith(spared)
        and not any(part.startswith("ocdbt.process") for part in path.parts)
    ]
    assert len(damaged) >= 4
    for path in damaged:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        before = content(output)
        message = one_line(refused(argv))
        assert "damaged" in message, (path, message)
        assert str(newest) in message
        assert content(output) == before
        path.write_bytes(whole)
    succeeded(call(train.main, argv))


# ---- the run itself


def test_a_loss_that_is_not_finite_stops_the_run(files, tmp_path):
    chosen = settings(
        files, tmp_path / "run", train_lr=1e30, train_lr_min=1e30, train_max_skipped_steps=3
    )
    message = one_line(refused(words(chosen), begun=True))
    assert message.startswith("3 steps in a row had a non-finite gradient")
    assert "train.max_skipped_steps" in message
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["skipped"] for row in rows][-3:] == [1.0, 1.0, 1.0]

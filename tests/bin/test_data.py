"""bin/train on every kind of data: conversations, mixes, streams, custom datasets, bad records."""

import gzip
import json
import re

import pytest
from transformers import AutoTokenizer

from omnistep.bin import train
from omnistep.core.logs import read_metrics
from tests.bin.runs import (
    TOKENIZER,
    call,
    losses,
    saved_steps,
    settings,
    succeeded,
    words,
    write_documents,
)

TURNS = ["Who's there?", "Nay, answer me.", "Long live the king!", "Bernardo?", "He."]


def write_chats(path, count=60):
    with path.open("w") as file:
        for i in range(count):
            messages = [
                {"role": "assistant" if n % 2 else "user", "content": TURNS[(i + n) % 5]}
                for n in range(2 + 2 * (i % 3))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


CHAT = {
    "data_data_type": "conversation",
    "data_chat_template": "default",
    "data_max_seq_len": 64,
    "data_train_size": 6 * 128,
    "train_save_hf_weights": True,
}


def test_conversations_are_trained_on_and_exported(files, chats, tmp_path):
    """With the template they were trained by, which transformers takes."""
    chosen = settings(files, tmp_path / "run", data_train_path=chats, **CHAT)
    result = succeeded(call(train.main, words(chosen)))
    assert "60 samples, conversation, packed (positions)" in result.out
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert all(0 < row["weight"] < 100 for row in rows)  # the user's words are not learnt
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run/hf")
    talk = [{"role": "user", "content": "Hark"}]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "User: Hark<|endoftext|>\nAssistant:"
    assert json.loads((tmp_path / "run/hf/config.json").read_text())["eos_token_id"] == 0
    padded = {"train_rmpad_with_pos_ids": False, "train_max_steps": 3}
    chosen = settings(files, tmp_path / "padded", data_train_path=chats, **{**CHAT, **padded})
    assert len(losses_of(chosen, tmp_path / "padded")) == 3


def losses_of(chosen, output):
    succeeded(call(train.main, words(chosen)))
    return losses(output)


@pytest.mark.slow
def test_a_mix_is_counted_and_goes_on(files, chats, tmp_path, server):
    """Plain text and conversations; stopped and gone on, on two ranks, the numbers stay."""
    write_documents(tmp_path / "text.jsonl", ["To be, or not to be"] * 40)
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "sources:\n"
        f"  - {{path: {chats}, weight: 3, name: chats}}\n"
        "  - {path: text.jsonl, weight: 1, data_type: plaintext}\n"
    )
    common = {**CHAT, "data_train_path": mix, "train_global_batch_size": 4}
    common |= {"data_train_size": 6 * 256, "train_lr_decay_style": "constant"}
    whole = losses_of(settings(files, tmp_path / "whole", **common), tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole/metrics.jsonl") if "loss" in row]
    last = rows[-1]
    share = last["samples/chats"] / (last["samples/chats"] + last["samples/text.jsonl"])
    assert 0.6 < share < 0.9
    assert last["tokens/chats"] > last["samples/chats"]
    output = tmp_path / "parts"
    first = settings(files, output, **{**common, "data_train_size": 3 * 256})
    succeeded(call(train.main, words(first)))
    rest = settings(files, output, **common, train_load_checkpoint_path="auto")
    result = succeeded(server.run("train", words(rest), ranks=2))
    assert "changed  data.train_size: 768 -> 1536" in result.out
    assert losses(output) == pytest.approx(whole, rel=1e-5)
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["samples/chats"] == last["samples/chats"]


@pytest.mark.slow
def test_a_compressed_stream_goes_on_on_other_ranks(files, tmp_path, plain_server):
    """One rank, then two with a worker each, against one rank that was never stopped."""
    for name, part in (("a", slice(0, 90)), ("b", slice(90, 150))):
        lines = files.text.read_bytes().splitlines(keepends=True)[part]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    common = {
        "data_train_path": f"{tmp_path}/*.gz",
        "data_datasets_type": "iterable",
        "data_shuffle_buffer": 8,
        "data_eval_path": files.held_out,
        "train_eval_steps": 2,
        "train_global_batch_size": 4,
        "train_lr_decay_style": "constant",
        "data_train_size": 6 * 128,
    }
    whole = losses_of(settings(files, tmp_path / "whole", **common), tmp_path / "whole")
    output = tmp_path / "parts"
    first = settings(files, output, **{**common, "data_train_size": 3 * 128})
    succeeded(call(train.main, words(first)))
    rest = settings(files, output, **common, train_load_checkpoint_path="auto", data_num_workers=1)
    succeeded(plain_server.run("train", words(rest), ranks=2))
    assert losses(output) == pytest.approx(whole, rel=1e-5)
    evals = [
        {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
        for rows in (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts"))
    ]
    assert {step: evals[1][step] for step in (4, 6)} == pytest.approx(
        {step: evals[0][step] for step in (4, 6)}, rel=1e-5
    )


def test_a_shuffle_buffer_is_for_streams(files, tmp_path, monkeypatch):
    (tmp_path / "listed.py").write_text("def made(path):\n    return ['a', 'b']\n")
    monkeypatch.chdir(tmp_path)
    changes = {"data_datasets_type": "listed:made", "data_shuffle_buffer": 4}
    result = call(train.main, words(settings(files, tmp_path / "run", **changes)))
    assert result.code == 1
    assert "and all of that is shuffled: leave it out" in result.err


@pytest.mark.parametrize("made", ["at_random", "from_the_front"])
def test_a_custom_dataset(made, files, tmp_path, monkeypatch):
    (tmp_path / f"mine_{made}.py").write_text(
        "import json\n"
        "class Lines:\n"
        "    def __init__(self, path):\n"
        "        self.lines = open(path).read().splitlines()\n"
        "    def __iter__(self):\n"
        "        return map(json.loads, self.lines)\n"
        "class Indexed(Lines):\n"
        "    def __len__(self):\n"
        "        return len(self.lines)\n"
        "    def __getitem__(self, i):\n"
        "        return json.loads(self.lines[i])\n"
        "at_random, from_the_front = Indexed, Lines\n"
        "def nothing(path):\n"
        "    return iter([])\n"
    )
    monkeypatch.chdir(tmp_path)
    name = f"mine_{made}:{made}"
    chosen = settings(files, tmp_path / "run", data_datasets_type=name)
    assert len(losses_of(chosen, tmp_path / "run")) == 6
    for wrong, message in (
        (f"mine_{made}:nothing", "it must return what has __len__ and __getitem__"),
        (f"mine_{made}:none", "has no attribute 'none'"),
        ("nowhere:none", "No module named 'nowhere'"),
    ):
        chosen = settings(files, tmp_path / "none", data_datasets_type=wrong)
        result = call(train.main, words(chosen))
        assert result.code == 1
        assert message in result.err
        assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_bad_records_are_skipped_and_told(files, tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = files.text.read_bytes().splitlines(keepends=True)
    lines[100:100] = [b"{]\n", b'{"other": 1}\n', b'{"content_split": "\xff"}\n']
    path.write_bytes(b"".join(lines))
    common = {"data_train_path": path, "data_train_size": 400 * 64, "train_max_steps": 300}
    common |= {"data_datasets_type": "iterable", "data_shuffle_buffer": 8}
    chosen = settings(files, tmp_path / "stop", **common)
    result = call(train.main, words(chosen))
    assert result.code == 1
    assert "bad.jsonl, line" in result.err
    done = max(losses(tmp_path / "stop"))
    assert saved_steps(tmp_path / "stop") == [done]  # and goes on from there
    common["train_load_checkpoint_path"] = tmp_path / "stop"
    chosen = settings(files, tmp_path / "skip", **common, data_bad_records="skip")
    chosen["data.train_size"] = (done + 160) * 64
    result = succeeded(call(train.main, words(chosen)))
    assert "skipped (data.bad_records): " in result.out
    rows = [row for row in read_metrics(tmp_path / "skip/metrics.jsonl") if "loss" in row]
    assert rows[-1]["skipped_records"] >= 3


def test_an_evaluation_compiles_once(files, tmp_path, without_inductor):
    """Of another size each time it would not: the last batch is filled up."""
    import torch._dynamo

    chosen = settings(
        files,
        tmp_path / "run",
        data_eval_path=files.held_out,
        train_eval_steps=2,
        train_enable_manual_eager=False,
        train_enable_gradient_checkpointing=False,
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = []
    held_out_loss = train.held_out_loss

    def counted(*args):
        loss = held_out_loss(*args)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return loss

    train.held_out_loss = counted
    try:
        succeeded(call(train.main, words(chosen)))
    finally:
        train.held_out_loss = held_out_loss
    assert len(seen) == 4
    assert seen[1] == seen[2] == seen[3]  # the first compiled evaluation, the second the step


def test_the_tokenizers_template_is_not_written_twice(files, chats, tmp_path):
    changes = {**CHAT, "data_chat_template": "tokenizer"}
    chosen = settings(files, tmp_path / "run", data_train_path=chats, **changes)
    succeeded(call(train.main, words(chosen)))
    ours = json.loads((tmp_path / "run/hf/tokenizer_config.json").read_text())
    end = AutoTokenizer.from_pretrained(TOKENIZER).convert_tokens_to_ids("<|im_end|>")
    for name in ("config.json", "generation_config.json"):  # so that generation stops there
        assert json.loads((tmp_path / "run/hf" / name).read_text())["eos_token_id"] == [0, end]
    assert ours == json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    assert not (tmp_path / "run/hf/chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold `sources:`, a list of"),
        ("sources: [{path: x.jsonl, weight: 0}]\n", "source 1: .*greater than 0"),
        ("sources: [{path: x.jsonl}]\n", "source 1: .*weight"),
        ("sources: [{path: x.jsonl, weight: 1, wieght: 2}]\n", "source 1: .*wieght"),
        ("sources: [{path: x.jsonl, weight: 1}, {path: x.jsonl, weight: 1}]\n", "two sources"),
        ("sources: [{path: none.jsonl, weight: 1}]\n", r"source none\.jsonl: nothing matches"),
        ("sources: [\n", "is not YAML"),
    ],
)
def test_a_list_of_sources_that_is_wrong(text, message, files, tmp_path):
    write_documents(tmp_path / "x.jsonl", ["x"])
    (tmp_path / "mix.yaml").write_text(text)
    chosen = settings(files, tmp_path / "run", data_train_path=tmp_path / "mix.yaml")
    result = call(train.main, words(chosen))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert re.search(message, result.err), result.err


def test_all_records_skipped_says_so(files, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{]\n[]\n")
    for changes in ({}, {"train_rmpad_with_pos_ids": False}):
        chosen = settings(
            files,
            tmp_path / "run",
            data_train_path=tmp_path / "bad.jsonl",
            data_bad_records="skip",
            **changes,
        )
        result = call(train.main, words(chosen))
        assert result.code == 1
        assert "no sample gave a single token" in result.err
        assert "bad.jsonl, line 1: not JSON" in result.out

"""bin/sample against transformers, and with itself: batched, seeded, streamed, in conversation."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from omnistep.bin import sample
from tests.bin.runs import call, process, succeeded, words

PROMPTS = ["HAMLET. To be,", "O", "The king doth wake to-night, and takes his rouse. " * 3, "Who?"]


def speak(model, **changes):
    chosen = {"model_path": model, "max_tokens": 12, "compile": False, "do_sample": False} | changes
    argv = words({f"infer.{name}": value for name, value in chosen.items()})
    return succeeded(call(sample.main, argv)).out


def answers(model, prompts, **changes):
    lines = speak(model, prompt_file=prompts, **changes).removesuffix("\n").split("\n")
    rows = [json.loads(line) for line in lines]
    return {row["prompt"]: row["answer"] for row in rows}


@pytest.fixture(scope="module")
def model(trained):
    return trained / "hf"


@pytest.fixture(scope="module")
def theirs(model):
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [PROMPTS[0], *({"prompt": text, "id": 1} for text in PROMPTS[1:])]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


def expected(theirs, prompt, tokens=12, **inputs):
    network, tokenizer = theirs
    ids = tokenizer(prompt, return_tensors="pt", **inputs)["input_ids"]
    with torch.no_grad():
        out = network.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return out.tolist(), tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(prompt, model, theirs):
    ids, text = expected(theirs, prompt)
    assert len(ids) == 12
    assert speak(model, prompt=prompt) == text + "\n"


def test_greedy_tokens_are_those_of_transformers(model, theirs, monkeypatch):
    """What is drawn, before it becomes text; the prompts of a batch have unequal lengths."""
    drawn = []
    steps = sample.Speaker._steps

    def recorded(self, *arguments):
        for tokens in steps(self, *arguments):
            drawn.append(tokens)
            yield tokens

    monkeypatch.setattr(sample.Speaker, "_steps", recorded)
    for prompt in PROMPTS:
        drawn.clear()
        speak(model, prompt=prompt, max_tokens=20)
        assert [token for (token,) in drawn] == expected(theirs, prompt, 20)[0]


@pytest.mark.slow
def test_compiled_greedy_text_is_the_same_in_a_process(model, theirs):
    chosen = {"model_path": model, "max_tokens": 3, "do_sample": False, "prompt": PROMPTS[0]}
    result = succeeded(process("sample", words({f"infer.{k}": v for k, v in chosen.items()})))
    assert result.out == expected(theirs, PROMPTS[0], 3)[1] + "\n"
    assert result.err == ""


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_answers_as_one_by_one(do_sample, model, prompts, theirs):
    by_size = [
        answers(model, prompts, batch_size=size, do_sample=do_sample, top_p=0.9, temperature=1.5)
        for size in (1, 3, 8)
    ]
    assert by_size[0] == by_size[1] == by_size[2]
    assert list(by_size[0]) == PROMPTS
    if not do_sample:
        assert by_size[0] == {prompt: expected(theirs, prompt)[1] for prompt in PROMPTS}


def test_prompts_are_the_lines_of_a_text_file(model, tmp_path, theirs):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWho?\r\n\n  \nO\u2028O\x0cO\n".encode())
    found = answers(model, path)
    assert list(found) == ["Who?", "O\u2028O\x0cO"]
    assert found["Who?"] == expected(theirs, "Who?")[1]


def test_a_json_line_may_hold_any_character(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps("O\u2028O\x85", ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(answers(model, path)) == ["O\u2028O\x85"]


def test_the_seed_decides_what_is_drawn(model):
    def draw(seed):
        return speak(model, prompt="O", do_sample=True, temperature=2.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert speak(model, prompt="O", do_sample=True, top_p=1e-6) == speak(model, prompt="O")


def test_an_empty_prompt_begins_a_document(model, theirs):
    assert speak(model, prompt="") == expected(theirs, "<|endoftext|>")[1] + "\n"


def test_an_answer_ends_with_the_end_of_text(model, theirs, tmp_path):
    """With the end of text as the likeliest token nothing is said; streamed or not."""
    own, first = tmp_path / "hf", expected(theirs, "O")[0][0]
    shutil.copytree(model, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"eos_token_id": [4095, first]}))
    (tmp_path / "p.txt").write_text("O\n")
    assert speak(own, prompt="O") == "\n"
    assert answers(own, tmp_path / "p.txt") == {"O": ""}


# ---- conversation


def chat_text(theirs, messages):
    return theirs[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_prompt_in_the_chat_template(model, theirs):
    text = chat_text(theirs, [{"role": "user", "content": "Who?"}])
    assert text.startswith("<|im_start|>user\nWho?<|im_end|>")
    found = speak(model, prompt="Who?", chat=True)
    assert found == expected(theirs, text, add_special_tokens=False)[1] + "\n"


def test_an_interactive_session(model, theirs, tmp_path, plain_server):
    stdin = tmp_path / "stdin"
    stdin.write_text("Who?\nAnd you?\nclear\nWho?\nexit\nnot read\n")
    chosen = {"model_path": model, "max_tokens": 6, "do_sample": False, "compile": False}
    result = plain_server.run(
        "sample", words({f"infer.{k}": v for k, v in chosen.items()}), stdin=stdin
    )
    succeeded(result)
    assert result.err == ""
    first = {"role": "user", "content": "Who?"}
    answer = expected(theirs, chat_text(theirs, [first]), 6, add_special_tokens=False)[1]
    turns = [first, {"role": "assistant", "content": answer}, first | {"content": "And you?"}]
    second = expected(theirs, chat_text(theirs, turns), 6, add_special_tokens=False)[1]
    said = result.out.split("\n", 1)
    assert "clear" in said[0]
    assert said[1] == f"> {answer}\n> {second}\n> > {answer}\n> "


def test_a_session_without_a_template_continues_text(model, theirs, tmp_path, plain_server):
    own = without_template(model, tmp_path)
    stdin = tmp_path / "stdin"
    stdin.write_text("O\n")
    chosen = {"model_path": own, "max_tokens": 6, "do_sample": False, "compile": False}
    result = plain_server.run(
        "sample", words({f"infer.{k}": v for k, v in chosen.items()}), stdin=stdin
    )
    assert expected(theirs, "O", 6)[1] in succeeded(result).out


# ---- what may be wrong


def without_template(model, tmp_path):
    own = tmp_path / "plain"
    shutil.copytree(model, own)
    config = json.loads((own / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "chat_template.jinja").unlink(missing_ok=True)
    return own


def refused(model, code=1, **changes):
    chosen = {"model_path": model, "compile": False} | changes
    result = call(sample.main, words({f"infer.{name}": value for name, value in chosen.items()}))
    assert result.code == code
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


def test_what_is_not_there_is_named(model, tmp_path):
    assert "infer.model_path: there is no directory" in refused(tmp_path / "nowhere", prompt="O")
    assert "no model configuration" in refused(tmp_path, prompt="O")
    missing = refused(model, prompt_file=tmp_path / "nowhere.txt")
    assert "infer.prompt_file: there is no file" in missing
    assert "no tokenizer at" in refused(model, prompt="O", tokenizer_path=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.jsonl", b"", "holds no prompt"),
        ("p.jsonl", b'"a"\n{"text": "b"}\n', r'line 2: a prompt is a string, or .*"prompt"'),
        ("p.jsonl", b'"a"\n\n{"prompt": \n', "line 3: not JSON"),
        ("p.txt", b"\xe7a va\n", "not UTF-8"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read(name, content, expected, model, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert re.search(expected, refused(model, prompt_file=tmp_path / name))


def test_a_chat_needs_a_template(model, tmp_path):
    message = refused(without_template(model, tmp_path), prompt="O", chat=True)
    assert "has no chat template" in message


def test_weights_that_are_damaged(model, tmp_path):
    own = tmp_path / "hf"
    shutil.copytree(model, own)
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "can't be used" in refused(own, prompt="O")


def test_arguments_that_are_wrong(model):
    assert "did you mean infer.top_p?" in refused(model, 2, topp=0.5)
    assert "infer.temperature" in refused(model, 2, temperature=0)
    assert "set one of them" in refused(model, 2, prompt="O", prompt_file="p.txt")

"""bin/sample asked about images, against transformers: with a prompt, from a file, in a chat."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from omnistep.bin import sample
from omnistep.bin.ask import Ask, Question
from omnistep.bin.model import read_model
from omnistep.core.config import ModelArguments
from omnistep.data.tokenizer import load_tokenizer
from tests.bin.runs import call, succeeded, words
from tests.bin.small_vlm import PLACE, TOKENIZER, chat, inputs_of, load_theirs, save_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(model):
    return load_theirs(model)


def expected(theirs, model, text: str, images=(), tokens=8) -> str:
    """`text` has PLACE for each image."""
    inputs = inputs_of(text, [Image.open(model / name).convert("RGB") for name in images])
    out = theirs.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return TOKENIZER.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def options(model, **changes):
    chosen = {"model_path": model, "max_tokens": 8, "compile": False, "do_sample": False} | changes
    return words({f"infer.{name}": value for name, value in chosen.items()})


def test_an_image_stands_in_front_of_a_prompt_or_where_it_says(model, theirs):
    def speak(**changes):
        return succeeded(call(sample.main, options(model, **changes))).out

    a, both = model / "a.png", f"{model / 'a.png'},{model / 'b.png'}"
    assert (
        speak(prompt="What?", image=a) == expected(theirs, model, f"{PLACE}What?", ["a.png"]) + "\n"
    )
    found = speak(prompt="Is <image> like <image>?", image=both, chat=True)
    text = chat(f"Is {PLACE} like {PLACE}?")
    assert found == expected(theirs, model, text, ["a.png", "b.png"]) + "\n"
    assert found != speak(prompt="Is <image> like <image>?", image=f"{a},{a}", chat=True)


def test_a_file_asks_about_none_one_and_two_images(model, theirs, tmp_path):
    inline = base64.b64encode((model / "b.png").read_bytes()).decode()
    (tmp_path / "a.png").write_bytes((model / "a.png").read_bytes())
    rows = [
        "What?",
        {"prompt": "<image>What?", "images": ["a.png"]},
        {"prompt": "Or?<image>", "images": ["a.png", f"data:image/png;base64,{inline}"]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = succeeded(call(sample.main, options(model, prompt_file=path, chat=True))).out
    found = [json.loads(line) for line in lines.splitlines()]
    assert [row["prompt"] for row in found] == ["What?", "<image>What?", "Or?<image>"]
    assert [row["answer"] for row in found] == [
        expected(theirs, model, chat("What?")),
        expected(theirs, model, chat(f"{PLACE}What?"), ["a.png"]),
        expected(theirs, model, chat(f"{PLACE}Or?{PLACE}"), ["a.png", "b.png"]),
    ]


def test_a_chat_is_shown_images_and_loses_nothing_by_a_bad_one(model, theirs, monkeypatch, capsys):
    lines = iter(
        [
            f"image {model / 'a.png'}",
            "What?",
            f"image {model / 'nowhere.png'}",
            f"image {model / 'config.json'}",
            "And now?",
            "clear",
            "What?",
            "exit",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert sample.main(options(model)) == 0
    greeting, first, missing, broken, second, third, *rest = capsys.readouterr().out.split("\n")
    assert "image PATH" in greeting
    answer = expected(theirs, model, chat(f"{PLACE}What?"), ["a.png"])
    assert first == answer
    assert missing.startswith("error: ")
    assert "nowhere.png" in missing
    assert "can't be decoded" in broken
    text = chat(f"{PLACE}What?", answer, "And now?")
    assert second == expected(theirs, model, text, ["a.png"])
    assert third == expected(theirs, model, chat("What?"))
    assert rest == [""]


def test_images_that_can_not_be_shown(model, trained, tmp_path):
    def refused(directory, code=1, **changes):
        result = call(sample.main, options(directory, **changes))
        assert result.code == code
        assert result.err.startswith("error: ")
        return result.err

    assert "nowhere.png" in refused(model, prompt="What?", image=model / "nowhere.png")
    assert "the model takes none" in refused(trained / "hf", prompt="O", image=model / "a.png")
    assert "set that too" in refused(model, 2, image=model / "a.png")
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "images": ["nowhere.png"]}\n')
    message = refused(model, prompt_file=path)
    assert "line 2: there is no image" in message
    path.write_text('{"prompt": "b", "images": "nowhere.png"}\n')
    assert '"images" must be a list' in refused(model, prompt_file=path)
    more = refused(model, prompt="<image><image>?", image=model / "a.png")
    assert "more places for images" in more


def test_the_tokenizers_own_first_token_stands_before_text_and_images_alike(model):
    """As with transformers' processors; a rendered chat has what its template writes."""
    tokenizer = load_tokenizer(str(model))
    first = tokenizer.token_id("<|im_start|>")
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    rules = sample.rules_of(read_model(ModelArguments(config_path=str(model))))
    images, plain = (str(model / "a.png"),), Ask(tokenizer, rules, None)
    for question in (Question("What?"), Question("What?", images)):
        ids = list(plain.once(question).ids)
        assert ids[0] == first
        assert first not in ids[1:]
    prompt = plain.once(Question("What?", images))
    assert prompt.patches is not None
    assert prompt.patches.units.shape == (1, len(prompt.ids))
    chat = Ask(tokenizer, rules, sample.chat_template(tokenizer, rules))
    assert list(chat.once(Question("What?", images)).ids)[:2] != [first, first]

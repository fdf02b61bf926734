"""bin/sample asked about images, against transformers: with a prompt, from a file, in a chat."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import omnistep.data.make_emoji as make_emoji
from omnistep.bin import sample
from tests.bin.runs import call, succeeded, words

EMOJI = Path(make_emoji.__file__).parent / "emoji"
IMAGE, VIDEO, START, END = (make_emoji.SPECIALS.index(f"<|{n}|>") for n in (
    "image_pad", "video_pad", "vision_start", "vision_end"
))  # fmt: skip
SIZE = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Qwen2-VL for small images, as transformers saves it, with the emoji's tokenizer."""
    text = {
        "vocab_size": make_emoji.VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    folder = tmp_path_factory.mktemp("vlm")
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(EMOJI / "tokenizer")).save_pretrained(folder)
    processor().save_pretrained(folder)
    for name, size in (("a.png", (24, 16)), ("b.png", (100, 60))):
        Image.fromarray(pixels(size)).save(folder / name)
    return folder


def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size=SIZE, patch_size=4, image_mean=[0.5] * 3, image_std=[0.2] * 3
    )


def pixels(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def theirs(model):
    return Qwen2VLForConditionalGeneration.from_pretrained(model).eval()


TOKENIZER = AutoTokenizer.from_pretrained(str(EMOJI / "tokenizer"))
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def expected(theirs, model, text: str, images=(), tokens=8) -> str:
    """`text` has PLACE for each image."""
    inputs = {}
    if images:
        made = processor()(
            images=[Image.open(model / name).convert("RGB") for name in images],
            return_tensors="pt",
        )
        inputs = dict(made)
        for grid in made["image_grid_thw"]:
            pads = "<|image_pad|>" * int(grid.prod() // 4)
            text = text.replace(
                PLACE, f"<|vision_start|>{pads}<|vision_end|>".replace("pad", "PAD"), 1
            )
        text = text.replace("PAD", "pad")
    ids = TOKENIZER(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    out = theirs.generate(input_ids=ids, **inputs, max_new_tokens=tokens, do_sample=False)
    return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def options(model, **changes):
    chosen = {"model_path": model, "max_tokens": 8, "compile": False, "do_sample": False} | changes
    return words({f"infer.{name}": value for name, value in chosen.items()})


def chat(*turns: str) -> str:
    roles = ("user", "assistant")
    said = [f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)]
    return "".join(said) + "<|im_start|>assistant\n"


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
    assert "line 2" in message
    assert "nowhere.png" in message
    path.write_text('{"prompt": "b", "images": "nowhere.png"}\n')
    assert '"images" must be a list' in refused(model, prompt_file=path)
    more = refused(model, prompt="<image><image>?", image=model / "a.png")
    assert "more places for images" in more

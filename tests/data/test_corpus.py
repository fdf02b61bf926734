"""The embedded corpus and its tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

import omnistep.data.make_corpus as make_corpus
from omnistep.data.tokenizer import load_tokenizer

SHAKESPEARE = Path(make_corpus.__file__).parent / "shakespeare"


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {
        name: (SHAKESPEARE / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("train", "heldout")
    }


def test_sizes_and_content(texts):
    assert 1_900_000 < len(texts["train"]) < 2_200_000
    assert 150_000 < len(texts["heldout"]) < 220_000
    assert "To be, or not to be,--that is the question" in texts["train"]
    assert "Out, damned spot" in texts["heldout"]
    for text in texts.values():
        assert text.isascii()
        assert "gutenberg" not in text.lower()
        assert "\r" not in text
        assert "\n\n\n" not in text
    assert "CC-BY-2.5" in (SHAKESPEARE / "README.md").read_text(encoding="utf-8")


def test_nothing_held_out_is_trained_on(texts):
    lines = {name: text.split("\n") for name, text in texts.items()}
    long = {name: {line for line in of if len(line) > 30} for name, of in lines.items()}
    # Single lines that every play has ("[Exeunt all but …]") may coincide, passages may not.
    assert len(long["train"] & long["heldout"]) / len(long["heldout"]) < 0.002
    runs = {
        name: {tuple(of[i : i + 4]) for i in range(len(of)) if sum(map(len, of[i : i + 4])) > 60}
        for name, of in lines.items()
    }
    assert not runs["train"] & runs["heldout"]


def test_tokenizer_facts_and_round_trip(texts):
    tokenizer = load_tokenizer(SHAKESPEARE / "tokenizer")
    assert tokenizer.vocab_size == 4096
    assert [tokenizer.token_id(token) for token in make_corpus.SPECIALS] == [0, 1, 2, 3, 4]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 3)
    ids = tokenizer.encode(texts["heldout"])
    assert tokenizer.decode(ids) == texts["heldout"]
    assert 2.5 < len(texts["heldout"]) / len(ids) < 3.5
    for odd in ("naïve — 東京 🙂\t\r\n", "", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


def test_transformers_reads_the_same_tokenizer(texts):
    from transformers import AutoTokenizer

    ours = load_tokenizer(SHAKESPEARE / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(str(SHAKESPEARE / "tokenizer"))
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (4096, 0, 3)
    rng = np.random.default_rng(0)
    samples = [texts["train"][i : i + 400] for i in rng.integers(0, 2_000_000, 30)]
    for text in [*samples, "naïve — 東京 🙂", "<|im_start|>user\nHo!<|im_end|>\n", "a<|image|> b"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.chat_template == theirs.chat_template
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_tokenizer_is_made_from_the_training_text_alone(texts):
    """Trained anew on train.txt it is the committed one."""
    committed = json.loads((SHAKESPEARE / "tokenizer" / "tokenizer.json").read_text())
    assert json.loads(make_corpus.make_tokenizer(texts["train"]).to_str()) == committed


def test_boilerplate_is_cut():
    raw = (
        "Project Gutenberg's\r\n*** START OF THIS BOOK ***\r\n"
        "HAMLET  \r\n\r\n\r\n\r\nAct I\r\nProduced for an etext\r\n*** END OF THIS BOOK ***\r\nlaw"
    )
    assert make_corpus.clean_play(raw) == "HAMLET\n\nAct I\n"

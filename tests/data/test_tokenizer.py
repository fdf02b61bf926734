"""Reading tokenizer directories: where EOS may stand, and the errors."""

import json
import pickle

import pytest
import tokenizers

from omnistep.data.errors import DataError
from omnistep.data.tokenizer import load_tokenizer


@pytest.fixture
def directory(tmp_path):
    vocab = {"a": 0, "b": 1, "<e>": 2, "<p>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    backend.add_special_tokens(["<late>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, name, content):
    (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content", "eos", "pad"),
    [
        ("tokenizer_config.json", {"eos_token": "<e>", "pad_token": "<p>"}, 2, 3),
        ("tokenizer_config.json", {"eos_token": {"content": "<e>", "lstrip": False}}, 2, None),
        ("special_tokens_map.json", {"eos_token": "<late>", "pad_token": None}, 4, None),
        ("generation_config.json", {"eos_token_id": [2, 4], "pad_token_id": 3}, 2, 3),
        ("config.json", {"eos_token_id": 2}, 2, None),
    ],
)
def test_eos_and_pad(directory, name, content, eos, pad):
    write(directory, name, content)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (eos, pad, 5)
    same = load_tokenizer(directory / "tokenizer.json")
    assert same.eos_id == eos


def test_the_tokenizers_own_config_wins(directory):
    write(directory, "config.json", {"eos_token_id": 3})
    write(directory, "tokenizer_config.json", {"eos_token": "<e>"})
    assert load_tokenizer(directory).eos_id == 2


def test_chat_template(directory):
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    write(directory, "tokenizer_config.json", {"eos_token": "<e>", "chat_template": named})
    assert load_tokenizer(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("J")
    assert load_tokenizer(directory).chat_template == "J"


def test_it_pickles(directory):
    write(directory, "tokenizer_config.json", {"eos_token": "<e>"})
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(directory)))
    assert tokenizer.encode("b") == [1]


def test_errors(directory, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*looked for .*none/?.*tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"names no EOS token: looked for .*tokenizer_config\.json"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(directory)

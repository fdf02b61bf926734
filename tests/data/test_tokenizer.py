"""Reading tokenizer directories: where EOS may stand, and the errors."""

import json
import pickle

import pytest
import tokenizers
from transformers import AutoTokenizer

from omnistep.data.errors import DataError
from omnistep.data.tokenizer import load_tokenizer
from tests.bin.runs import TOKENIZER


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": [{"template": "T"}]}, "must be a text, or a list of objects with name"),
        ({"chat_template": ["T"]}, "must be a text, or a list of objects with name"),
        ({"chat_template": 3}, "must be a text, or a list of objects with name"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder is no id"),
    ],
)
def test_a_config_that_is_odd(directory, config, message):
    write(directory, "tokenizer_config.json", {"eos_token": "<e>", **config})
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: .*{message}"):
        load_tokenizer(directory)


def test_files_that_are_no_text_or_too_deep(directory):
    (directory / "tokenizer_config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(directory)
    write(directory, "tokenizer_config.json", {"eos_token": "<e>"})
    (directory / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(directory)


@pytest.fixture
def shakespeare(tmp_path):
    """The files of a real tokenizer, to be changed."""
    backend = json.loads((TOKENIZER / "tokenizer.json").read_text())
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())

    def load(**changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(backend | changes))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    load.config, load.place = config, tmp_path
    return load


TEXT = "Tell me about the sea, please, in a few words that I can keep. <|call|> <think> <new>"


def test_a_stored_truncation_or_padding_is_not_applied(shakespeare):
    plain = shakespeare().encode(TEXT)
    short = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    strategy = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding = {**strategy, "pad_id": 3, "pad_type_id": 0, "pad_token": "<|pad|>"}
    assert shakespeare(truncation=short).encode(TEXT) == plain
    assert shakespeare(padding=padding).encode(TEXT) == plain
    assert shakespeare(padding=padding).encode("yes") == shakespeare().encode("yes")


def token(text, **more):
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True, **more}


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"4097": token("<think>"), "4096": token("<|call|>")}},
        {"added_tokens_decoder": {"4096": token("<new>", special=False, lstrip=True)}},
        {"extra_special_tokens": ["<new>", "<|call|>"]},
        {"additional_special_tokens": ["<think>"], "sep_token": "<new>"},
        {"extra_special_tokens": {"call_token": "<|call|>"}},
        {"mask_token": token("<new>", lstrip=True, __type="AddedToken")},
        {"call_token": "<new>"},
    ],
    ids=str,
)
def test_tokens_that_only_the_config_names(config, shakespeare):
    """One id each, as for AutoTokenizer."""
    shakespeare.config.update(config)
    ours = shakespeare()
    theirs = AutoTokenizer.from_pretrained(shakespeare.place)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert len(ours.encode(TEXT)) < len(load_tokenizer(TOKENIZER).encode(TEXT))
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert set(ours.special_tokens) >= set(theirs.all_special_tokens) - {None}


def test_older_files_name_tokens_too(shakespeare):
    (shakespeare.place / "added_tokens.json").write_text(json.dumps({"<new>": 4096}))
    shakespeare.config.pop("added_tokens_decoder", None)
    assert shakespeare().token_id("<new>") == 4096


def test_a_regex_that_gives_up_is_an_error(shakespeare):
    """It panics in Rust, and that is no Exception."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    blows_up = {**split, "pattern": {"Regex": "(a|a|aa)+(?=b)(?<=c)x|(a*)*c"}}
    tokenizer = shakespeare(pre_tokenizer=blows_up)
    with pytest.raises(DataError, match=r"fails on a text of 5,000 characters"):
        tokenizer.encode("a" * 5000)

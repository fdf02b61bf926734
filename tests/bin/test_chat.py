"""data/chat.py writes what transformers' apply_chat_template writes."""

import json
import re

import pytest
from transformers import AutoTokenizer

from omnistep.data.chat import render, special_tokens
from omnistep.data.errors import DataError
from tests.bin.runs import TOKENIZER

CHATML = """\
{% if messages[0]['role'] != 'system' %}
    {{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- set found = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if not loop.first %}{{ raise_exception('the system speaks first') }}{% endif %}
        {%- set found.system = message['content'] | trim %}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 <= 1 and found.system %}
        {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + found.system + '<|eot_id|>' }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is defined and tools %}{{ tools | tojson }}{% endif %}
{%- if messages[-1].extra is defined %}{{ messages[-1].extra | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "Who's there?"}],
    [
        {"role": "system", "content": '  Speak in <verse> & "quotes".  '},
        {"role": "user", "content": "Who's there?\nSpeak!"},
        {"role": "assistant", "content": "Nay, answer me: stand, and unfold yourself. é 🦉"},
        {"role": "user", "content": "Long live the king!", "extra": {"é": ["<b>", 1, None]}},
    ],
]


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one turn", "several"])
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("template", ["own", "chatml", "llama3"])
def test_the_text_is_that_of_transformers(template, generation_prompt, conversation, theirs):
    text = {"own": theirs.chat_template, "chatml": CHATML, "llama3": LLAMA3}[template]
    expected = theirs.apply_chat_template(
        conversation,
        chat_template=text,
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    assert expected.count("Who's there?") == 1
    ours = render(
        text,
        conversation,
        add_generation_prompt=generation_prompt,
        special_tokens=special_tokens(TOKENIZER),
    )
    assert ours == expected


def test_special_tokens_are_those_of_transformers(theirs, tmp_path):
    """With a BOS, texts and AddedTokens, as a Llama's tokenizer has them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TOKENIZER / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    bos = {"__type": "AddedToken", "content": "<|im_start|>", "special": True, "lstrip": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos}))
    other = AutoTokenizer.from_pretrained(tmp_path)
    ours = special_tokens(tmp_path)
    assert ours["bos_token"] == "<|im_start|>"
    for tokenizer, found in ((other, ours), (theirs, special_tokens(TOKENIZER))):
        named = tokenizer.special_tokens_map.items()
        assert found == {name: token for name, token in named if isinstance(token, str)}
    text = render(LLAMA3, CONVERSATIONS[1], add_generation_prompt=True, special_tokens=ours)
    assert text.startswith("<|im_start|><|start_header_id|>system")
    assert text == other.apply_chat_template(
        CONVERSATIONS[1], chat_template=LLAMA3, tokenize=False, add_generation_prompt=True
    )


def test_a_template_that_refuses_is_an_error_with_its_reason():
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(DataError, match="the system speaks first"):
        render(LLAMA3, messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for %}", "chat template"),
        ("{{ messages[0]['content'] + 1 }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
    ],
)
def test_a_template_that_is_wrong_is_a_data_error(template, expected):
    with pytest.raises(DataError, match=expected):
        render(template, CONVERSATIONS[0], add_generation_prompt=False)


def test_json_and_the_date_as_templates_ask_for_them():
    template = "{{ messages[0] | tojson }} {{ strftime_now('%Y') }}"
    text = render(template, [{"role": "é<", "content": "x"}], add_generation_prompt=False)
    written, year = text.rsplit(" ", 1)
    assert json.loads(written) == {"role": "é<", "content": "x"}
    assert "é<" in written
    assert re.fullmatch(r"20\d\d", year)

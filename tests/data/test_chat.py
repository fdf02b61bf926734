"""Conversations: the text and the parts to learn are those of transformers' apply_chat_template."""

import json
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from omnistep.data.chat import Template, builtin_templates, open_template, special_tokens
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Conversation
from omnistep.data.turns import learnt
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
    ours = Template("", text, special_tokens(TOKENIZER)).render(
        conversation, add_generation_prompt=generation_prompt
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
    text = Template("", LLAMA3, ours).render(CONVERSATIONS[1], add_generation_prompt=True)
    assert text.startswith("<|im_start|><|start_header_id|>system")
    assert text == other.apply_chat_template(
        CONVERSATIONS[1], chat_template=LLAMA3, tokenize=False, add_generation_prompt=True
    )


def test_a_template_that_refuses_is_an_error_with_its_reason():
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(DataError, match="the system speaks first"):
        Template("", LLAMA3).render(messages)


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
        Template("", template).render(CONVERSATIONS[0])


def test_json_and_the_date_as_templates_ask_for_them():
    template = "{{ messages[0] | tojson }} {{ strftime_now('%Y') }}"
    text = Template("", template).render([{"role": "é<", "content": "x"}])
    written, year = text.rsplit(" ", 1)
    assert json.loads(written) == {"role": "é<", "content": "x"}
    assert "é<" in written
    assert re.fullmatch(r"20\d\d", year)


# ---- what is learnt ------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Speak in verse."},
    {"role": "user", "content": "  Who's there? <|im_start|>assistant\n"},
    {"role": "assistant", "content": "Nay, answer me: é 🦉"},
    {"role": "user", "content": "Long live the king!"},
    {"role": "assistant", "content": " Bernardo? \n"},
    {"role": "user", "content": "He."},
]
QWEN3_LIKE = """\
{%- set last = namespace(at=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}
{%- endfor %}
{%- for tool in tools or [] %}{{- tool | tojson + '\\n' }}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {{- '<|im_start|>' + (message.role if message.role != 'tool' else 'user') + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > last.at %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {%- endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Of the shapes that Qwen3's template has: it strips thoughts, and adds some to the last turn."""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def words(template, messages, tools=None):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    made = Template("x", template, special, ends=tuple(special.values()))
    text, spans = learnt(made, messages, tools)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("name", builtin_templates())
def test_labels_are_those_of_transformers(name, theirs, tokenizer, monkeypatch):
    """Token by token, for each built-in template: theirs from `{% generation %}`."""
    monkeypatch.setattr("omnistep.data.chat._NEEDED_TOKENS", {})  # this tokenizer splits llama3's
    template = open_template(name, tokenizer)
    conversation = TALK[1:] if name == "llama2" else TALK
    expected = theirs.apply_chat_template(
        conversation,
        chat_template=template.jinja,
        return_dict=True,
        return_assistant_tokens_mask=True,
        bos_token=template.special_tokens.get("bos_token"),
    )
    transform = Conversation(tokenizer, 1000, template)
    (piece,) = transform(Record({"messages": conversation}, "here"))
    assert piece.ids.tolist() == expected["input_ids"]
    assert piece.learn is not None
    assert piece.learn.astype(int).tolist() == expected["assistant_masks"]
    said = tokenizer.decode(piece.ids[piece.learn])
    assert said.startswith((" Nay", "Nay"))
    assert "king" not in said
    assert piece.cut == 0


@pytest.mark.parametrize("template", [CHATML, LLAMA3, "tokenizer", QWEN3_LIKE])
def test_a_template_that_marks_nothing_gives_the_same(template, tokenizer):
    """As the same template would with `{% generation %}`: content and end of turn."""
    if template == "tokenizer":
        template = tokenizer.chat_template
    end = "<|eot_id|>" if template is LLAMA3 else "<|im_end|>"
    strips = template in (CHATML, LLAMA3)
    second = f"Bernardo?{end}" if strips else f" Bernardo? \n{end}"
    assert words(template, TALK) == [f"Nay, answer me: é 🦉{end}", second]


def test_thoughts_and_tools():
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "door"}}}]
    talk = [
        {"role": "user", "content": "Hark"},
        {"role": "assistant", "content": "<think>a noise</think>\n\nWho's there?"},
        {"role": "user", "content": "Me"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "a friend"},
        {"role": "assistant", "content": "Welcome."},
    ]
    end, think = "<|im_end|>", "<think>\n\n</think>\n\n"
    call = '<tool_call>{"name": "look", "arguments": {"at": "door"}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "look"}}]
    wanted = [f"Who's there?{end}", f"{think}{call}{end}", f"{think}Welcome.{end}"]
    assert words(QWEN3_LIKE, talk, tools) == wanted


@pytest.mark.parametrize("template", ["default", "tokenizer"])
def test_loss_mask_overrides(template, tokenizer):
    talk: list[dict[str, Any]] = [dict(message) for message in TALK]
    talk[2]["loss_mask"], talk[3]["loss_mask"], talk[4]["loss_mask"] = 0, 1, 1
    text, spans = learnt(open_template(template, tokenizer), talk)
    king, bernardo = (text[start:stop] for start, stop in spans)
    assert king == "Long live the king!"
    assert bernardo.strip().startswith("Bernardo?")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        # what the template leaves of a content, or makes of it, is what the model would say
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", ["Na", " B"]),
        (
            "{% for m in messages %}{{ m.content.strip() * 2 }}|{% endfor %}",
            ["Nay, answer me: é 🦉Nay, answer me: é 🦉|", "Bernardo?Bernardo?|"],
        ),
        # the beginning depends on what follows
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content | trim }}$\n{% endfor %}",
            ["Nay, answer me: é 🦉$", "Bernardo?$"],
        ),
        # the end does
        (
            "{% for m in messages %}{{ m.role + m.content }}"
            "{{ '</s>' if loop.last and m.role == 'assistant' else '<s>' }}{% endfor %}"
            "{{ 'assistant' if add_generation_prompt }}",
            ["Nay, answer me: é 🦉<s>", " Bernardo? \n<s>"],
        ),
        ("{% generation %}{{ messages[2].content }}{% endgeneration %}", ["Nay, answer me: é 🦉"]),
    ],
)
def test_what_a_template_writes_is_learnt(template, wanted):
    assert words(template, TALK) == wanted


def test_what_is_said_and_changed_is_a_doubt():
    template = "{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(DataError, match="does not show what is said in message 3"):
        words(template, TALK)


def test_a_long_conversation_keeps_its_end(tokenizer):
    template = open_template("chatml", tokenizer)
    (whole,) = Conversation(tokenizer, 1000, template)(Record({"messages": TALK}, "here"))
    (piece,) = Conversation(tokenizer, 20, template)(Record({"messages": TALK}, "here"))
    assert whole.learn is not None
    assert piece.learn is not None
    end = int(whole.learn.nonzero()[0][-1]) + 1  # what follows the last turn teaches nothing
    assert end < len(whole.ids)
    assert piece.cut == end - 20
    assert piece.ids.tolist() == whole.ids[end - 20 : end].tolist()
    assert piece.learn.tolist() == whole.learn[end - 20 : end].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("some text", r"here: a record with the field 'messages' is expected"),
        ({"text": "x"}, r"here: none of the keys \['messages'\]"),
        ({"messages": "x"}, r"here: 'messages' must hold a list of messages, it holds a str"),
        ({"messages": []}, r"it holds an empty list"),
        ({"messages": ["x"]}, r"here, message 1: expected \{role, content\}, got 'x'"),
        (
            {"messages": [{"role": "user"}]},
            r"message 1: the content must be a text or parts, it is None",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, r"text or parts, it is 3"),
        ({"messages": [{"role": "user", "content": "x", "loss_mask": 2}]}, "0 or 1, got 2"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"nothing to learn.*\(roles: user\)"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "model takes none"),
        ({"messages": TALK, "images": ["a.png"]}, "here: it has images, but the model takes none"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "text, image or video"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["image"]}]}]},
            "text, image or video",
        ),
        (
            {"messages": [{**m, "loss_mask": 0} for m in TALK]},
            "nothing to learn: no message",
        ),
        ({"messages": TALK, "tools": [{"name": "f"}]}, "no place for tools"),
        ({"messages": TALK, "tools": {"name": "f"}}, "here: 'tools' must be a list of objects"),
        ({"messages": TALK, "tools": "[1]"}, "here: 'tools' must be a list of objects"),
        ({"messages": TALK, "tools": "[{]"}, "here: 'tools' must be a list of objects"),
        ({"messages": [{**TALK[2], "tool_calls": "f()"}]}, "tool_calls must be a list of objects"),
        ({"messages": [{**TALK[2], "tool_calls": [{"name": "f"}]}]}, "leaves out .* tool calls"),
        ({"messages": [TALK[1], {**TALK[2], "thinking": "so"}]}, "leaves out .* reasoning"),
    ],
)
def test_conversations_that_are_none(content, message, tokenizer):
    transform = Conversation(tokenizer, 100, open_template("default", tokenizer))
    with pytest.raises(DataError, match=message):
        transform(Record(content, "here"))


def test_templates_by_name(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no built-in template; these are chatml, default, janus"):
        open_template("chatlm", tokenizer)
    with pytest.raises(DataError, match=r"llama3 needs the tokens <\|start_header_id\|>"):
        open_template("llama3", tokenizer)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert open_template(str(file), tokenizer).render(CONVERSATIONS[0]) == "Who's there?"


def test_parts_of_text_are_one_text(tokenizer):
    parts = [{"type": "text", "text": "Nay, "}, {"type": "text", "text": "answer me."}]
    one, two = (
        Conversation(tokenizer, 100, open_template("chatml", tokenizer))(
            Record({"messages": [{"role": "assistant", "content": content}]}, "here")
        )[0]
        for content in ("Nay, answer me.", parts)
    )
    assert one.ids.tolist() == two.ids.tolist()


def test_what_a_table_has_no_value_for_is_not_given(tokenizer):
    """Its columns are there for every row, and in a list of messages for each of these."""
    transform = Conversation(tokenizer, 100, open_template("default", tokenizer))
    bare = [{"role": m["role"], "content": m["content"]} for m in TALK]
    empty = [{**m, "loss_mask": None, "tool_calls": None} for m in bare]
    (given,), (wanted,) = (transform(Record({"messages": m}, "here")) for m in (empty, bare))
    assert given.ids.tolist() == wanted.ids.tolist()
    assert given.learn is not None
    assert wanted.learn is not None
    assert given.learn.tolist() == wanted.learn.tolist()

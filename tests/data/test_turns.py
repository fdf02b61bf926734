"""What is learnt of a conversation, by templates of every shape that models have."""

import copy
import json
from typing import Any

import pytest

from omnistep.data.chat import Template, open_template
from omnistep.data.errors import DataError, NothingToLearn
from omnistep.data.files.records import Record
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Conversation
from omnistep.data.turns import learnt, turn_end
from tests.bin.runs import TOKENIZER
from tests.sweeps.templates import CONVERSATIONS, MASK, SAME, both

CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}BODY{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
SPLIT = CHATML.replace(
    "BODY",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %} "
    "{% generation %}{{ '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}",
)
"""A turn in two pieces."""
WITH_FEED = CHATML.replace(
    "BODY",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}",
)
CONTENT_ALONE = CHATML.replace(
    "BODY",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}",
)
THINKS = CHATML.replace(
    "BODY",
    "{% if m.reasoning_content is string and loop.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}",
)
TOOLED = """\
{%- if tools %}{{- 'Tools: ' + tools | tojson }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{{- m.content or '' }}
{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + c.function | tojson + '</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] ' + m.tool_calls | tojson + eos_token }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- else %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}
{%- endfor %}"""
HARMONY = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- elif m.tool_calls %}
        {{- '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'tool' %}{{- '<|start|>tool<|message|>' + m.content + '<|end|>' }}
    {%- else %}
        {%- if m.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
GLM = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|channel|>"),
    *("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
)
CALLS = CONVERSATIONS["several tool calls"]["messages"]
TOOLS = CONVERSATIONS["a tool call"]["tools"]
TWO_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Name three ports."},
    {"role": "assistant", "content": "Lisbon\nOslo\nGenoa"},
    {"role": "user", "content": "One more?"},
    {"role": "assistant", "content": "Rome"},
]


def words(jinja: str, messages: Any, tools: Any = None, **more: Any) -> list[str]:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    text, spans = learnt(Template("x", jinja, special, ends=SPECIAL, **more), messages, tools)
    return [text[start:stop] for start, stop in spans]


def test_a_turn_begins_where_generation_would():
    """Where the generation prompt is empty, at the end of the message before: with its blank."""
    assert words(MISTRAL, TWO_TURNS) == [" Lisbon\nOslo\nGenoa</s>", " Rome</s>"]
    first, answer, both_calls, last = words(MISTRAL, CALLS, TOOLS)
    assert first.startswith('[TOOL_CALLS] [{"id": "call00001"')
    assert first.endswith('{"city": "Lisbon"}}}]</s>')
    assert answer == " 21 degrees.</s>"
    assert both_calls.startswith('[TOOL_CALLS] [{"id": "call00002"')
    assert '"Oslo"' in both_calls
    assert both_calls.endswith('{"city": "Rome"}}}]</s>')
    assert last == " 4 and 18.</s>"


def test_the_last_turn_may_end_otherwise():
    """As gpt-oss': the last turn ends with another token, and shows its thoughts."""
    final = "<|channel|>final<|message|>"
    talk = [*TWO_TURNS[:3], {**TWO_TURNS[3], "thinking": "Italy."}]
    thoughts = "<|channel|>analysis<|message|>Italy.<|end|><|start|>assistant"
    assert words(HARMONY, talk) == [
        f"{final}Lisbon\nOslo\nGenoa<|end|>",
        f"{thoughts}{final}Rome<|return|>",
    ]
    called = ' to=get_weather<|message|>{"city": "Lisbon"}<|call|>'
    assert words(HARMONY, CALLS[:4]) == [called, f"{final}21 degrees.<|return|>"]


def test_what_opens_the_next_turn_may_end_one():
    assert words(GLM, TWO_TURNS) == ["Lisbon\nOslo\nGenoa<|user|>", "Rome"]


def test_thoughts_that_later_turns_take_out():
    talk = copy.deepcopy(TWO_TURNS)
    talk[1]["reasoning_content"], talk[3]["reasoning_content"] = "Ports.", "Italy."
    second = "<think>\nItaly.\n</think>\n\nRome<|im_end|>"
    assert words(THINKS, talk) == ["Lisbon\nOslo\nGenoa<|im_end|>", second]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_three_names(name, tmp_path):
    pair = both(THINKS, tmp_path)
    assert pair.outcome(CONVERSATIONS[name]).kind == SAME
    (piece,) = pair.ours(Record(CONVERSATIONS[name], "here"))
    assert "97 has no factor" in pair.theirs.decode(piece.ids[piece.learn])


@pytest.mark.parametrize("template", ["default", "chatml", "llama2"])
@pytest.mark.parametrize("what", ["tool calls", "reasoning"])
def test_what_a_template_leaves_out_is_told(template, what):
    tokenizer = load_tokenizer(TOKENIZER)
    talk = CALLS[:2] if what == "tool calls" else CONVERSATIONS["thinking"]["messages"]
    with pytest.raises(DataError, match=f"leaves out the conversation's {what}: take them out"):
        learnt(open_template(template, tokenizer), talk)


def test_a_turn_in_several_pieces(tmp_path):
    pieces = [["Lisbon\nOslo\nGenoa", "<|im_end|>\n"], ["Rome", "<|im_end|>\n"]]
    assert words(SPLIT, TWO_TURNS) == pieces[0] + pieces[1]
    for masked, wanted in ((1, pieces[1]), (3, pieces[0])):
        talk = copy.deepcopy(TWO_TURNS)
        talk[masked]["loss_mask"] = 0
        assert words(SPLIT, talk) == wanted
    assert both(SPLIT, tmp_path).outcome({"messages": TWO_TURNS}).kind == SAME


@pytest.mark.parametrize("jinja", [SPLIT, WITH_FEED, CONTENT_ALONE, GLM])
@pytest.mark.parametrize("trims", [False, True])
def test_masks_of_code_are_those_of_transformers(jinja, trims, tmp_path):
    """Blanks are tokens, too, whatever the tokenizer says they cover."""
    code = "def f(xs):\n    for x in xs:\n        print(x)\n    return  None"
    pair = both(jinja, tmp_path)
    if trims:
        file = tmp_path / "tokenizer.json"
        backend = json.loads(file.read_text())
        backend["post_processor"] = {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        }  # fmt: skip
        file.write_text(json.dumps(backend))
        ours = load_tokenizer(tmp_path)
        trimmed = Conversation(ours, 1000, open_template("tokenizer", ours))
    else:
        trimmed = pair.ours
    talk = {"messages": [TWO_TURNS[0], {"role": "assistant", "content": code}]}
    assert pair.outcome(talk).kind != MASK
    (plain,), (piece,) = pair.ours(Record(talk, "here")), trimmed(Record(talk, "here"))
    assert piece.ids.tolist() == plain.ids.tolist()
    assert piece.learn is not None
    assert plain.learn is not None
    assert piece.learn.tolist() == plain.learn.tolist()
    assert code in pair.theirs.decode(piece.ids[piece.learn])


@pytest.mark.parametrize(
    "odd", ["\ufdd0", "a \ufdd2 b", "\ufdd0X\ufdd1", "\ufdd1\ufdd3\ufdef\U000f0000"]
)
@pytest.mark.parametrize("jinja", [SPLIT, THINKS, MISTRAL])
def test_any_text_trains(jinja, odd):
    """What marks are made of may stand in the data."""
    talk = copy.deepcopy(TWO_TURNS)
    for message in talk:
        message["content"] = f"{odd}{message['content']}"
    found, plain = (words(jinja, each) for each in (talk, TWO_TURNS))
    assert [text.replace(odd, "") for text in found] == plain


@pytest.mark.parametrize(
    ("jinja", "end"),
    [
        (WITH_FEED, "<|im_end|>"),
        (CONTENT_ALONE, "<|im_end|>"),
        (THINKS, "<|im_end|>"),
        (MISTRAL, "</s>"),
        (HARMONY, "<|return|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_end_of_a_turn_is_a_special_token(jinja, end, tmp_path):
    """Never the line feed behind it, nor a piece of the content."""
    both(jinja, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    found = turn_end(open_template("tokenizer", tokenizer), tokenizer)
    assert found == (None if end is None else tokenizer.token_id(end))


def test_tools_as_json_text(tmp_path):
    pair = both(TOOLED, tmp_path)
    as_list = {"messages": CALLS, "tools": TOOLS}
    texts = {"messages": json.dumps(CALLS), "tools": json.dumps(TOOLS)}
    each = {"messages": CALLS, "tools": [json.dumps(tool) for tool in TOOLS]}
    (wanted,) = pair.ours(Record(as_list, "here"))
    assert pair.outcome(as_list).kind == SAME
    for record in (texts, each):
        (piece,) = pair.ours(Record(record, "here"))
        assert piece.ids.tolist() == wanted.ids.tolist()


def test_a_content_that_is_not_given_or_empty(tmp_path):
    pair = both(TOOLED, tmp_path)
    talk = copy.deepcopy(CALLS)
    del talk[1]["content"]
    talk[5] |= {"content": None}
    assert pair.outcome({"messages": talk, "tools": TOOLS}).kind == SAME
    assert pair.outcome(CONVERSATIONS["empty content"]).kind == SAME
    assert words(TOOLED, CONVERSATIONS["empty content"]["messages"])[1] == "<|im_end|>"


def test_parts_reach_a_template_that_reads_parts(tmp_path):
    jinja = CHATML.replace("BODY", "{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>")
    pair = both(jinja, tmp_path)
    assert pair.outcome(CONVERSATIONS["parts"]).kind == SAME
    (piece,) = pair.ours(Record(CONVERSATIONS["parts"], "here"))
    assert pair.theirs.decode(piece.ids[piece.learn]) == "Nay, answer me.<|im_end|>"


def test_json_as_a_template_wants_it(tmp_path):
    arguments = "ensure_ascii=false, separators=(',', ':'), sort_keys=true"
    jinja = TOOLED.replace("tools | tojson", f"tools | tojson({arguments})")
    assert both(jinja, tmp_path).outcome(CONVERSATIONS["several tool calls"]).kind == SAME


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
def test_the_template_of_tools(place, tmp_path):
    """A tokenizer may have two: one for conversations with tools."""
    pair = both(THINKS, tmp_path)
    if place.endswith(".json"):
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / place).read_text())
        named = {"default": THINKS, "tool_use": TOOLED}
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
        (tmp_path / place).write_text(json.dumps(config))
    else:
        (tmp_path / place).mkdir()
        (tmp_path / place / "tool_use.jinja").write_text(TOOLED)
    theirs = type(pair.theirs).from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    conversation = Conversation(ours, 1000, open_template("tokenizer", ours))
    for name in ("one turn", "several tool calls"):
        record = CONVERSATIONS[name]
        wanted = theirs.apply_chat_template(record["messages"], tools=record.get("tools"))
        (piece,) = conversation(Record(record, "here"))
        assert piece.ids.tolist() == wanted["input_ids"]


def test_nothing_to_learn_is_no_broken_record():
    tokenizer = load_tokenizer(TOKENIZER)
    conversation = Conversation(tokenizer, 100, open_template("default", tokenizer))
    masked = [{**message, "loss_mask": 0} for message in TWO_TURNS]
    for talk in (masked, TWO_TURNS[:1]):
        with pytest.raises(NothingToLearn, match=r"^here: nothing to learn"):
            conversation(Record({"messages": talk}, "here"))


def test_what_follows_the_last_turn_gives_way():
    tokenizer = load_tokenizer(TOKENIZER)
    conversation = Conversation(tokenizer, 64, open_template("default", tokenizer))
    talk = [*TWO_TURNS, {"role": "user", "content": "And what of the king? " * 40}]
    (piece,) = conversation(Record({"messages": talk}, "here"))
    assert piece.learn is not None
    assert piece.learn[-1]
    assert piece.cut == 0
    said = tokenizer.decode(piece.ids[piece.learn])
    assert "Lisbon" in said
    assert "Rome" in said
    assert "king" not in tokenizer.decode(piece.ids)

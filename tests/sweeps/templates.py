"""Renders every chat template of a folder over many kinds of conversations, and compares the text,
the ids and what is learnt with transformers' apply_chat_template.

    python -m tests.sweeps.templates DIR [--differences]

prints a table of counts in Markdown (docs/templates.md has one). Templates: the .jinja files below
DIR, as the wheels of trl and axolotl hold them (`pip download --no-deps trl axolotl`, unzip).
"""

import argparse
import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from transformers import AutoTokenizer

from omnistep.data.chat import open_template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Conversation

TOKENIZER = Path(__file__).parent.parent.parent / "data" / "shakespeare" / "tokenizer"


def say(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, **({} if content is None else {"content": content}), **more}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells how warm it is & where <it> rains",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "City"}},
                "required": ["city"],
            },
        },
    }
]
ASKED = [say("user", "Who's there?"), say("assistant", "Nay, answer me:\nstand, and unfold.")]
CALLED = [
    say("user", "How warm is it in Lisbon?"),
    say("assistant", "", tool_calls=[call(1, city="Lisbon")]),
    say("tool", "21", name="get_weather", tool_call_id="call00001"),
    say("assistant", "21 degrees."),
]
TWICE = [
    say("user", "And in Oslo and Rome?"),
    say("assistant", "Let me see.", tool_calls=[call(2, city="Oslo"), call(3, city="Rome")]),
    say("tool", "4", name="get_weather", tool_call_id="call00002"),
    say("tool", "18", name="get_weather", tool_call_id="call00003"),
    say("assistant", "4 and 18."),
]


def thought(name: str) -> list[dict[str, Any]]:
    first = say("assistant", "No.", **{name: "91 is 7 times 13."})
    second = say("assistant", "Yes.", **{name: "97 has no factor below 10."})
    return [say("user", "Is 91 prime?"), first, say("user", "Is 97?"), second]


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": ASKED},
    "system": {"messages": [say("system", "Speak in verse."), *ASKED]},
    "several turns": {
        "messages": [
            *ASKED,
            say("user", " Long live the king! "),
            say("assistant", " Bernardo? \n"),
            say("user", "He."),
        ]
    },
    "tools as a list": {"messages": ASKED, "tools": TOOLS},
    "tools as a string": {"messages": ASKED, "tools": json.dumps(TOOLS)},
    "a tool call": {"messages": CALLED, "tools": TOOLS},
    "several tool calls": {"messages": [*CALLED, *TWICE], "tools": TOOLS},
    "reasoning_content": {"messages": thought("reasoning_content")},
    "thinking": {"messages": thought("thinking")},
    "reasoning": {"messages": thought("reasoning")},
    "parts": {
        "messages": [
            say("user", [{"type": "text", "text": "Who's "}, {"type": "text", "text": "there?"}]),
            say("assistant", [{"type": "text", "text": "Nay, answer me."}]),
        ]
    },
    "empty content": {"messages": [*ASKED, say("user", ""), say("assistant", "")]},
    "unicode": {
        "messages": [
            say("user", "Grüße an 東京 🦉\u2028\u00a0<b>&amp;</b>"),
            say("assistant", "é e\u0301 🏳️‍🌈 \ufdd0 \u200b日本語"),
        ]
    },
}

SPECIAL = re.compile(
    r"<\|?[^|<>\s/]{1,40}\|>|<\|[a-z_]+>|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
    r"|\[/?[A-Z_]{3,24}\]|</?[a-z_]{1,24}>"
)
"""What looks like a special token in a template."""


@frozen
class Outcome:
    """What came of one template and one conversation."""

    kind: str
    """One of KINDS."""
    detail: str = ""


SAME, BOTH, TEXT, IDS, MASK = "same", "refused by both", "other text", "other ids", "other mask"
ALONE, LEFT, FITTED = "refused alone", "refused: left out", "same, fitted"
KINDS = (SAME, FITTED, BOTH, LEFT, ALONE, TEXT, IDS, MASK)
MEANING = {
    SAME: "text and ids are equal; what is learnt, too, where the template marks turns",
    FITTED: "equal to transformers given what the template takes: parts where it reads only parts, "
    "a text where it reads only texts, a list where tools are JSON text (transformers writes "
    "nothing, or the list as Python prints it, or raises an error)",
    BOTH: "transformers raises an error, and so do we",
    LEFT: "the text would be the same without the tools, the tool calls or the reasoning; "
    "transformers leaves them out, we say so",
    ALONE: "refused, and transformers renders it",
    TEXT: "another text, or none of theirs to compare with",
    IDS: "the same text, other ids",
    MASK: "the template marks turns, and another part is learnt",
}


@frozen(eq=False)
class Both:
    """One template, as transformers and as omnistep have it."""

    theirs: Any
    ours: Conversation
    jinja: str

    def outcome(self, record: Mapping[str, Any]) -> Outcome:
        messages, tools = record["messages"], record.get("tools")
        wanted = self._theirs(messages, tools)
        try:
            (made,) = self.ours(Record(copy.deepcopy(dict(record)), "here"))
        except DataError as error:
            if isinstance(wanted, str) and "leaves out" not in str(error):
                return Outcome(BOTH)
            return Outcome(LEFT if "leaves out" in str(error) else ALONE, str(error))
        outcome = self._compare(made, wanted)
        if outcome.kind == TEXT:
            tools = json.loads(tools) if isinstance(tools, str) else tools
            fitted = self._theirs([self._fitted(message) for message in messages], tools)
            if self._compare(made, fitted).kind == SAME:
                return Outcome(FITTED)
        return outcome

    def _fitted(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        content, takes = message.get("content"), self.ours.template.contents
        if takes == "texts" and isinstance(content, list):
            return {**message, "content": "".join(part["text"] for part in content)}
        if takes == "parts" and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _theirs(self, messages: Any, tools: Any) -> Any:
        try:
            return self.theirs.apply_chat_template(
                copy.deepcopy(messages),
                tools=copy.deepcopy(tools),
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # whatever a template does
            return f"{type(error).__name__}: {error}"

    def _compare(self, made: Any, wanted: Any) -> Outcome:
        if isinstance(wanted, str):
            return Outcome(TEXT, wanted)
        ids, mask = made.ids.tolist(), made.learn.astype(int).tolist()
        ours, theirs = (self.theirs.decode(i) for i in (ids, wanted["input_ids"]))
        if ours != theirs:
            return Outcome(TEXT, f"{theirs!r}\n   ours {ours!r}")
        if ids != wanted["input_ids"]:
            return Outcome(IDS, ours)
        if "endgeneration" in self.jinja and mask != wanted["assistant_masks"]:
            both = (self._learnt(ids, m) for m in (wanted["assistant_masks"], mask))
            return Outcome(MASK, "{!r}\n   ours {!r}".format(*both))
        return Outcome(SAME, repr(self._learnt(ids, mask)))

    def _learnt(self, ids: Sequence[int], mask: Sequence[int]) -> list[str]:
        spans, before = [], 0
        for token, learnt in zip(ids, mask, strict=True):
            if learnt and not before:
                spans.append([])
            if learnt:
                spans[-1].append(token)
            before = learnt
        return [self.theirs.decode(span) for span in spans]


def both(jinja: str, place: Path, tokenizer: Path = TOKENIZER) -> Both:
    """A template with a tokenizer to which all that looks like a special token of it is added, in
    the folder `place`."""
    backend = json.loads((tokenizer / "tokenizer.json").read_text())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    known = {token["content"] for token in backend["added_tokens"]}
    highest = max(*backend["model"]["vocab"].values(), *(t["id"] for t in backend["added_tokens"]))
    found = sorted({"<s>", "</s>", *SPECIAL.findall(jinja)} - known)
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    for number, text in enumerate(found, highest + 1):
        backend["added_tokens"].append({"id": number, "content": text, "special": True, **flags})
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    config.pop("chat_template", None)
    (place / "tokenizer.json").write_text(json.dumps(backend))
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "chat_template.jinja").write_text(jinja)
    ours = load_tokenizer(place)
    conversation = Conversation(ours, 1 << 20, open_template("tokenizer", ours))
    return Both(AutoTokenizer.from_pretrained(place), conversation, jinja)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--differences", action="store_true", help="print all that is not the same")
    parser.add_argument("--learnt", action="store_true", help="print what is learnt of each")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in CONVERSATIONS}
    files = sorted(args.folder.rglob("*.jinja"))
    for file in files:
        with tempfile.TemporaryDirectory() as place:
            pair = both(file.read_text(), Path(place))
        for name, record in CONVERSATIONS.items():
            outcome = pair.outcome(record)
            counts[name][outcome.kind] += 1
            shown = args.differences and outcome.kind not in (SAME, FITTED, BOTH)
            if shown or (args.learnt and outcome.kind == SAME):
                print(f"{file.parent.name}/{file.stem} | {name} | {outcome.kind}: {outcome.detail}")
    print(f"| {len(files)} templates | {' | '.join(KINDS)} |")
    print("| --- " * (len(KINDS) + 1) + "|")
    for name, found in counts.items():
        print(f"| {name} | {' | '.join(str(found[kind]) for kind in KINDS)} |")
    total = sum(counts.values(), Counter())
    print(f"| **all** | {' | '.join(str(total[kind]) for kind in KINDS)} |")
    print()
    for kind, meaning in MEANING.items():
        print(f"- **{kind}**: {meaning}.")


if __name__ == "__main__":
    main()

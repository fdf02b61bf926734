"""Conversations by a chat template: their text.

A template is Jinja, as transformers' tokenizers carry it, rendered here without importing
transformers; what comes out must equal its apply_chat_template (tokenization_utils_base.py and
utils/chat_template_utils.py there). What of a conversation is learnt: data/turns.py.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from omnistep.data import sandbox
from omnistep.data.errors import DataError
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import Tokenizer, read_jinja, read_json

Message = Mapping[str, Any]
Contents = Literal["as given", "texts", "parts"]
"""What a template takes for a message's content: texts and parts, as transformers hands them on;
texts alone; parts alone."""
Span = tuple[int, int]
"""From the first character of a text to behind its last."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning may be called; all names mean the same."""

TEMPLATES = Path(__file__).parent / "templates"

_NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen2vl": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a built-in template takes for one token."""
_AROUND_IMAGES = {"qwen2vl": ("<|vision_start|>", "<|vision_end|>")}
"""The same where there are images."""


@frozen
class Marks:
    """Characters that neither a conversation nor its template holds. They go through a rendering,
    and show where things came out."""

    opening: str = ""
    closing: str = ""
    """Around what stands in `{% generation %}`."""
    said: str = ""
    """What a message may be given to find its place."""


NO_MARKS = Marks()


@frozen
class Rendered:
    """A conversation as one text, without the marks, and where they stood."""

    text: str
    turns: tuple[Span, ...] = ()
    """What stands in `{% generation %}`."""
    said: tuple[int, ...] = ()
    """The places of the messages' own marks."""


@frozen(eq=False)
class Template:
    """A chat template; picklable."""

    name: str
    """for errors"""
    jinja: str = field(repr=False)
    special_tokens: Mapping[str, str] = field(factory=dict, repr=False)
    """bos_token, eos_token, … as templates name them"""
    contents: Contents = "as given"
    image: str = ""
    video: str = ""
    """What stands for an image, for a video, where `contents` are texts."""
    tool_use: str | None = field(default=None, repr=False)
    """The Jinja text for conversations with tools, where it is another."""
    ends: tuple[str, ...] = field(default=(), repr=False)
    """The tokenizer's special tokens: what may end a turn."""
    now: datetime.datetime | None = None
    """The moment that `strftime_now` tells; None: the present."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Renders a conversation as one text, as transformers' apply_chat_template writes it.

        Raises DataError when the template can't be read or refuses the messages.
        """
        return self.rendered(messages, tools, add_generation_prompt).text

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool = False,
        marks: Marks = NO_MARKS,
    ) -> Rendered:
        """Renders a conversation and finds the marks in it. Raises as `render`."""
        variables = {
            **self.special_tokens,
            "messages": [self._taken(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        around = (marks.opening, marks.closing)
        try:
            text = sandbox.render(self.jinja_for(tools), variables, marks=around, now=self.now)
        except Exception as error:  # a template's own mistakes are a TypeError, a KeyError, …
            reason = str(error) or type(error).__name__
            raise DataError(
                f"the chat template ({self.name}) does not take this conversation: {reason}"
            ) from error
        return _find(text, marks)

    def jinja_for(self, tools: Sequence[Any] | None) -> str:
        return self.jinja if tools is None or self.tool_use is None else self.tool_use

    def marks_for(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Marks:
        """Chooses marks for a conversation."""
        held = json.dumps([messages, tools], ensure_ascii=False, default=str)
        held += self.jinja + (self.tool_use or "")
        return Marks(*islice((mark for mark in _characters() if mark not in held), 3))

    def _taken(self, message: Message) -> Message:
        """The message as the template takes it: its content, its reasoning under each name."""
        reasons = (message[name] for name in REASONING if message.get(name) is not None)
        if (reasoning := next(reasons, None)) is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if self.contents == "texts" and are_parts(content):
            written = {"image": self.image, "video": self.video}
            texts = (written.get(part.get("type")) or part.get("text", "") for part in content)
            return {**message, "content": "".join(texts)}
        if self.contents == "parts" and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message


def are_parts(content: Any) -> bool:
    """Whether a content is a list of parts: of texts, images and videos."""
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
    )


def _characters() -> Iterator[str]:
    """What no text should hold: Unicode's noncharacters; private use."""
    return map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE)))


def _find(marked: str, marks: Marks) -> Rendered:
    if marks is NO_MARKS:
        return Rendered(marked)
    texts, turns, said, opened = [], [], [], []
    at = 0
    for piece in re.split(f"([{marks.opening}{marks.closing}{marks.said}])", marked):
        if piece == marks.opening:
            opened.append(at)
        elif piece == marks.closing:
            begin = opened.pop() if opened else at
            turns.append((begin, at))
        elif piece == marks.said:
            said.append(at)
        else:
            texts.append(piece)
            at += len(piece)
    return Rendered("".join(texts), tuple(turns), tuple(said))


def open_template(
    name: str,
    tokenizer: Tokenizer,
    images: ImageRules | None = None,
    now: datetime.datetime | None = None,
) -> Template:
    """Opens what `data.chat_template` names: a built-in template, `tokenizer` for the tokenizer's
    own, or a Jinja file. `images`: of a model that takes them; `now`: see Template.

    A built-in template writes the model's token for each image, qwen2vl with its own around it. Any
    other gets parts, if it then writes the model's image token; else the token within the text.

    Raises DataError: no such template, or one that takes for one token what the tokenizer splits.
    """
    special = special_tokens(Path(tokenizer.path).parent)
    written = _image_tokens(tokenizer, images)
    shared = {"ends": tokenizer.special_tokens, "now": now, **written}
    if name == "tokenizer":
        if not (tokenizer.chat_template or tokenizer.tool_use_template):
            raise DataError(
                f"data.chat_template is tokenizer, but {tokenizer.path} has no chat template; "
                f"choose one of {', '.join(builtin_templates())}, or give a Jinja file"
            )
        jinja = tokenizer.chat_template or _NO_DEFAULT
        own = Template("the tokenizer's own", jinja, special, **shared)
        return _fitted(attrs.evolve(own, tool_use=tokenizer.tool_use_template))
    if name in builtin_templates():
        needed = _NEEDED_TOKENS.get(name, ()) + (_AROUND_IMAGES.get(name, ()) if images else ())
        missing = [token for token in needed if tokenizer.token_id(token) is None]
        if missing:
            raise DataError(
                f"data.chat_template {name} needs the tokens {', '.join(missing)}, which the "
                f"tokenizer {tokenizer.path} does not have; `default` suits any tokenizer"
            )
        eos = special.get("eos_token") or tokenizer.decode([tokenizer.eos_id])
        special = {"bos_token": "", **special, "eos_token": eos}
        jinja = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        # in the template itself, so that it is exported with it
        sets = [f"{{%- set {kind}_token = {text!r} -%}}\n" for kind, text in written.items()]
        return Template(name, "".join(sets) + jinja, special, **shared)
    file = Path(name).expanduser()
    if not file.is_file():
        raise DataError(
            f"data.chat_template {name!r} is no file and no built-in template; these are "
            f"{', '.join(builtin_templates())}, and `tokenizer` for the tokenizer's own"
        )
    return _fitted(Template(name, read_jinja(file), special, **shared))


_NO_DEFAULT = (
    "{{ raise_exception('the tokenizer has a template for conversations with tools only') }}"
)


def _image_tokens(tokenizer: Tokenizer, images: ImageRules | None) -> dict[str, str]:
    """The texts of the model's tokens for images and videos."""
    if images is None:
        return {}
    tokens = {"image": images.image_token, "video": images.video_token}
    return {kind: tokenizer.text_of(i) for kind, i in tokens.items() if i is not None}


def _fitted(template: Template) -> Template:
    """With `contents` as the template turns out to take them."""

    def shown(content: Any) -> str:
        try:
            return template.render([{"role": "user", "content": content}])
        except DataError:
            return ""

    word = "seen"
    parts = [{"type": "text", "text": word}]
    if template.image:
        found = shown([{"type": "image"}, *parts]).count(template.image) == 1
    else:
        found = word in (text := shown(parts)) and "{" not in text
    as_text = word in shown(word)
    if not found:
        return attrs.evolve(template, contents="texts") if as_text else template
    return template if as_text else attrs.evolve(template, contents="parts")


def builtin_templates() -> list[str]:
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def special_tokens(directory: Path) -> dict[str, str]:
    """Reads the special tokens of the tokenizer in a directory, by the names that templates use.

    As in transformers: every `…_token` that tokenizer_config.json (or the older
    special_tokens_map.json) sets to a text or an AddedToken.
    """
    found: dict[str, str] = {}
    for file in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        for name, token in read_json(file).items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                found.setdefault(name, text)
    return found

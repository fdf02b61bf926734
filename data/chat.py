"""Conversations by a chat template: their text, and the parts of it that are to be learnt.

A template is Jinja, as transformers' tokenizers carry it, rendered here without importing
transformers. The parts to learn come out of the rendering itself: markers that no text can hold
go through it, and where they come out, the parts begin and end.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import attrs
import jinja2
from attrs import field, frozen
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from omnistep.data.errors import DataError
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Contents = Literal["as given", "texts", "parts"]
"""What a template takes for a message's content: texts, or parts where there are images (as
transformers hands them on); texts alone; parts alone."""
Span = tuple[int, int]
"""From the first character of a text to learn to behind its last."""

TEMPLATES = Path(__file__).parent / "templates"
START, STOP, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""The markers, of a content and of a `{% generation %}`: code points that Unicode has set aside
as no characters."""
_NO_TURNS = str.maketrans("", "", BEGIN + END)
_NO_MARKS = str.maketrans("", "", START + STOP + BEGIN + END)

_NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen2vl": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a built-in template takes for one token."""
_AROUND_IMAGES = {"qwen2vl": ("<|vision_start|>", "<|vision_end|>")}
"""The same where there are images."""


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

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as one text, as transformers' apply_chat_template writes it.

        Raises DataError when the template can't be read or refuses the messages.
        """
        return self._marked(messages, tools, add_generation_prompt).translate(_NO_MARKS)

    def learnt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and the parts of it that are to be learnt: each assistant's turn, from where
        generation would begin through its end of turn; a message's own `loss_mask` (0 or 1)
        overrides.

        Where the template says so itself (`{% generation %}`), those are the turns. Else markers
        around the contents show where a turn is, and the template's own generation prompt where
        it begins. Raises DataError where that leaves a doubt.
        """
        learn = [bool(m.get("loss_mask", m["role"] == "assistant")) for m in messages]
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rendered = self._marked(messages, tools, False)
        text = rendered.translate(_NO_MARKS)
        if tools and text == self.render(messages):
            raise DataError(f"the chat template ({self.name}) leaves out the conversation's tools")
        others = [i for i, wanted in enumerate(learn) if wanted and i not in spoken]
        spans: dict[int, Span] = {}
        if others:
            contents = self._content_spans(messages, others, tools, text)
            spans |= {i: (start, stop) for i, _, start, stop in contents}
        if self._marks_turns:
            turns = _spans(rendered)
            if len(turns) != len(spoken):
                raise self._doubt(f"it marks {len(turns)} turns where there are {len(spoken)}")
            spans |= dict(zip(spoken, turns, strict=True))
        elif spoken:
            contents = self._content_spans(messages, spoken, tools, text)
            opening, closing = _turn_ends(self)
            for i, before, start, stop in contents:
                begin = text.rfind(opening, before, start) if opening else start
                end = text.find(closing, stop)
                if begin < 0:
                    raise self._doubt(f"message {i + 1} does not begin with {opening!r}")
                if end < 0 or (text[stop:end].strip() and not _calls(messages[i])):
                    raise self._doubt(f"message {i + 1} does not end with {closing!r}")
                spans[i] = (begin + len(opening), end + len(closing))
        return text, [spans[i] for i in sorted(spans) if learn[i]]

    def turn_end(self, tokenizer: Tokenizer) -> int:
        """The token that ends an assistant's turn: the last that is learnt of it."""
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        text, ((start, stop),) = self.learnt(talk)
        return tokenizer.encode(text[start:stop])[-1]

    @property
    def _marks_turns(self) -> bool:
        return "endgeneration" in self.jinja

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool
    ) -> str:
        """With BEGIN and END around what stands in `{% generation %}`."""
        try:
            return _compiled(self.jinja).render(
                messages=[self._taken(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template's own mistakes are a TypeError, a KeyError, …
            raise DataError(
                f"the chat template ({self.name}) does not take this conversation: {error}"
            ) from error

    def _taken(self, message: Message) -> Message:
        """The message with its content as the template takes it."""
        content = message.get("content")
        if self.contents == "texts" and isinstance(content, list):
            written = {"image": self.image, "video": self.video}
            texts = (written.get(part["type"]) or part.get("text", "") for part in content)
            return {**message, "content": "".join(texts)}
        if self.contents == "parts" and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _content_spans(
        self,
        messages: Sequence[Message],
        wanted: Sequence[int],
        tools: Sequence[Any] | None,
        text: str,
    ) -> list[tuple[int, int, int, int]]:
        """For each wanted message: its number, and where in `text` the one before it ends, where
        its content begins (if the template dropped the beginning: where it ends), and ends."""
        marked = [_mark(m) if i in wanted else m for i, m in enumerate(messages)]
        found = self._marked(marked, tools, False).translate(_NO_TURNS)
        if found.translate(_NO_MARKS) != text or found.count(STOP) != len(wanted):
            raise self._doubt("it changes, drops or repeats the content of a message to learn")
        places, before, at = [], 0, 0
        parts = found.split(STOP)
        for i, part in zip(wanted, parts, strict=False):
            head, *rest = part.split(START)
            stop = at + len(part) - len(rest)
            start = at + len(head) if rest else stop
            places.append((i, before, start, stop))
            before = at = stop
        return places

    def _doubt(self, what: str) -> DataError:
        return DataError(
            f"the chat template ({self.name}) does not show what the assistant says: {what}. Put "
            "{% generation %} … {% endgeneration %} around it in a Jinja file and set "
            "data.chat_template to that, or to a built-in one"
        )


def open_template(name: str, tokenizer: Tokenizer, images: ImageRules | None = None) -> Template:
    """`data.chat_template`: a built-in name, `tokenizer` for the tokenizer's own, or a Jinja file.
    `images`: of a model that takes them.

    A built-in template writes the model's token for each image, qwen2vl with its own around it. Any
    other gets parts, if it then writes the model's image token; else the token within the text.

    Raises DataError: no such template, or one that takes for one token what the tokenizer splits.
    """
    special = special_tokens(Path(tokenizer.path).parent)
    written = _image_tokens(tokenizer, images)
    if name == "tokenizer":
        if tokenizer.chat_template is None:
            raise DataError(
                f"data.chat_template is tokenizer, but {tokenizer.path} has no chat template; "
                f"choose one of {', '.join(builtin_templates())}, or give a Jinja file"
            )
        return _fitted(Template("the tokenizer's own", tokenizer.chat_template, special, **written))
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
        return Template(name, "".join(sets) + jinja, special, **written)
    file = Path(name).expanduser()
    if not file.is_file():
        raise DataError(
            f"data.chat_template {name!r} is no file and no built-in template; these are "
            f"{', '.join(builtin_templates())}, and `tokenizer` for the tokenizer's own"
        )
    return _fitted(Template(name, file.read_text(encoding="utf-8"), special, **written))


def _image_tokens(tokenizer: Tokenizer, images: ImageRules | None) -> dict[str, str]:
    """The texts of the model's tokens for images and videos."""
    if images is None:
        return {}
    tokens = {"image": images.image_token, "video": images.video_token}
    return {kind: tokenizer.text_of(i) for kind, i in tokens.items() if i is not None}


def _fitted(template: Template) -> Template:
    """With `contents` as the template turns out to take them."""
    if not template.image:
        return template

    def shown(content: Any) -> str:
        try:
            return template.render([{"role": "user", "content": content}])
        except DataError:
            return ""

    word = "seen"
    if shown([{"type": "image"}, {"type": "text", "text": word}]).count(template.image) != 1:
        return attrs.evolve(template, contents="texts")
    return template if word in shown(word) else attrs.evolve(template, contents="parts")


def builtin_templates() -> list[str]:
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens by the names that templates use, of the tokenizer in a directory.

    As in transformers: every `…_token` that tokenizer_config.json (or the older
    special_tokens_map.json) sets to a text or an AddedToken.
    """
    found: dict[str, str] = {}
    for file in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name, token in config.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                found.setdefault(name, text)
    return found


# ---- markers -------------------------------------------------------------------------------


def _spans(marked: str) -> list[Span]:
    """Where the marked turns stand once the markers are gone."""
    places = [at.start() - n for n, at in enumerate(re.finditer(f"[{BEGIN}{END}]", marked))]
    return list(zip(places[::2], places[1::2], strict=True))


def _mark(message: Message) -> Message:
    """The message with markers around its content, inside any blanks, so that a template may
    strip it; of parts around their texts. With tool calls the last one's name is the end. Raises
    DataError when it is empty."""
    content, calls = message.get("content") or "", _calls(message)
    marked = dict(message)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    filled = [i for i, part in enumerate(parts) if part.get("text", "").strip()]
    if not filled and not calls:
        raise DataError(f"a message of role {message['role']} is to be learnt, but it has no text")
    if filled:
        first, last = filled[0], filled[-1]
        parts[first] = _around(parts[first], START, "")
        if not calls:
            parts[last] = _around(parts[last], "", STOP)
        marked["content"] = parts[0]["text"] if isinstance(content, str) else parts
    if calls:
        last = calls[-1]
        inner = last.get("function", last)
        named = {**inner, "name": inner["name"] + STOP}
        last = {**last, "function": named} if "function" in last else named
        marked["tool_calls"] = [*calls[:-1], last]
    return marked


def _around(part: Mapping[str, Any], before: str, after: str) -> dict[str, Any]:
    """A part of text with these around what is not blank of it."""
    core = part["text"].strip()
    head, _, tail = part["text"].partition(core)
    return {**part, "text": head + before + core + after + tail}


def _calls(message: Message) -> Sequence[Any]:
    return message.get("tool_calls") or ()


@lru_cache(maxsize=16)
def _turn_ends(template: Template) -> tuple[str, str]:
    """What a template without `{% generation %}` writes between a user's turn and the assistant's
    words, as far as it is also the generation prompt; and what it writes after them."""
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    asked = template.render([user])
    prompt = template.render([user], add_generation_prompt=True)
    marked = template._marked([user, _mark(assistant), user, assistant], None, False)
    answered = template._marked([user, _mark(assistant)], None, False)
    if not (prompt.startswith(asked) and marked.startswith(asked)) or marked.count(START) != 1:
        raise template._doubt("another message changes the text of those before it")
    given, taken = prompt[len(asked) :], marked[len(asked) : marked.index(START)]
    alike = [a == b for a, b in zip(given, taken, strict=False)] + [False]
    return given[: alike.index(False)], answered.partition(STOP)[2].rstrip()


# ---- Jinja ---------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: puts markers around what is between."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Any) -> str:
        return BEGIN + caller() + END


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@lru_cache(maxsize=16)
def _compiled(jinja: str) -> jinja2.Template:
    return _environment().from_string(jinja)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""What of a conversation is learnt: the assistant's turns, found in the rendering itself.

Where a template marks the turns (`{% generation %}`), they are what it marks. Any other template
is asked: a turn begins where generation would, behind the prompt that the template writes for it,
and ends where the text ends of a conversation that stops there. Both texts begin the whole
conversation's text, unless the template writes a turn in another way once others follow (it takes
thoughts out, it moves the tools, it ends the last turn with a token of its own). Then what stands
between the messages is compared, whose places marks show that went through the rendering.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from attrs import define, field

from omnistep.data.chat import REASONING, Marks, Message, Rendered, Span, Template
from omnistep.data.errors import DataError
from omnistep.data.marks import mark_message, reasoning, take_out
from omnistep.data.tokenizer import Tokenizer

Tools = Sequence[Any] | None
ASSISTANT = "assistant"
_GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


def learnt(
    template: Template, messages: Sequence[Message], tools: Tools = None
) -> tuple[str, list[Span]]:
    """Renders a conversation, and finds the parts of its text that are to be learnt: of each
    assistant's message from where generation would begin through its end of turn. A message's own
    `loss_mask` (0 or 1) overrides; of another role's message it is the content that is learnt.

    Raises DataError where the template refuses the conversation, leaves out its tools, its tool
    calls or its reasoning, or does not show where a turn is.
    """
    talk = _Conversation(template, messages, tools)
    talk.check_nothing_is_left_out()
    wanted = [i for i, m in enumerate(messages) if m.get("loss_mask", m["role"] == ASSISTANT)]
    spoken = [i for i in wanted if messages[i]["role"] == ASSISTANT]
    if _GENERATION.search(template.jinja_for(tools)):
        spans = talk.marked_turns(spoken)
    else:
        spans = [span for i in spoken if (span := talk.turn(i))]
    spans += [talk.content(i) for i in wanted if i not in spoken]
    return talk.text, sorted(spans)


def turn_end(template: Template, tokenizer: Tokenizer) -> int | None:
    """Finds the special token that ends an assistant's turn: the last that is learnt of it, or the
    first that follows. None: there is none."""
    talk = [{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "y"}]
    try:
        text, spans = learnt(template, talk)
    except DataError:
        return None
    begin, stop = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    special = _pattern(tokenizer.special_tokens)
    found = special.findall(text, begin, stop)[-1:] or special.findall(text, stop)[:1]
    return tokenizer.token_id(found[0]) if found else None


@define(eq=False)
class _Text:
    """What the template makes of a conversation's first `count` messages."""

    rendered: Rendered
    count: int
    prompt: bool = False
    """With the generation prompt behind them."""

    @property
    def text(self) -> str:
        return self.rendered.text


@define(eq=False)
class _Conversation:
    """A conversation, and what its template makes of it and of its beginnings."""

    template: Template
    messages: Sequence[Message]
    tools: Tools
    marks: Marks = field(init=False)
    whole: _Text = field(init=False)
    _places: dict[tuple[int, int, bool], Span | None] = field(init=False, factory=dict)
    _prompts: dict[str, str] = field(init=False, factory=dict)
    """By the role of the last message: what stands behind its last words in a text with a
    generation prompt."""
    _closings: set[str] = field(init=False, factory=set)
    """What stood behind a turn's last words, to a special token that ended it."""

    def __attrs_post_init__(self) -> None:
        self.marks = self.template.marks_for(self.messages, self.tools)
        rendered = self.template.rendered(self.messages, self.tools, marks=self.marks)
        self.whole = _Text(rendered, len(self.messages))

    @property
    def text(self) -> str:
        return self.whole.text

    # ---- what a template may not leave out ---------------------------------------------------

    def check_nothing_is_left_out(self) -> None:
        """Raises DataError: the text would be the same without the tools, calls or reasoning."""
        if self.tools and self._without(self.messages, None):
            raise self._left_out("tools")
        if any(message.get("tool_calls") for message in self.messages):
            plain = [take_out(message, ("tool_calls",)) for message in self.messages]
            if self._without(plain, self.tools):
                raise self._left_out("tool calls")
        if any(reasoning(message) for message in self.messages):
            plain = [take_out(message, REASONING) for message in self.messages]
            if self._without(plain, self.tools) and not _takes_reasoning(self.template):
                raise self._left_out("reasoning")

    def _without(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether these make the same text."""
        try:
            return self.text == self.template.render(messages, tools=tools)
        except DataError:
            return False

    def _left_out(self, what: str) -> DataError:
        return DataError(
            f"the chat template ({self.template.name}) leaves out the conversation's {what}: take "
            "them out of the data, or set data.chat_template to one that has a place for them"
        )

    # ---- templates that mark turns -----------------------------------------------------------

    def marked_turns(self, wanted: Sequence[int]) -> list[Span]:
        """What the template marks of the wanted messages; it may mark a turn in several pieces."""
        spoken = [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT]
        turns = [turn for turn in self.whole.rendered.turns if turn[0] < turn[1]]
        if len(wanted) == len(spoken):
            return turns
        if len(turns) == len(spoken):
            return [turn for i, turn in zip(spoken, turns, strict=True) if i in wanted]
        # a piece belongs to the last message that begins before the piece ends
        begins = [(place[0], i) for i in range(len(self.messages)) if (place := self._place(i))]
        owners = [max((b for b in begins if b[0] <= end), default=(0, -1))[1] for _, end in turns]
        return [turn for i, turn in zip(owners, turns, strict=True) if i in wanted]

    # ---- any other ---------------------------------------------------------------------------

    def turn(self, i: int) -> Span | None:
        """Finds the turn of the assistant's message i; None: nothing of it is in the text."""
        begin, end = self._as_others(i)
        if begin is None:
            prompt = self._first(i, prompt=True)
            if prompt is not None and self.text.startswith(prompt.text):
                begin = len(prompt.text)
            else:
                begin = self._begin(i, prompt)
            self._remember_prompt(i, prompt)
        if end is None and begin is not None:
            end = self._end(i, begin)
            self._remember_closing(i, end)
        if begin is None or end is None:
            if self._without([*self.messages[:i], *self.messages[i + 1 :]], self.tools):
                return None
            raise self._doubt(i)
        return (begin, self._stop(begin, end)) if begin < end else None

    def content(self, i: int) -> Span:
        """Finds the content of message i."""
        place = self._place(i)
        if place is None:
            raise self._doubt(i)
        return place

    def _begin(self, i: int, prompt: _Text | None) -> int | None:
        """Where message i's turn begins, by what stands between it and the message before."""
        here, before = self._place(i), self._place(i - 1) if i else None
        first = here[0] if here else len(self.text)
        if before is not None and prompt is not None and (asked := self._place(i - 1, prompt)):
            written, found = prompt.text[asked[1] :], self.text[before[1] :]
            return min(before[1] + _shared(written, found, self.template.ends), first)
        opening = _generation_prompt(self.template)
        at = self.text.rfind(opening, before[1] if before else 0, first) if opening else -1
        if at >= 0:
            return at + len(opening)
        if before is not None and here is not None:  # behind what ends the message before
            ended = _pattern(self.template.ends).search(self.text, before[1], first)
            return ended.end() if ended else first
        return first if here else None

    def _end(self, i: int, begin: int) -> int | None:
        """Behind the end of message i's turn."""
        ended = self.whole if i + 1 == len(self.messages) else self._first(i + 1)
        if ended is None:
            return None
        alone = ended.text.rstrip()
        if self.text.startswith(alone) and len(alone) >= begin:
            return len(alone)
        here, there = self._place(i), self._place(i, ended)
        places = (self._place(later) for later in range(i + 1, len(self.messages)))
        following = min((place[0] for place in places if place), default=len(self.text))
        if here is None or there is None or here[1] > following:
            # as far as it is written alike; a template may put what tools gave into the turn
            same = _shared(alone, self.text, self.template.ends)
            return same if same > begin else None
        closing = alone[there[1] :]
        if self.text.startswith(closing, here[1]):
            return here[1] + len(closing)
        special = _pattern(self.template.ends).search(self.text, here[1], following)
        alike = here[1] + _shared(closing, self.text[here[1] :], self.template.ends)
        return max(alike, special.end() if special else begin)

    def _as_others(self, i: int) -> tuple[int | None, int | None]:
        """Where message i's turn begins and ends if it does as turns before it did: to ask the
        template about each turn of a long conversation would take its square."""
        here, before = self._place(i), self._place(i - 1) if i else None
        if here is None or not (self._prompts or self._closings) or not self._stands_alone(i, here):
            return None, None
        begin = end = None
        special, prompt = _pattern(self.template.ends), ""
        if before is not None:
            prompt = self._prompts.get(self.messages[i - 1]["role"], "")
            same = _shared(prompt, self.text[before[1] :], self.template.ends)
            first = special.search(prompt)
            if first is not None and same >= first.end():
                begin = before[1] + same
                begin = begin if same == len(prompt) else min(begin, here[0])
        closings = [text for text in self._closings if self.text.startswith(text, here[1])]
        if closings:
            end = here[1] + len(max(closings, key=len))
        return begin, end

    def _stands_alone(self, i: int, here: Span) -> bool:
        """Whether the messages before i are seen in their order, the last of them before it, and
        those after it behind it."""
        places = [self._place(j) for j in range(len(self.messages))]
        before = places[i - 1] if i else None
        limit = here[0] if before is None else min(before[1], here[0])
        earlier = all(place is None or place[1] <= limit for place in places[:i])
        return earlier and all(place is None or place[0] >= here[1] for place in places[i + 1 :])

    def _remember_prompt(self, i: int, prompt: _Text | None) -> None:
        if i and prompt is not None and (asked := self._place(i - 1, prompt)):
            self._prompts[self.messages[i - 1]["role"]] = prompt.text[asked[1] :]

    def _remember_closing(self, i: int, end: int | None) -> None:
        here, last = self._place(i), i + 1 == len(self.messages)
        if here is None or end is None or last:  # the last turn may end with a token of its own
            return
        closing = self.text[here[1] : end]
        *_, ended = (0, *(found.end() for found in _pattern(self.template.ends).finditer(closing)))
        if ended and ended == len(closing):
            self._closings.add(closing)

    def _stop(self, begin: int, end: int) -> int:
        """Where a turn has no special token at its end, it is the one that follows that ends it, if
        it follows at once: what opens the next turn, as GLM's `<|user|>`."""
        special = _pattern(self.template.ends)
        *_, last = (0, *(found.end() for found in special.finditer(self.text, begin, end)))
        following = special.match(self.text, end)
        return end if last == end or following is None else following.end()

    def _first(self, count: int, prompt: bool = False) -> _Text | None:
        """The first messages as a conversation; None: the template refuses it."""
        rendered = self._rendered(self.messages[:count], prompt)
        return None if rendered is None else _Text(rendered, count, prompt)

    def _rendered(self, messages: Sequence[Message], prompt: bool) -> Rendered | None:
        try:
            return self.template.rendered(messages, self.tools, prompt, self.marks)
        except DataError:
            return None

    def _place(self, i: int, text: _Text | None = None) -> Span | None:
        """From the first to the last that is seen of message i in a text (the whole
        conversation's); None: marks do not show it."""
        if not self._places:
            self._find_all()
        text = self.whole if text is None else text
        key = (i, text.count, text.prompt)
        if key not in self._places:
            self._places[key] = self._find(i, text)
        return self._places[key]

    def _find_all(self) -> None:
        """The places of all messages in the whole text by one rendering, where none of their marks
        is lost or written twice, and their order is sure: what is said beside tool calls a template
        may put behind what the tools gave."""
        self._places[-1, -1, False] = None
        if any(message.get("tool_calls") and message.get("content") for message in self.messages):
            return
        mark = self.marks.said
        marked = [mark_message(message, mark, mark) for message in self.messages]
        counts = [json.dumps(each, ensure_ascii=False).count(mark) for each in marked]
        found = self._rendered(marked, False)
        if found is None or found.text != self.text or len(found.said) != sum(counts):
            return
        said = iter(found.said)
        for i, count in enumerate(counts):
            own = [next(said) for _ in range(count)]
            if own:
                self._places[i, self.whole.count, False] = own[0], own[-1]

    def _find(self, i: int, text: _Text) -> Span | None:
        if i >= text.count:
            return None
        for front in (self.marks.said, ""):  # a template may ask what a content begins with
            messages = list(self.messages[: text.count])
            messages[i] = mark_message(messages[i], front, self.marks.said)
            placed = json.dumps(messages[i], ensure_ascii=False).count(self.marks.said)
            found = self._rendered(messages, text.prompt)
            if found and found.text == text.text and 0 < len(found.said) <= placed:
                return found.said[0], found.said[-1]
        return None

    def _doubt(self, i: int) -> DataError:
        return DataError(
            f"the chat template ({self.template.name}) does not show what is said in message "
            f"{i + 1}: it changes, drops or repeats it. Put {{% generation %}} … "
            "{% endgeneration %} around the assistant's turns in a Jinja file and set "
            "data.chat_template to that, or to a built-in one"
        )


# ---- texts ---------------------------------------------------------------------------------


def _alike(one: str, other: str) -> int:
    """How many characters at the front are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shared(written: str, found: str, special: Sequence[str]) -> int:
    """How much of `written` stands at the front of `found`, no special token or tag taken in
    part."""
    count = _alike(written, found)
    if count < len(written):
        for text in (written, found):
            for pattern in (_pattern(special), _TAG):
                for token in pattern.finditer(text):
                    if token.start() < count < token.end():
                        count = token.start()
    return count


_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


@lru_cache(maxsize=16)
def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of these tokens, the longest that does."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


@lru_cache(maxsize=16)
def _generation_prompt(template: Template) -> str:
    """What the template writes behind a user's words for the assistant to go on."""
    user = {"role": "user", "content": "x"}
    try:
        asked = template.render([user])
        prompt = template.render([user], add_generation_prompt=True)
    except DataError:
        return ""
    return prompt[_alike(asked, prompt) :]


@lru_cache(maxsize=16)
def _takes_reasoning(template: Template) -> bool:
    """Whether the template writes the reasoning of a last turn."""
    user = {"role": "user", "content": "x"}
    plain = {"role": ASSISTANT, "content": "y"}
    try:
        return template.render([user, {**plain, REASONING[0]: "z"}]) != template.render(
            [user, plain]
        )
    except DataError:
        return False

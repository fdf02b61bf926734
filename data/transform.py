"""From a record to the pieces that are packed: tokens, and which of them are learnt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from omnistep.data.chat import Message, Template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.pack import Size
from omnistep.data.patches import Vision
from omnistep.data.tokenizer import Tokenizer


@frozen(eq=False)
class Tokens:
    """What a transform makes: one piece, never split again, attended to only by itself."""

    ids: np.ndarray
    """int32 [tokens]."""
    learn: np.ndarray | None = None
    """bool [tokens]: the model is to learn to predict this token; None: all of them."""
    cut: int = 0
    """Tokens that were cut off, because the sample is longer than a piece may be."""
    vision: Vision | None = None
    """Its images; None: it has none."""

    @property
    def patches(self) -> int:
        return 0 if self.vision is None else len(self.vision.pixels)

    @property
    def size(self) -> Size:
        return len(self.ids), self.patches


Transform = Callable[[Record], list[Tokens]]
"""Pure and picklable: it runs in worker processes."""


@frozen(eq=False)
class Plaintext:
    """Tokenise, append EOS where the document ends, cut into pieces of at most `max_len` tokens."""

    tokenizer: Tokenizer
    max_len: int
    keys: Sequence[str] = ("content_split",)

    def __call__(self, record: Record) -> list[Tokens]:
        ids = self.tokenizer.encode(text_of(record, self.keys))
        if record.ends_document:
            ids.append(self.tokenizer.eos_id)
        array = np.array(ids, np.int32)
        return [Tokens(array[i : i + self.max_len]) for i in range(0, len(array), self.max_len)]


@frozen(eq=False)
class Conversation:
    """Render by the chat template, tokenise; learn the assistant's turns. What is longer than
    `max_len` tokens is cut at the front, so that the last turn stays."""

    tokenizer: Tokenizer
    max_len: int
    template: Template
    keys: Sequence[str] = ("messages",)

    def __call__(self, record: Record) -> list[Tokens]:
        messages = messages_of(record, self.keys)
        tools = None if isinstance(record.content, str) else record.content.get("tools")
        try:
            text, spans = self.template.learnt(messages, tools)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error
        if not spans:
            roles = ", ".join(sorted({message["role"] for message in messages}))
            raise DataError(
                f"{record.where}: nothing to learn, no message of role assistant (roles: {roles})"
            )
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        learnt = np.zeros(len(text) + 1, np.int64)  # characters to learn before each one
        for start, stop in spans:
            learnt[start + 1 : stop + 1] = 1
        learnt = learnt.cumsum()
        learn = learnt[offsets[:, 1]] > learnt[offsets[:, 0]]
        cut = max(0, len(ids) - self.max_len)
        if not learn[cut + 1 :].any():
            raise DataError(
                f"{record.where}: nothing to learn in its last {self.max_len} tokens "
                "(data.max_seq_len); the assistant speaks before them"
            )
        return [Tokens(ids[cut:], learn[cut:], cut)]


def messages_of(record: Record, keys: Sequence[str]) -> list[Message]:
    """The messages of a record: under the first of `keys` that is present, each with a role and a
    content of text (or parts that are all text). Raises DataError that names the message."""
    key, value = field_of(record, keys)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"{record.where}: {key!r} must hold a list of messages, it holds {kind}")
    return [
        _message(message, f"{record.where}, message {number}")
        for number, message in enumerate(value, 1)
    ]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: expected {{role, content}}, got {_short(message)}")
    if message.get("loss_mask", 0) not in (0, 1):
        raise DataError(f"{where}: loss_mask is 0 or 1, got {_short(message['loss_mask'])}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{where}: the content must be a text, it is {_short(content)}")
    # columns of a table are there for every row: what is None is not given
    return {**{k: v for k, v in message.items() if v is not None}, "content": content or ""}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part["text"], str):
        return part["text"]
    raise DataError(f"{where}: only parts of type text are available yet, got {_short(part)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def text_of(record: Record, keys: Sequence[str]) -> str:
    """The text of a record: itself, or its field under the first of `keys` that is present."""
    if isinstance(record.content, str):
        return record.content
    key, text = field_of(record, keys)
    if isinstance(text, str):
        return text
    kind = type(text).__name__
    raise DataError(f"{record.where}: {key!r} must hold a text, it holds a {kind}")


def field_of(record: Record, keys: Sequence[str]) -> tuple[str, Any]:
    """The first of `keys` that a record has, and what stands there."""
    if isinstance(record.content, str):
        raise DataError(
            f"{record.where}: a record with the field {keys[0]!r} is expected, not text"
        )
    for key in keys:
        if key in record.content:
            return key, record.content[key]
    raise DataError(
        f"{record.where}: none of the keys {list(keys)} (data.text_keys) is in the record; "
        f"it has {sorted(record.content)}"
    )

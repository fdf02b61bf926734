"""From a record to the pieces that are packed: tokens, and which of them are learnt."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
from attrs import frozen
from jaxtyping import Bool, Int32

from omnistep.data.chat import Message, Span, Template
from omnistep.data.errors import DataError, NothingToLearn
from omnistep.data.files.records import Record
from omnistep.data.image_tokens import expand, with_times
from omnistep.data.images import Clip, open_clip, see
from omnistep.data.messages import read_messages, read_tools
from omnistep.data.pack import Size
from omnistep.data.patches import ImageRules, Vision
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.turns import learnt


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
    """Renders by the chat template and tokenises; the assistant's turns are learnt, but not what
    stands for images in them.

    Of what is longer than `max_len` tokens, all behind the last that is learnt is left out, then
    as much as need be at the front, so that the last turn stays; a conversation that would lose an
    image by that is refused. One with nothing to learn is NothingToLearn.
    """

    tokenizer: Tokenizer
    max_len: int
    template: Template
    keys: Sequence[str] = ("messages",)
    images: ImageRules | None = None
    """None: the model takes none."""
    image_keys: Sequence[str] = ("images",)

    def __call__(self, record: Record) -> list[Tokens]:
        key, content = field_of(record, self.keys)
        image_keys = None if self.images is None else self.image_keys
        said = read_messages(record, content, key, image_keys)
        tools = read_tools(record)
        try:
            text, spans = learnt(self.template, said.messages, tools)
            if not spans:
                raise NothingToLearn(f"nothing to learn{_why(said.messages)}")
            clips = [open_clip(source, record.folder) for source in said.sources]
            tokens = tokens_of(text, spans, clips, self.tokenizer, self.images)
            return [_cut(tokens, self.max_len)]
        except DataError as error:
            raise type(error)(f"{record.where}: {error}") from error


def _why(messages: Sequence[Message]) -> str:
    roles = sorted({message["role"] for message in messages})
    if "assistant" in roles:
        return ": no message of role assistant has a text and a loss_mask of 1"
    return f", no message of role assistant (roles: {', '.join(roles)})"


def tokens_of(
    text: str,
    spans: Sequence[Span],
    clips: Sequence[Clip],
    tokenizer: Tokenizer,
    images: ImageRules | None,
    *,
    add_special_tokens: bool = False,
) -> Tokens:
    """The tokens of a text, such as a rendered conversation, in which one token stands for each of
    its images and videos; `spans` are the parts to learn. Raises DataError where these do not fit
    together."""
    tokenised = partial(_tokenised, tokenizer=tokenizer, add_special_tokens=add_special_tokens)
    if images is None:
        return Tokens(*tokenised(text, spans))
    pixels, grids = see(clips, images)
    if images.timestamps and images.video_token is not None:
        token, *around = (
            tokenizer.text_of(i)
            for i in (images.video_token, images.vision_start, images.vision_end)
        )
        text, spans = with_times(text, spans, grids, token, (around[0], around[1]))
    made = expand(*tokenised(text, spans), pixels, grids, images)
    return Tokens(made.ids, made.learn, vision=made.vision if grids else None)


def _tokenised(
    text: str, spans: Sequence[Span], *, tokenizer: Tokenizer, add_special_tokens: bool
) -> tuple[Int32[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
    """Ids, and which of them are to be learnt."""
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens)
    learn = np.zeros(len(ids), np.bool_)
    for start, stop in spans:
        (inside,) = np.nonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        if len(inside):  # with tokens between them that cover nothing
            learn[inside[0] : inside[-1] + 1] = True
    return ids, learn


def _cut(tokens: Tokens, longest: int) -> Tokens:
    """At most `longest` tokens, the last of them learnt."""
    learn, vision, count = tokens.learn, tokens.vision, len(tokens.ids)
    if learn is None or not learn[1:].any():
        raise NothingToLearn("nothing to learn: no token of an assistant's turn")
    if count <= longest:
        return tokens
    last = int(np.flatnonzero(learn)[-1])
    if vision is not None:
        last = max(last, int(np.flatnonzero(vision.units >= 0)[-1]))
    stop, cut = last + 1, max(0, last + 1 - longest)
    if cut and vision is not None and cut >= (first := int(np.argmax(vision.units >= 0))):
        raise DataError(
            f"it has {count} tokens; to cut it to {longest} (data.max_seq_len) would take away "
            f"images, which begin at token {first}: raise data.max_seq_len, or set a smaller "
            "data.max_patches"
        )
    if vision is not None:
        # the cut part is all text
        rope = None if vision.rope is None else vision.rope[cut:stop] - cut
        vision = attrs.evolve(vision, units=vision.units[cut:stop], rope=rope)
    if not learn[cut + 1 : stop].any():
        raise NothingToLearn(f"nothing to learn in its last {longest} tokens (data.max_seq_len)")
    return Tokens(tokens.ids[cut:stop], learn[cut:stop], cut, vision)


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

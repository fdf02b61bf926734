"""The messages of a record, and the images and videos that stand in them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, frozen

from omnistep.data.chat import REASONING, Message, are_parts
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record, without_nulls
from omnistep.data.images import Source, short

VIDEO_KEYS = ("videos",)
"""The field for the videos of a record, as data.image_keys are for its images."""
PLACEHOLDERS = {False: "<image>", True: "<video>"}
"""Stand in a text for the record's next image, next video."""
TYPES = {"image": False, "image_url": False, "video": True, "video_url": True}
"""Types of parts, and whether they are videos."""
GIVEN = ("url", "path", "base64", "bytes")
"""Where a part may hold its image, beside its own type's name."""


@frozen(eq=False)
class Said:
    """What a record says."""

    messages: list[Message]
    """Each content is a text, or parts of type text, image and video, of which those of text alone
    hold something; what a tool gave may be any value; a message of tool calls or reasoning alone
    has no content."""
    sources: list[Source]
    """The images and videos, in the order of their parts."""


def read_messages(record: Record, content: Any, key: str, image_keys: Sequence[str] | None) -> Said:
    """The messages under `key`, whose value is `content`; each with a role and a content of text or
    parts. Images are those of the parts; a part that has none, and `<image>` in a text of a record
    with images, take the next of those under the first of `image_keys` (None: the model takes no
    images). Raises DataError that names the message."""
    content = _from_json(content)
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else f"a {type(content).__name__}"
        raise DataError(f"{record.where}: {key!r} must hold a list of messages, it holds {kind}")
    pools = {
        False: _pool(record, image_keys or ("images",), False),
        True: _pool(record, VIDEO_KEYS, True),
    }
    if image_keys is None:
        if any(pool.values for pool in pools.values()):
            raise _no_images(record.where)
        pools = {}
    sources: list[Source] = []
    messages = [
        _message(message, f"{record.where}, message {number}", pools, sources)
        for number, message in enumerate(content, 1)
    ]
    for pool in pools.values():
        pool.check_empty()
    return Said(messages, sources)


def read_tools(record: Record) -> list[Mapping[str, Any]] | None:
    """Reads a record's `tools`: a list of JSON schemas, or JSON of one, as tables hold it. None:
    it has none. Raises DataError."""
    given = record.content.get("tools") if isinstance(record.content, Mapping) else None
    if given is None or given == "":
        return None
    tools = _from_json(given)
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"{record.where}: 'tools' must be a list of objects (JSON schemas of functions), or "
            f"JSON of such a list; it is {short(given)}"
        )
    return without_nulls(tools)


def _from_json(value: Any) -> Any:
    """What a text holds that is JSON of a list or object; else the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _no_images(where: str) -> DataError:
    return DataError(
        f"{where}: it has images, but the model takes none (its config.json has no vision tower); "
        "take them out, or give a model that does"
    )


@define
class _Pool:
    """The images (or videos) beside a record's messages, to be taken one by one."""

    where: str
    video: bool
    key: str | None
    """None: the record has no such field."""
    values: list[Any]
    taken: int = 0

    def take(self) -> Source:
        if self.taken == len(self.values):
            raise DataError(
                f"{self.where}: its messages have more places for {self._name} than the "
                f"{len(self.values)} it has under {self.key or 'no key'!r} (data.image_keys)"
            )
        self.taken += 1
        return _source(self.values[self.taken - 1], self.video, self.where)

    def check_empty(self) -> None:
        if self.taken < len(self.values):
            raise DataError(
                f"{self.where}: it has {len(self.values)} {self._name} under {self.key!r}, but its "
                f"messages have {self.taken} places for them: write {PLACEHOLDERS[self.video]} "
                "where each belongs"
            )

    @property
    def _name(self) -> str:
        return "videos" if self.video else "images"


Pools = Mapping[bool, _Pool]


def _pool(record: Record, keys: Sequence[str], video: bool) -> _Pool:
    fields = record.content if isinstance(record.content, Mapping) else {}
    key = next((key for key in keys if fields.get(key) is not None), None)
    found = fields[key] if key else []
    if isinstance(found, list | tuple):
        return _Pool(record.where, video, key, list(found))
    # a .csv has a text in every column: an empty one is no path
    return _Pool(record.where, video, key, [] if found == "" else [found])


def _message(message: Any, where: str, pools: Pools, sources: list[Source]) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: expected {{role, content}}, got {short(message)}")
    # columns of a table are there for every row: what is None is not given
    message = {name: value for name, value in message.items() if value is not None}
    if message.get("loss_mask", 0) not in (0, 1):
        raise DataError(f"{where}: loss_mask is 0 or 1, got {short(message['loss_mask'])}")
    calls = _from_json(message.get("tool_calls", []))
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"{where}: tool_calls must be a list of objects, it is {short(message['tool_calls'])}"
        )
    if "tool_calls" in message:
        message["tool_calls"] = calls
    content = message.get("content")
    if content is None and (calls or any(message.get(name) for name in REASONING)):
        return message
    if isinstance(content, str):
        parts = list(_parts({"type": "text", "text": content}, where, pools, sources))
        texts = [part.get("text") for part in parts]
        return {**message, "content": parts if None in texts else "".join(map(str, texts))}
    if message["role"] not in SPEAKERS and not _known_parts(content):
        return message  # what a tool gave: any value, as the template takes it
    if not isinstance(content, list):
        raise DataError(f"{where}: the content must be a text or parts, it is {short(content)}")
    parts = [each for part in content for each in _parts(part, where, pools, sources)]
    return {**message, "content": parts}


SPEAKERS = ("system", "developer", "user", "assistant")
"""Whose content is a text or parts."""


def _known_parts(content: Any) -> bool:
    return are_parts(content) and all(part["type"] in ("text", *TYPES) for part in content)


def _parts(part: Any, where: str, pools: Pools, sources: list[Source]) -> Iterator[dict[str, str]]:
    """A part as templates get it; a text with placeholders in several."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        known = {PLACEHOLDERS[video]: pool for video, pool in pools.items() if pool.key}
        texts = re.split(f"({'|'.join(known)})", part["text"]) if known else [part["text"]]
        for text in texts:
            if text in known:
                sources.append(known[text].take())
                yield {"type": "video" if known[text].video else "image"}
            elif text or len(texts) == 1:
                yield {"type": "text", "text": text}
    elif isinstance(kind, str) and kind in TYPES:
        if not pools:
            raise _no_images(where)
        video = TYPES[kind]
        name = "video" if video else "image"
        given = next((part[k] for k in (name, kind, *GIVEN) if part.get(k) is not None), None)
        if isinstance(given, Mapping) and isinstance(given.get("url"), str):
            given = given["url"]
        sources.append(
            pools[video].take() if given is None else _source(given, video, where, part.get("fps"))
        )
        yield {"type": name}
    else:
        raise DataError(f"{where}: a part is of type text, image or video, got {short(part)}")


def _source(value: Any, video: bool, where: str, fps: Any = None) -> Source:
    if video and isinstance(value, Mapping):
        fps = value.get("fps") if fps is None else fps
        frames = next((value[k] for k in ("frames", "video", "url") if value.get(k)), None)
        value = value if frames is None else frames
    if fps is not None and not isinstance(fps, int | float):
        raise DataError(f"{where}: the fps of a video must be a number, got {short(fps)}")
    return Source(value, video, fps)

"""Marks in a message: where what is said of it comes out of a template."""

from collections.abc import Mapping, Sequence
from typing import Any

from omnistep.data.chat import REASONING, Message


def reasoning(message: Message) -> Any:
    return next((message[name] for name in REASONING if message.get(name)), None)


def take_out(message: Message, names: Sequence[str]) -> Message:
    kept = {name: value for name, value in message.items() if name not in names}
    return kept if "content" in kept else {**kept, "content": ""}


def mark_message(message: Message, front: str, back: str) -> Message:
    """The message with marks around its content, its reasoning and the names of its tool calls,
    inside any blanks, so that a template may strip them."""
    marked = dict(message)
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
        texts = [p for p in parts if isinstance(p, dict) and str(p.get("text", "")).strip()]
        if texts:
            texts[0]["text"] = _around(texts[0]["text"], front, "")
            texts[-1]["text"] = _around(texts[-1]["text"], "", back)
        marked["content"] = parts
    elif isinstance(content, str) and content.strip():
        marked["content"] = _around(content, front, back)
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            marked[name] = _around(message[name], front, back)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        marked["tool_calls"] = [_mark_call(call, front, back) for call in calls]
    if marked == dict(message) and isinstance(content, str):
        marked["content"] = content + back
    return marked


def _mark_call(call: Mapping[str, Any], front: str, back: str) -> Mapping[str, Any]:
    """A tool call with marks in its arguments; without any at its name, which what the tool gave
    may repeat."""
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        return call
    arguments = _mark_texts(inner.get("arguments"), front, back)
    if arguments != inner.get("arguments"):
        inner = {**inner, "arguments": arguments}
    elif isinstance(inner.get("name"), str):
        inner = {**inner, "name": front + inner["name"] + back}
    return {**call, "function": inner} if "function" in call else inner


def _mark_texts(value: Any, front: str, back: str) -> Any:
    if isinstance(value, str) and value.strip():
        return _around(value, front, back)
    if isinstance(value, Mapping):
        return {name: _mark_texts(each, front, back) for name, each in value.items()}
    if isinstance(value, list):
        return [_mark_texts(each, front, back) for each in value]
    return value


def _around(text: str, front: str, back: str) -> str:
    """Puts these around what is not blank of a text."""
    core = text.strip()
    head, _, tail = text.partition(core)
    return head + front + core + back + tail

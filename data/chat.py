"""Messages to text by a tokenizer's own chat template, without importing transformers."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from omnistep.data.errors import DataError

Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The conversation as one text, as transformers' apply_chat_template writes it.

    `special_tokens` are the names templates use: bos_token, eos_token, ... Raises DataError when
    the template can't be read or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except Exception as error:  # a template's own mistakes are a TypeError, a KeyError, …
        raise DataError(f"the chat template does not take this conversation: {error}") from error


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


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""A Hugging Face tokenizer directory, read without importing transformers (which takes seconds)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from attrs import field, frozen
from jaxtyping import Int32, Int64

from omnistep.data.errors import DataError


@frozen(eq=False)
class Tokenizer:
    """Text to token ids and back; picklable, so it travels to worker processes."""

    backend: tokenizers.Tokenizer = field(repr=False)
    path: str
    """The tokenizer.json it was read from."""
    vocab_size: int
    """Highest id + 1, added tokens included: what a model's embedding must hold."""
    eos_id: int
    pad_id: int | None = None
    chat_template: str | None = field(default=None, repr=False)
    """The Jinja text of the tokenizer's own template."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; by default no BOS or EOS is put around it."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[Int32[np.ndarray, "tokens"], Int64[np.ndarray, "tokens 2"]]:
        """Ids of `text`, and for each token the characters it covers: from, to. BOS and EOS, which
        by default are not put around it, cover none."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of one entry of the vocabulary, such as `<|im_end|>`; None when there is none."""
        return self.backend.token_to_id(token)

    def text_of(self, token: int | None) -> str:
        """One entry of the vocabulary, by its id. Raises DataError when there is none."""
        text = None if token is None else self.backend.id_to_token(token)
        if text is None:
            raise DataError(
                f"the tokenizer {self.path} has no token of id {token}, which the model's "
                "config.json names for images: set model.tokenizer_path to this model's tokenizer"
            )
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a directory with tokenizer.json, or that file itself.

    EOS and padding are looked for in tokenizer_config.json, special_tokens_map.json,
    generation_config.json and config.json, in this order. Raises DataError when there is no
    tokenizer.json or no EOS.
    """
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {str(path)!r}: looked for {file.absolute()}. Give a directory that "
            "holds a tokenizer.json (transformers' save_pretrained writes one), or that file"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        message = f"{file} is not a tokenizer.json of the tokenizers library: {error}"
        raise DataError(message) from error
    names = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "config.json",
    )
    configs = [_read_json(file.parent / name) for name in names]
    eos_id = _special_id(backend, configs, "eos")
    if eos_id is None:
        raise DataError(
            f"the tokenizer {file} names no EOS token: looked for `eos_token` and `eos_token_id` "
            f"in {', '.join(names)} beside it. Add `eos_token` to tokenizer_config.json"
        )
    return Tokenizer(
        backend=backend,
        path=str(file),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=eos_id,
        pad_id=_special_id(backend, configs, "pad"),
        chat_template=_chat_template(file.parent, configs[0]),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


def _special_id(
    backend: tokenizers.Tokenizer, configs: Iterable[dict[str, Any]], name: str
) -> int | None:
    """The first id under `<name>_token` (a text or an AddedToken) or `<name>_token_id`."""
    for config in configs:
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (found := backend.token_to_id(text)) is not None:
            return found
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
    return None


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the config's text, or its list's entry called `default`."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template

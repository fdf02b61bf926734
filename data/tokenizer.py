"""A Hugging Face tokenizer directory, read without importing transformers (which takes seconds)."""

import json
from collections.abc import Iterable, Mapping
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
    tool_use_template: str | None = field(default=None, repr=False)
    """That of conversations with tools, where it is another."""
    special_tokens: tuple[str, ...] = field(default=(), repr=False)
    """The texts of all special tokens, in the order of their ids."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokenises `text`; by default no BOS or EOS is put around it. Raises DataError where the
        tokenizer can't."""
        return self._encoding(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[Int32[np.ndarray, "tokens"], Int64[np.ndarray, "tokens 2"]]:
        """Tokenises `text`; gives for each token the characters it covers, too: from, to. BOS and
        EOS, which by default are not put around it, cover none. Raises as `encode`."""
        encoding = self._encoding(text, add_special_tokens)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            # a regex that gives up panics in Rust, and pyo3's panic is no Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                what = f"the tokenizer {self.path} fails on a text of {len(text):,} characters"
                raise DataError(f"{what}: {error}") from error
            raise

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

    As transformers' AutoTokenizer does, it adds the tokens that only tokenizer_config.json names,
    and leaves aside a truncation and a padding that tokenizer.json was saved with. EOS and padding
    are looked for in tokenizer_config.json, special_tokens_map.json, generation_config.json and
    config.json, in this order. Raises DataError: there is no tokenizer.json, no EOS, or a file
    beside it can't be read.
    """
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {str(path)!r}: looked for {file.absolute()}. Give a directory that "
            "holds a tokenizer.json (transformers' save_pretrained writes one), or that file"
        )
    names = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "config.json",
    )
    backend = _read_backend(file)
    configs = [read_json(file.parent / name) for name in names]
    _add_tokens(backend, configs[0], file.parent)
    eos_id = _special_id(backend, configs, "eos")
    if eos_id is None:
        raise DataError(
            f"the tokenizer {file} names no EOS token: looked for `eos_token` and `eos_token_id` "
            f"in {', '.join(names)} beside it. Add `eos_token` to tokenizer_config.json"
        )
    added = backend.get_added_tokens_decoder()
    templates = _chat_templates(file.parent, configs[0])
    return Tokenizer(
        backend=backend,
        path=str(file),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=eos_id,
        pad_id=_special_id(backend, configs, "pad"),
        chat_template=templates.get("default"),
        tool_use_template=templates.get("tool_use"),
        special_tokens=tuple(added[i].content for i in sorted(added) if added[i].special),
    )


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and panics
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            message = f"{file} is not a tokenizer.json of the tokenizers library: {error}"
            raise DataError(message) from error
        raise
    backend.no_truncation()
    backend.no_padding()
    if backend.post_processor is not None:
        # offsets without the blanks of a token would leave tokens of blanks alone without a place
        processor = backend.post_processor
        state = processor.__getstate__()
        processor.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = processor
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Adds the tokens that the files beside tokenizer.json name and it does not have, in the order
    of transformers' TokenizersBackend (tokenization_utils_tokenizers.py)."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        try:
            tokens = [listed[key] for key in sorted(listed, key=int)]
        except ValueError as error:
            where = directory / "tokenizer_config.json"
            raise DataError(f"{where}: a key of added_tokens_decoder is no id: {error}") from error
    else:
        config = {**config, **read_json(directory / "special_tokens_map.json")}
        added = read_json(directory / "added_tokens.json")
        tokens = sorted(added, key=lambda text: str(added[text]).zfill(12))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    special = [token for name, token in config.items() if name.endswith("_token")] + extra
    texts = {_text_of_token(token) for token in special}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in [*tokens, *special]:
        text = _text_of_token(token)
        if not text or text in known:
            continue
        known.add(text)
        how = dict(token) if isinstance(token, dict) else {"normalized": text not in texts}
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        added = {flag: bool(how[flag]) for flag in flags if flag in how}
        is_special = text in texts or bool(how.get("special", False))
        try:
            backend.add_tokens([tokenizers.AddedToken(text, special=is_special, **added)])
        except UnicodeEncodeError as error:
            where = directory / "tokenizer_config.json"
            raise DataError(f"{where}: a token is no text: {error}") from error


def _text_of_token(token: Any) -> str | None:
    """Of a token as the files name it: a text, or an AddedToken's fields."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no such file. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


def read_jinja(path: Path) -> str:
    """Reads a template. Raises DataError when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {path} is not UTF-8: {error}") from error


def _special_id(
    backend: tokenizers.Tokenizer, configs: Iterable[dict[str, Any]], name: str
) -> int | None:
    """The first id under `<name>_token` (a text or an AddedToken) or `<name>_token_id`."""
    for config in configs:
        text = _text_of_token(config.get(f"{name}_token"))
        if text is not None and (found := backend.token_to_id(text)) is not None:
            return found
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
    return None


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokenizer's templates by name: those of tokenizer_config.json (one, or a list of named
    ones), under those of chat_template.jinja (`default`) and additional_chat_templates/."""
    given = config.get("chat_template")
    where = directory / "tokenizer_config.json"
    if isinstance(given, str):
        found = {"default": given}
    elif isinstance(given, list | dict):
        entries = given.items() if isinstance(given, dict) else map(_named_template, given)
        found = {name: text for name, text in entries if name}
    else:
        found = {}
    if given and not (found and all(isinstance(text, str) for text in found.values())):
        raise DataError(
            f"{where}: chat_template must be a text, or a list of objects with name and template"
        )
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    found |= {file.stem: read_jinja(file) for file in more}
    file = directory / "chat_template.jinja"
    return found | {"default": read_jinja(file)} if file.is_file() else found


def _named_template(entry: Any) -> tuple[str | None, Any]:
    fields = entry if isinstance(entry, dict) else {}
    return fields.get("name"), fields.get("template")

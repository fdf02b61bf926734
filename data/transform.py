"""From a record to the pieces that are packed: tokens, and which of them are learnt."""

from collections.abc import Callable, Sequence

import numpy as np
from attrs import frozen

from omnistep.data.errors import DataError
from omnistep.data.readers import Record
from omnistep.data.tokenizer import Tokenizer


@frozen(eq=False)
class Tokens:
    """What a transform makes: one piece, never split again, attended to only by itself."""

    ids: np.ndarray
    """int32 [tokens]."""
    learn: np.ndarray | None = None
    """bool [tokens]: the model is to learn to predict this token; None: all of them."""


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


def text_of(record: Record, keys: Sequence[str]) -> str:
    """The text of a record: itself, or its field under the first of `keys` that is present."""
    if isinstance(record.content, str):
        return record.content
    for key in keys:
        if key in record.content:
            text = record.content[key]
            if isinstance(text, str):
                return text
            kind = type(text).__name__
            raise DataError(f"{record.where}: {key!r} must hold a text, it holds a {kind}")
    raise DataError(
        f"{record.where}: none of the keys {list(keys)} (data.text_keys) is in the record; "
        f"it has {sorted(record.content)}"
    )

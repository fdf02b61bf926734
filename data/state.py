"""The position in the stream of batches: a small value, in global terms, that JSON can hold."""

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field, frozen

from omnistep.data.errors import DataError

PieceId = tuple[int, int, int, int]
"""epoch, block (of that epoch's order), sample (in the source), piece (of that sample)"""


@frozen
class DataState:
    """What has been given so far; from it the stream goes on identically, by rereading one block
    and the samples of the held pieces, whatever the number of workers and data ranks."""

    step: int = 0
    """Batches given: bsz_warmup counts them."""
    epoch: int = 0
    block: int = 0
    """The block of the epoch's order from which the last row came."""
    row: int = 0
    """Rows given of those planned when that block arrived."""
    piece: int = 0
    """Pieces given of the next row (bsz_warmup gives rows in parts)."""
    held: tuple[PieceId, ...] = ()
    """Pieces of earlier blocks that waited for room when that block arrived, oldest first."""
    made_with: Mapping[str, int] = field(factory=dict)
    """What the stream's plan depends on; empty at the start."""

    def to_json(self) -> dict[str, Any]:
        """Plain ints, lists and a dict, as `json.dumps` takes them."""
        return {
            **attrs.asdict(self, recurse=False),
            "held": [list(piece) for piece in self.held],
            "made_with": dict(self.made_with),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "DataState":
        """The inverse of `to_json`."""
        names = {attribute.name for attribute in attrs.fields(DataState)}
        if set(value) != names:
            raise DataError(f"a data position has the fields {sorted(names)}; got {sorted(value)}")
        held = tuple(
            (int(epoch), int(block), int(sample), int(piece))
            for epoch, block, sample, piece in value["held"]
        )
        return DataState(**{**value, "held": held})


def check_made_with(state: DataState, now: Mapping[str, int]) -> None:
    """Raises DataError, naming the difference, when `state` belongs to another stream."""
    before = state.made_with
    changed = [
        f"{name} was {before.get(name)}, is {now[name]}"
        for name in now
        if before and before.get(name) != now[name]
    ]
    if changed:
        raise DataError(
            "the data position of the checkpoint belongs to other data or data arguments: "
            f"{'; '.join(changed)}. Set them back, or start the data anew"
        )

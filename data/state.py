"""The position in the stream of batches: a small value, in global terms, that JSON can hold."""

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field, frozen

from omnistep.data.errors import DataError

PieceId = tuple[int, int, int]
"""arrival (which block of the run brought it), sample (in the source), piece (of that sample)"""


@frozen
class DataState:
    """What has been given so far; from it the stream goes on identically, by rereading one block
    and the samples of the held pieces, whatever the number of workers and ranks."""

    step: int = 0
    """Batches given: bsz_warmup counts them."""
    epoch: int = 0
    shard: int = 0
    """The shard of the epoch's order, and"""
    block: int = 0
    """the block of the shard, from which the last row came."""
    arrival: int = 0
    """Which block of the run that is."""
    row: int = 0
    """Rows given of those planned when that block arrived."""
    piece: int = 0
    """Pieces given of the next row (bsz_warmup gives rows in parts)."""
    held: tuple[PieceId, ...] = ()
    """Pieces of earlier blocks that waited for room when that block arrived, oldest first."""
    given: tuple[tuple[int, int], ...] = ()
    """Samples and tokens given of each of the sources that are mixed."""
    skipped: int = 0
    """Records that could not be read as training data, in the blocks read so far."""
    unlearnt: int = 0
    """Records of which nothing is to be learnt; they are left out, too."""
    cut: int = 0
    """Samples cut to the length of a row."""
    made_with: Mapping[str, int | float | str] = field(factory=dict)
    """What the stream's plan depends on; empty at the start."""

    def to_json(self) -> dict[str, Any]:
        """Plain ints, lists and a dict, as `json.dumps` takes them."""
        return {
            **attrs.asdict(self, recurse=False),
            "held": [list(piece) for piece in self.held],
            "given": [list(counts) for counts in self.given],
            "made_with": dict(self.made_with),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "DataState":
        """The inverse of `to_json`."""
        names = {attribute.name for attribute in attrs.fields(DataState)}
        if set(value) != names:
            raise DataError(f"a data position has the fields {sorted(names)}; got {sorted(value)}")
        held, given = (tuple(map(tuple, value[name])) for name in ("held", "given"))
        return DataState(**{**value, "held": held, "given": given})


def check_made_with(state: DataState, now: Mapping[str, int | float | str]) -> None:
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
            f"{'; '.join(changed)}. Set them back, or set train.restart_data to read the new data "
            "from its start"
        )

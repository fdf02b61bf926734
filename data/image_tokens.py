"""One token in a text for each image becomes as many as the image has units, and tokens get
positions in time, height and width."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from jaxtyping import Bool, Int32

from omnistep.data.chat import Span
from omnistep.data.errors import DataError
from omnistep.data.patches import Grid, ImageRules, Vision, bounds_of, unit_places


@frozen(eq=False)
class Expanded:
    """Tokens of a text with images."""

    ids: Int32[np.ndarray, "tokens"]
    learn: Bool[np.ndarray, "tokens"]
    """False for what stands for an image."""
    vision: Vision


def with_times(
    text: str, spans: Sequence[Span], grids: Sequence[Grid], token: str, around: tuple[str, str]
) -> tuple[str, list[Span]]:
    """For each video's `token` in the text one for each of its frames, behind the frame's time and
    between the texts `around` it, as models/qwen3_vl/processing_qwen3_vl.py writes them; and the
    spans moved along."""
    videos = [grid for grid in grids if grid.video]
    parts = text.split(token)
    if len(parts) - 1 != len(videos):
        raise _miscounted(token, len(parts) - 1, len(videos))
    start, end = around
    written, grown, at = parts[0], [], len(parts[0])
    for grid, part in zip(videos, parts[1:], strict=True):
        frames = "".join(f"<{time:.1f} seconds>{start}{token}{end}" for time in grid.seconds)
        grown.append((at, len(frames) - len(token)))
        written += frames + part
        at += len(token) + len(part)

    def moved(place: int) -> int:
        return place + sum(more for position, more in grown if position < place)

    return written, [(moved(a), moved(b)) for a, b in spans]


def expand(
    ids: Int32[np.ndarray, "tokens"],
    learn: Bool[np.ndarray, "tokens"],
    pixels: np.ndarray,
    grids: Sequence[Grid],
    rules: ImageRules,
) -> Expanded:
    """`ids` has one image (or video) token for each grid, in their order; with `timestamps` one for
    each frame of a video. Raises DataError where it has more or fewer."""
    shown = _shown(grids, rules)
    places = np.flatnonzero(np.isin(ids, rules.tokens))
    for token, video in zip(rules.tokens, (False, True), strict=False):
        found, wanted = int((ids == token).sum()), sum(e.video == video for e in shown)
        if found != wanted:
            raise _miscounted(f"token {token}", found, wanted)
    order = [bool(ids[place] != rules.image_token) for place in places]
    if order != [each.video for each in shown]:
        raise DataError("the chat template puts images and videos into another order than theirs")
    counts = np.ones(len(ids), np.int64)
    counts[places] = [each.units.size for each in shown]
    long = np.repeat(ids, counts)
    units = np.full(len(long), -1, np.int32)
    stands = np.repeat(np.isin(np.arange(len(ids)), places), counts)
    units[stands] = np.concatenate([np.zeros(0, np.int64), *(e.units.reshape(-1) for e in shown)])
    rope = (
        _rope(np.cumsum(counts) - counts, places, shown, len(long), rules) if rules.rope else None
    )
    return Expanded(
        long,
        np.repeat(learn, counts) & ~stands,
        Vision(pixels, *bounds_of(grids, rules), units, rope),
    )


@frozen(eq=False)
class _Shown:
    """What one image token of a text stands for: an image, a video, or a frame of one."""

    units: np.ndarray
    """int64 [time, tokens]: from the sample's first."""
    rows: int
    columns: int
    """Of a frame, in units."""
    video: bool
    interval: float


def _shown(grids: Sequence[Grid], rules: ImageRules) -> list[_Shown]:
    found, first = [], 0
    for grid in grids:
        units = unit_places(grid, rules) + first
        first += units.size + rules.class_token * grid.time
        parts = np.split(units, grid.time) if grid.video and rules.timestamps else [units]
        rows, columns = grid.rows // rules.merge, grid.columns // rules.merge
        found += [_Shown(part, rows, columns, grid.video, grid.interval) for part in parts]
    return found


def _rope(
    starts: np.ndarray,
    places: np.ndarray,
    shown: Sequence[_Shown],
    tokens: int,
    rules: ImageRules,
) -> Int32[np.ndarray, "tokens 3"]:
    """Text counts on in all three; an image's tokens are at its own rows and columns, counted from
    where the text before it ends, and the text behind it goes on after the longer of its sides
    (arXiv 2409.12191; transformers' get_rope_index of models/qwen2_vl, qwen2_5_vl, qwen3_vl)."""
    rope = np.empty((tokens, 3), np.int32)
    at, position = 0, 0
    for place, each in zip(starts[places].tolist(), shown, strict=True):
        text = place - at
        rope[at:place] = np.arange(position, position + text)[:, None]
        position += text
        step = np.float32(1.0)
        if each.video and rules.tokens_per_second is not None:
            step = np.float32(rules.tokens_per_second) * np.float32(each.interval)
        time = (np.arange(len(each.units)).astype(np.float32) * step).astype(np.int64)
        grid = np.meshgrid(time, np.arange(each.rows), np.arange(each.columns), indexing="ij")
        at = place + each.units.size
        rope[place:at] = np.stack(grid, axis=-1).reshape(-1, 3) + position
        position += max(each.rows, each.columns)
    rope[at:] = np.arange(position, position + tokens - at)[:, None]
    return rope


def _miscounted(token: str, found: int, wanted: int) -> DataError:
    return DataError(
        f"the conversation's text has {token} {found} times, but there are {wanted} images or "
        "videos of that kind: the chat template does not write it once for each, or the text "
        "itself holds it"
    )

"""Images and videos as the patches that a vision tower reads, and where these stand."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from attrs import Factory, field, frozen
from jaxtyping import Int32, Int64, UInt8

Resampling = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""PIL's filters, in the order of their numbers (`resample` in preprocessor_config.json)."""

CHANNELS = 3


@frozen(kw_only=True)
class ImageRules:
    """What the data side has to know of a model with a tower: plain values, picklable.

    The budget: a sample has at most `max_patches` patches (a packed row micro_batch_size times as
    many). Of a sample that has more, where the tower takes images of any size, all images and
    videos are made smaller, by one factor on their pixels, until they fit, though none smaller
    than one token a frame; where that does not do, or the tower's images have one size, the sample
    is refused (data.bad_records).
    """

    patch: int
    """Pixels of a patch's side."""
    max_patches: int
    """That a sample may have; a multiple of merge * merge."""
    image_token: int
    """Id of the token that stands where an image is; an image has as many of them as it has units
    of merge x merge patches."""
    video_token: int | None = None
    """The same for videos; None: the model takes none."""
    vision_start: int | None = None
    vision_end: int | None = None
    """Ids of the tokens around each frame of a video with `timestamps`."""
    frames: int = 1
    """Frames of a patch; an image is repeated so many times."""
    merge: int = 1
    window: int | None = None
    """Side of a window, in merged patches; None: the tower has no windows."""
    class_token: bool = False
    """Each frame begins with a patch that is none (CLIP): pixels 0, at -1, -1."""
    size: int | None = None
    """Side in pixels of the square that every image becomes; None: any size, within the bounds
    below."""
    shortest: int | None = None
    """With `size`: the shorter side is made so long, and `size` cut out of the middle (CLIP);
    None: both sides are made `size` long, whatever the image's shape (SigLIP)."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    """Of an image of any size."""
    video_min_pixels: int = field(default=Factory(lambda self: 128 * self.factor**2, True))
    video_max_pixels: int = field(default=Factory(lambda self: 768 * self.factor**2, True))
    """Of each frame of a video; with `timestamps` of all its frames together. Like those of images,
    transformers' defaults for Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""
    resampling: Resampling = "bicubic"
    rope: bool = False
    """Tokens have three positions: in time, height and width (M-RoPE)."""
    tokens_per_second: float | None = None
    """A video's positions in time are its seconds times this, rounded down (Qwen2.5-VL); None:
    they count its frames."""
    timestamps: bool = False
    """Each frame of a video stands by itself behind its time in words (Qwen3-VL)."""

    def __attrs_post_init__(self) -> None:
        if self.size is not None and self.size % (self.patch * self.merge):
            raise ValueError(
                f"images of {self.size} pixels a side can't be cut into units of "
                f"{self.patch * self.merge}"
            )
        if self.shortest is not None and (self.size is None or self.shortest < self.size):
            raise ValueError(
                f"a square of {self.size} pixels can't be cut out of an image whose shorter side "
                f"has {self.shortest}"
            )
        if self.max_patches < self.unit or self.max_patches % self.unit:
            raise ValueError(
                f"data.max_patches is {self.max_patches}; it must be a multiple of the {self.unit} "
                "patches of a token, at least one"
            )
        if self.size is not None and self.max_patches < self.frame_patches(self.size, self.size):
            raise ValueError(
                f"data.max_patches is {self.max_patches}, but each image of this tower has "
                f"{self.frame_patches(self.size, self.size)}: set at least that"
            )
        if self.timestamps and None in (self.video_token, self.vision_start, self.vision_end):
            raise ValueError("timestamps need the ids video_token, vision_start and vision_end")
        if self.class_token and self.merge > 1:
            raise ValueError("a tower with a class token can't merge patches")

    @property
    def unit(self) -> int:
        """How many patches become one token."""
        return self.merge**2

    @property
    def factor(self) -> int:
        """The sides of an image are multiples of so many pixels."""
        return self.patch * self.merge

    @property
    def values(self) -> int:
        """Of a patch: channels x frames x patch x patch, in this order."""
        return CHANNELS * self.frames * self.patch**2

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and videos."""
        return tuple(t for t in (self.image_token, self.video_token) if t is not None)

    def frame_patches(self, height: int, width: int) -> int:
        """Patches of a frame of so many pixels."""
        return (height // self.patch) * (width // self.patch) + self.class_token


@frozen(eq=False)
class Vision:
    """What a piece brings beside its tokens. Bounds and units count from the piece's own first
    patch and unit; otherwise as in core.batch.Patches."""

    pixels: UInt8[np.ndarray, "patches values"]
    places: Int32[np.ndarray, "patches 4"]
    frames: Int32[np.ndarray, "patches 2"]
    windows: Int32[np.ndarray, "patches 2"] | None
    units: Int32[np.ndarray, "tokens"]
    rope: Int32[np.ndarray, "tokens 3"] | None


@frozen
class Grid:
    """How an image or a video is cut."""

    time: int
    """Frames of patches; 1 for an image."""
    rows: int
    columns: int
    """Patches of a frame."""
    video: bool = False
    seconds: tuple[float, ...] = ()
    """Of a video: the time of each frame of patches."""
    interval: float = 1.0
    """Of a video: the seconds from one to the next."""


# ---- patches -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _frame_order(
    rows: int, columns: int, merge: int, window: int | None
) -> tuple[Int64[np.ndarray, "units"], Int64[np.ndarray, "windows"]]:
    """The units of a frame window by window, as numbers row by row; and where each window ends,
    in units. Without windows all are one."""
    high, wide = rows // merge, columns // merge
    if window is None:
        return np.arange(high * wide), np.array([high * wide])
    down, across = np.arange(high) // window, np.arange(wide) // window
    number = (down[:, None] * (int(across[-1]) + 1) + across).reshape(-1)
    order = np.argsort(number, kind="stable")
    ends = np.flatnonzero(np.diff(number[order], append=-1)) + 1
    return order, ends


def patchify(
    frames: UInt8[np.ndarray, "frames height width channels"], rules: ImageRules
) -> UInt8[np.ndarray, "patches values"]:
    """An image or a video, frame by frame, of each the units window by window. What lacks to a
    whole frame of patches is the last frame again: an image is repeated."""
    lacking = -len(frames) % rules.frames
    if lacking:
        frames = np.concatenate([frames, np.repeat(frames[-1:], lacking, axis=0)])
    _, height, width, _ = frames.shape
    rows, columns, m, p = height // rules.patch, width // rules.patch, rules.merge, rules.patch
    cut = frames.reshape(-1, rules.frames, rows // m, m, p, columns // m, m, p, CHANNELS)
    # time, unit's row and column, row and column within the unit, channel, frame, pixel
    units = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(len(cut), -1, m * m * rules.values)
    order, _ = _frame_order(rows, columns, m, rules.window)
    if rules.window is not None:
        units = units[:, order]
    patches = units.reshape(len(cut), -1, rules.values)
    if rules.class_token:
        patches = np.pad(patches, ((0, 0), (1, 0), (0, 0)))
    return patches.reshape(-1, rules.values)


def bounds_of(
    grids: Sequence[Grid], rules: ImageRules
) -> tuple[
    Int32[np.ndarray, "patches 4"],
    Int32[np.ndarray, "patches 2"],
    Int32[np.ndarray, "patches 2"] | None,
]:
    """Places, frames and windows of the patches of these grids, one after another."""
    places, frames, windows, first = [], [], [], 0
    for grid in grids:
        place, ends = _frame_places(grid.rows, grid.columns, rules)
        for _ in range(grid.time):
            count = len(place)
            places.append(place)
            frames.append(np.tile(np.array([[first, first + count]], np.int32), (count, 1)))
            starts = np.concatenate([[0], ends[:-1]])
            spans = np.stack([starts, ends], axis=1) * rules.unit + first
            windows.append(np.repeat(spans, (ends - starts) * rules.unit, axis=0).astype(np.int32))
            first += count
    joined = tuple(
        np.concatenate([np.zeros((0, width), np.int32), *parts])
        for width, parts in ((4, places), (2, frames), (2, windows))
    )
    return joined[0], joined[1], None if rules.window is None else joined[2]


@lru_cache(maxsize=256)
def _frame_places(
    rows: int, columns: int, rules: ImageRules
) -> tuple[Int32[np.ndarray, "patches 4"], Int64[np.ndarray, "windows"]]:
    """Places of a frame's patches in their order, and where its windows end, in units."""
    m = rules.merge
    order, ends = _frame_order(rows, columns, m, rules.window)
    down, across = np.divmod(order, columns // m)
    row = (down[:, None, None] * m + np.arange(m)[:, None]) + np.zeros((m, m), np.int64)
    column = (across[:, None, None] * m + np.arange(m)) + np.zeros((m, m), np.int64)
    place = np.stack([row.reshape(-1), column.reshape(-1)], axis=1)
    if rules.class_token:
        place = np.concatenate([[[-1, -1]], place])
    sizes = np.broadcast_to(np.array([[rows, columns]]), place.shape)
    return np.concatenate([place, sizes], axis=1).astype(np.int32), ends


def unit_places(grid: Grid, rules: ImageRules) -> Int64[np.ndarray, "time tokens"]:
    """For each token of a grid, frame by frame and row by row, its unit, from the grid's first."""
    order, _ = _frame_order(grid.rows, grid.columns, rules.merge, rules.window)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    stride = len(order) + rules.class_token
    return place + rules.class_token + stride * np.arange(grid.time)[:, None]


# ---- many pieces' at once ------------------------------------------------------------------


def joined(
    visions: Sequence[Vision | None], lengths: Sequence[int]
) -> tuple[Vision, Int64[np.ndarray, "pieces"]] | None:
    """What pieces of these lengths in tokens bring, in arrays one piece after another, and where
    each ends among the patches; None: no piece brings anything. Bounds, units and rope stay each
    piece's own."""
    some = [vision for vision in visions if vision is not None]
    if not some:
        return None
    units, ropes = [], []
    for vision, length in zip(visions, lengths, strict=True):
        units.append(np.full(length, -1, np.int32) if vision is None else vision.units)
        if some[0].rope is not None:
            ropes.append(np.zeros((length, 3), np.int32) if vision is None else vision.rope)
    whole = Vision(
        pixels=np.concatenate([vision.pixels for vision in some]),
        places=np.concatenate([vision.places for vision in some]),
        frames=np.concatenate([vision.frames for vision in some]),
        windows=None
        if some[0].windows is None
        else np.concatenate([vision.windows for vision in some if vision.windows is not None]),
        units=np.concatenate(units),
        rope=np.concatenate(ropes) if ropes else None,
    )
    counts = [0 if vision is None else len(vision.pixels) for vision in visions]
    return whole, np.cumsum(counts, dtype=np.int64)


def part_of(whole: Vision, tokens: slice, patches: slice) -> Vision | None:
    """Views of what one of the joined pieces brings; None: nothing."""
    if patches.start == patches.stop:
        return None
    return Vision(
        pixels=whole.pixels[patches],
        places=whole.places[patches],
        frames=whole.frames[patches],
        windows=None if whole.windows is None else whole.windows[patches],
        units=whole.units[tokens],
        rope=None if whole.rope is None else whole.rope[tokens],
    )

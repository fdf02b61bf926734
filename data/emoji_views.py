"""data/emoji with every picture in many views, for `data.datasets_type`: moved, turned, larger or
smaller, of other brightness. A model of pictures that each stand still in the middle of 32 pixels
learns them by heart."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from attrs import field, frozen

from omnistep.data.images import Source as Image
from omnistep.data.images import open_clip
from omnistep.data.source import Files, open_source

VIEWS = 64
SHIFT, TURN, GROW, DARKEN = 0.06, 0.1, 0.1, 0.1
"""At most: as a share of a side, in radians, as a share of the size, of the distance from white."""
WHITE = (255, 255, 255)
FLAT = ("flags", "symbols")
"""Categories that are not mirrored."""


@frozen(eq=False)
class Views:
    """The records of a file, VIEWS times, each time otherwise; the first time as they are."""

    records: Files = field(repr=False)

    def __len__(self) -> int:
        return VIEWS * len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        view, number = divmod(index, len(self.records))
        record = self.records[number]
        assert isinstance(record.content, Mapping)
        if view == 0:
            return record.content
        random = np.random.default_rng(index)
        flat = record.content["messages"][-1]["content"].startswith(FLAT)
        images = [
            changed(open_clip(Image(image), record.folder).frames[0], random, flat)
            for image in record.content["images"]
        ]
        return {**record.content, "images": images}


def open_views(path: str) -> Views:
    return Views(open_source(path, ("messages",), beside=("images",)))


def changed(image: PIL.Image.Image, random: np.random.Generator, flat: bool) -> PIL.Image.Image:
    """The image in another view, of the same size; what comes in at a side is white."""
    width, height = image.size
    shift = random.uniform(-SHIFT, SHIFT, 2) * (width, height)
    turn, grow = random.uniform(-TURN, TURN), 1 + random.uniform(-GROW, GROW)
    mirror = -1 if random.random() < 0.5 and not flat else 1
    # from a place in the result, counted from the middle, to one in the image
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / grow
    matrix = np.diag([mirror, 1]) @ matrix
    middle = np.array([width, height]) / 2
    offset = middle - matrix @ (middle + shift)
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = image.transform(
        image.size, PIL.Image.Transform.AFFINE, affine, PIL.Image.Resampling.BILINEAR,
        fillcolor=WHITE,
    )  # fmt: skip
    ink = (255 - np.asarray(moved, np.float32)) * (1 + random.uniform(-DARKEN, DARKEN, 3))
    return PIL.Image.fromarray((255 - ink).clip(0, 255).round().astype(np.uint8))

"""The size that each image of a sample is resized to: its tower's rule, and the budget's."""

import math
from collections.abc import Sequence

from attrs import frozen

from omnistep.data.errors import DataError
from omnistep.data.patches import ImageRules

LONGEST_SIDE = 200
"""An image may be so many times as long as it is wide, or as wide as long."""


@frozen
class Sized:
    """An image or a video whose patches are to be counted."""

    height: int
    width: int
    frames: int = 1
    """Frames as given; of an image 1."""
    video: bool = False


def target_sizes(shapes: Sequence[Sized], rules: ImageRules) -> list[tuple[int, int]]:
    """(height, width) in pixels that each image and video of a sample is resized to, by the rule
    of ImageRules. Raises DataError: too elongated, or over the budget all the same."""
    for shape in shapes:
        _check_shape(shape)
    depths = [-(-shape.frames // rules.frames) if shape.video else 1 for shape in shapes]
    if rules.size is not None:
        sizes = [(rules.size, rules.size)] * len(shapes)
        _check_budget(_patches(sizes, depths, rules), rules, "its images have one size")
        return sizes
    sizes = [_any_size(shape, rules) for shape in shapes]
    wanted = _patches(sizes, depths, rules)
    if wanted <= rules.max_patches:
        return sizes
    _check_budget(rules.unit * sum(depths), rules, "made as small as one token a frame")
    share = rules.max_patches / wanted
    while True:
        smaller = [
            _shrunk(
                shape.height,
                shape.width,
                math.sqrt(shape.height * shape.width / (share * height * width)),
                rules.factor,
            )
            for shape, (height, width) in zip(shapes, sizes, strict=True)
        ]
        if _patches(smaller, depths, rules) <= rules.max_patches:
            return smaller
        share *= 0.95  # a side can't be shorter than one unit: what is left is taken elsewhere


def _patches(sizes: Sequence[tuple[int, int]], depths: Sequence[int], rules: ImageRules) -> int:
    return sum(
        depth * rules.frame_patches(*size) for size, depth in zip(sizes, depths, strict=True)
    )


def _check_shape(shape: Sized) -> None:
    long, short = max(shape.height, shape.width), min(shape.height, shape.width)
    if long > LONGEST_SIDE * short:
        raise DataError(
            f"an image of {shape.width} x {shape.height} pixels is more than {LONGEST_SIDE} times "
            "as long as it is wide; take it out or crop it"
        )


def _check_budget(patches: int, rules: ImageRules, how: str) -> None:
    if patches > rules.max_patches:
        raise DataError(
            f"its images have {patches} patches ({how}), a sample may have {rules.max_patches} "
            "(data.max_patches): raise that, or give fewer images"
        )


def _any_size(shape: Sized, rules: ImageRules) -> tuple[int, int]:
    """Multiples of the factor near the image's own size, within the bounds on its pixels:
    transformers' smart_resize of models/qwen2_vl/image_processing_pil_qwen2_vl.py, and of
    models/qwen3_vl/video_processing_qwen3_vl.py, which counts the pixels of all frames."""
    height, width, factor = shape.height, shape.width, rules.factor
    least, most = rules.min_pixels, rules.max_pixels
    if shape.video:
        least, most = rules.video_min_pixels, rules.video_max_pixels
    count, rounded = 1, 1
    if shape.video and rules.timestamps:
        count = max(shape.frames, rules.frames)
        rounded = round(count / rules.frames) * rules.frames
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
    high, wide = (round(side / factor) * factor for side in (height, width))
    if rounded * high * wide > most:
        return _shrunk(height, width, math.sqrt(count * height * width / most), factor)
    if rounded * high * wide < least:
        beta = math.sqrt(least / (count * height * width))
        return (
            math.ceil(height * beta / factor) * factor,
            math.ceil(width * beta / factor) * factor,
        )
    return high, wide


def _shrunk(height: int, width: int, by: float, factor: int) -> tuple[int, int]:
    """Both sides divided, and rounded down to the factor, but not to 0."""
    return (
        max(factor, math.floor(height / by / factor) * factor),
        max(factor, math.floor(width / by / factor) * factor),
    )

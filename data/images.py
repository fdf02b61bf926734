"""Images and videos as records hold them, opened and resized as the transformers processors do."""

import base64
import binascii
import errno
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from attrs import frozen
from jaxtyping import UInt8
from PIL.Image import Image

from omnistep.data.errors import DataError
from omnistep.data.image_sizes import Sized, target_sizes
from omnistep.data.patches import Grid, ImageRules, patchify

FPS = 24.0
"""Frames a second of a video that does not say; transformers assumes the same."""
MOST_FRAMES = 4096
SHORTEST_BASE64 = 64
"""Characters: no image is so small."""
VIDEO_FILES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
}


@frozen
class Source:
    """An image or a video of a record, not opened yet."""

    value: Any
    """An image: a path (from the record's folder), bytes, {"bytes", "path"}, base64 with or without
    `data:`, or a PIL image. A video: a list of these, or one animated image."""
    video: bool = False
    fps: float | None = None


@frozen(eq=False)
class Clip:
    """An image, or the frames of a video, of one size and mode RGB."""

    frames: tuple[Image, ...]
    video: bool = False
    fps: float = FPS


def open_clip(source: Source, folder: str) -> Clip:
    """Raises DataError where there is no such image or it can't be decoded."""
    if not source.video:
        return Clip((_upright(*_open(source.value, folder)),))
    if source.fps is not None and not 0 < source.fps < float("inf"):
        raise DataError(f"the fps of a video are {source.fps}; they must be greater than 0")
    fps = source.fps
    if isinstance(source.value, Sequence) and not isinstance(source.value, str | bytes):
        frames = tuple(_upright(*_open(value, folder)) for value in source.value)
    else:
        frames, own = _animation(*_open(source.value, folder))
        fps = fps or own
    if not frames:
        raise DataError("a video has no frames")
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise DataError(f"the frames of a video are of different sizes: {sorted(sizes)}")
    return Clip(frames, True, fps or FPS)


def see(clips: Sequence[Clip], rules: ImageRules) -> tuple[np.ndarray, list[Grid]]:
    """The patches of all clips, one after another (uint8 [patches, values]), and how each is cut.

    Raises DataError by the rule of ImageRules on the budget.
    """
    if rules.video_token is None and any(clip.video for clip in clips):
        raise DataError("this model takes no videos; give frames of it as images")
    shapes = [
        Sized(clip.frames[0].height, clip.frames[0].width, len(clip.frames), clip.video)
        for clip in clips
    ]
    pixels, grids = [np.zeros((0, rules.values), np.uint8)], []
    for clip, size in zip(clips, target_sizes(shapes, rules), strict=True):
        frames = np.stack([resized(frame, size, rules) for frame in clip.frames])
        pixels.append(patchify(frames, rules))
        grids.append(_grid(clip, size, rules))
    return np.concatenate(pixels), grids


def resized(
    image: Image, size: tuple[int, int], rules: ImageRules
) -> UInt8[np.ndarray, "height width channels"]:
    """As the processors of transformers' PIL backend: resized to (height, width); with `shortest`
    by its shorter side, and the middle cut out (models/clip/image_processing_pil_clip.py)."""
    height, width = size
    if rules.shortest is None:
        return np.asarray(image.resize((width, height), FILTERS[rules.resampling]))
    # the order of the operations decides how the longer side is rounded
    short, long = min(image.size), max(image.size)
    longer = int(rules.shortest * long / short)
    wide, high = (
        (rules.shortest, longer) if image.width <= image.height else (longer, rules.shortest)
    )
    left, top = (wide - width) // 2, (high - height) // 2
    whole = np.asarray(image.resize((wide, high), FILTERS[rules.resampling]))
    return whole[top : top + height, left : left + width]


def _grid(clip: Clip, size: tuple[int, int], rules: ImageRules) -> Grid:
    rows, columns = size[0] // rules.patch, size[1] // rules.patch
    if not clip.video:
        return Grid(1, rows, columns)
    time = -(-len(clip.frames) // rules.frames)
    last = len(clip.frames) - 1
    # of a frame of patches, the middle between its first and its last frame; what lacks is the last
    # frame again (models/qwen3_vl/processing_qwen3_vl.py, _calculate_timestamps)
    pairs = [
        (min(i * rules.frames, last), min(i * rules.frames + rules.frames - 1, last))
        for i in range(time)
    ]
    seconds = tuple((a / clip.fps + b / clip.fps) / 2 for a, b in pairs)
    return Grid(time, rows, columns, True, seconds, rules.frames / clip.fps)


# ---- opening -------------------------------------------------------------------------------


def _open(value: Any, folder: str) -> tuple[Image, str]:
    """The image that a record means, not decoded yet, and its name for errors."""
    if isinstance(value, Image):
        return value, "a PIL image"
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            raise DataError(f"an image is a mapping with `bytes` or `path`, got {short(value)}")
        value = path if content is None else content
    if isinstance(value, str):
        value, name = _content(value, folder)
    elif isinstance(value, bytes | bytearray | memoryview):
        name = f"an image of {len(value)} bytes"
    else:
        raise DataError(
            "an image is a path, bytes, {bytes, path}, base64 or a PIL image, got a "
            f"{type(value).__name__}: {short(value)}"
        )
    with _decoding(name):
        return PIL.Image.open(io.BytesIO(value)), name


def _content(text: str, folder: str) -> tuple[bytes, str]:
    """The bytes that a path or base64 means, and their name for errors."""
    if text.startswith(("http://", "https://")):
        raise DataError(
            f"{short(text)} is a URL, and training does not download: save the image to a file "
            "and give its path, or its bytes"
        )
    if text.startswith("data:"):
        head, _, data = text.partition(",")
        if not head.endswith(";base64"):
            raise DataError(f"a data: URL must be of base64, got {short(text)}")
        return _base64(data), f"the image {short(text)}"
    path = Path(folder) / expanduser(text.removeprefix("file://"))
    if path.suffix.lower() in VIDEO_FILES:
        raise DataError(
            f"{path}: video files can't be decoded here: give a list of frames, each an image, or "
            "an animated GIF, WebP or PNG"
        )
    try:
        return path.read_bytes(), str(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        reason = error.strerror
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        reason = "no path"
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise  # the disk's fault, not the record's
    if len(text) > SHORTEST_BASE64:
        with suppress(DataError):
            return _base64(text), f"the image {short(text)}"
    raise DataError(f"there is no image {short(str(path))} ({reason}), and it is no base64 either")


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image {short(text)} is not base64: {error}") from error


def _upright(image: Image, name: str) -> Image:
    """Decoded, turned as its EXIF says, RGB; what is transparent becomes white (transformers'
    load_image turns, its image_transforms.convert_to_rgb blends)."""
    with _decoding(name):
        image = PIL.ImageOps.exif_transpose(image)
        return _rgb(image)


def _rgb(image: Image) -> Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _animation(image: Image, name: str) -> tuple[tuple[Image, ...], float | None]:
    """The frames of an animated image, and how many a second."""
    frames, length = [], 0.0
    with _decoding(name):
        count = getattr(image, "n_frames", 1)
        pixels = count * image.width * image.height
        if count > MOST_FRAMES or pixels > 4 * (PIL.Image.MAX_IMAGE_PIXELS or pixels):
            raise DataError(f"a video of {count} frames of {image.size} is too long to be held")
        for number in range(count):
            image.seek(number)
            frames.append(_rgb(image))
            length += image.info.get("duration", 0) / 1000
    return tuple(frames), count / length if length > 0 else None


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder of PIL raises on broken bytes (OSError, SyntaxError, ValueError,
    struct.error, …) as a DataError. More pixels than PIL warns of are too many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} can't be decoded: {what[:160]}") from error


def short(value: Any, most: int = 80) -> str:
    """A value in an error."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"

"""Images and videos as records hold them, opened and resized as the transformers processors do."""

import base64
import binascii
import errno
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from os.path import expanduser
from pathlib import Path
from typing import Any

import attrs
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
MOST_PIXELS = 4 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
"""Of all images of a record together: some seconds' work. One image has at most a quarter."""
MOST_BYTES = 256 << 20
"""Of an image's file."""
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF"),
    *("ICO", "TGA", "QOI", "PCX", "SGI", "DDS"),
)
"""What PIL decodes by itself. For others it starts a program (EPS: Ghostscript), reads further
files, or asks whoever registered."""
STRIP = 1 << 22
"""Pixels that are blended at once."""
ORIENTATION = 0x0112
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
    """An image, or the frames of a video, of one size. They are decoded one after another, so that
    a record never holds more than one of them at its full size."""

    size: tuple[int, int]
    """Width and height in pixels, turned as its EXIF says."""
    count: int
    """Frames; of an image 1."""
    decode: Callable[[], Iterator[Image]]
    """Gives the frames, of mode RGB. Raises DataError where one can't be decoded."""
    video: bool = False
    fps: float = FPS

    @property
    def frames(self) -> tuple[Image, ...]:
        """All of them at once."""
        return tuple(self.decode())


def open_clip(source: Source, folder: str) -> Clip:
    """Finds an image or video and its size; nothing is decoded yet. Raises DataError where there is
    no such image, or it is none."""
    if not source.video:
        one = _open(source.value, folder)
        return Clip(one.size, 1, lambda: iter([one.upright()]))
    if source.fps is not None and not 0 < source.fps < float("inf"):
        raise DataError(f"the fps of a video are {source.fps}; they must be greater than 0")
    fps = source.fps
    if not isinstance(source.value, Sequence) or isinstance(source.value, str | bytes):
        one = _open(source.value, folder)
        count, own = one.animation()
        return Clip(one.image().size, count, one.frames, True, fps or own or FPS)
    found = [_open(value, folder) for value in source.value]
    if not found:
        raise DataError("a video has no frames")
    if len(sizes := {one.size for one in found}) > 1:
        raise DataError(f"the frames of a video are of different sizes: {sorted(sizes)}")
    return Clip(
        found[0].size, len(found), lambda: (one.upright() for one in found), True, fps or FPS
    )


def see(clips: Sequence[Clip], rules: ImageRules) -> tuple[np.ndarray, list[Grid]]:
    """The patches of all clips, one after another (uint8 [patches, values]), and how each is cut.

    Raises DataError by the rule of ImageRules on the budget.
    """
    if rules.video_token is None and any(clip.video for clip in clips):
        raise DataError("this model takes no videos; give frames of it as images")
    total = sum(clip.count * clip.size[0] * clip.size[1] for clip in clips)
    if total > MOST_PIXELS:
        raise DataError(f"its images have {total:,} pixels, at most {MOST_PIXELS:,} are decoded")
    shapes = [Sized(clip.size[1], clip.size[0], clip.count, clip.video) for clip in clips]
    pixels, grids = [np.zeros((0, rules.values), np.uint8)], []
    for clip, size in zip(clips, target_sizes(shapes, rules), strict=True):
        frames = np.stack([resized(frame, size, rules) for frame in clip.decode()])
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
    time = -(-clip.count // rules.frames)
    last = clip.count - 1
    # of a frame of patches, the middle between its first and its last frame; what lacks is the last
    # frame again (models/qwen3_vl/processing_qwen3_vl.py, _calculate_timestamps)
    pairs = [
        (min(i * rules.frames, last), min(i * rules.frames + rules.frames - 1, last))
        for i in range(time)
    ]
    seconds = tuple((a / clip.fps + b / clip.fps) / 2 for a, b in pairs)
    return Grid(time, rows, columns, True, seconds, rules.frames / clip.fps)


# ---- opening -------------------------------------------------------------------------------


@frozen(eq=False)
class _Opened:
    """An image that a record means: its bytes, or a PIL image that was given."""

    content: bytes | Image
    name: str
    """For errors."""
    size: tuple[int, int]
    """Width and height, turned as its EXIF says."""

    def image(self) -> Image:
        """Not decoded yet."""
        if isinstance(self.content, Image):
            return self.content
        with _decoding(self.name):
            return PIL.Image.open(io.BytesIO(self.content), formats=_formats())

    def upright(self) -> Image:
        """Decoded, turned as its EXIF says, RGB; what is transparent becomes white (transformers'
        load_image turns, its image_transforms.convert_to_rgb blends)."""
        image = self.image()
        with _decoding(self.name):
            return _rgb(PIL.ImageOps.exif_transpose(image), image.format)

    def animation(self) -> tuple[int, float | None]:
        """How many frames it has, and how many a second."""
        image, length = self.image(), 0.0
        with _decoding(self.name):
            count = getattr(image, "n_frames", 1)
            if count > MOST_FRAMES or count * image.width * image.height > MOST_PIXELS:
                raise DataError(f"a video of {count} frames of {image.size} is too long to be held")
            for number in range(count):
                image.seek(number)
                if image.format == "WEBP":  # which tells it of a decoded frame only
                    image.load()
                length += image.info.get("duration", 0) / 1000
        return count, count / length if length > 0 else None

    def frames(self) -> Iterator[Image]:
        """Those of an animated image, RGB."""
        image = self.image()
        with _decoding(self.name):
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield _rgb(image, image.format)


def _open(value: Any, folder: str) -> _Opened:
    """The image that a record means, not decoded yet."""
    if isinstance(value, Image):
        return _Opened(value, "a PIL image", _upright_size(value, b""))
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            raise DataError(f"an image is a mapping with `bytes` or `path`, got {short(value)}")
        value = path if content is None else content
    if isinstance(value, str):
        value, name = _content(value, folder)
    elif isinstance(value, bytes | bytearray | memoryview):
        value, name = bytes(value), f"an image of {len(value)} bytes"
    else:
        raise DataError(
            "an image is a path, bytes, {bytes, path}, base64 or a PIL image, got a "
            f"{type(value).__name__}: {short(value)}"
        )
    opened = _Opened(value, name, (0, 0))
    image = opened.image()
    with _decoding(name):
        return attrs.evolve(opened, size=_upright_size(image, value))


@cache
def _formats() -> list[str]:
    """Of FORMATS, those that this build of PIL has."""
    PIL.Image.init()
    return [form for form in FORMATS if form in PIL.Image.OPEN]


def _upright_size(image: Image, content: bytes) -> tuple[int, int]:
    # of a PNG PIL looks for EXIF behind the pixels, too, and decodes it all
    tells = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
    if image.format == "PNG" and not any(word in content for word in tells):
        return image.size
    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


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
        return _read(path), str(path)
    except DataError:
        raise
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


def _read(path: Path) -> bytes:
    """A regular file of at most MOST_BYTES."""
    # what is no file (a pipe, say) must not make us wait
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(file, "rb") as content:
        info = os.fstat(file)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is a pipe or device, no image's file")
        if info.st_size > MOST_BYTES:
            raise DataError(f"{path} has {info.st_size:,} bytes, at most {MOST_BYTES:,} are read")
        return content.read()


def _rgb(image: Image, form: str | None) -> Image:
    """`form`: of its file; PPM of 16 bits has the mode of 32."""
    if image.mode.startswith("I;16") or (image.mode == "I" and form == "PPM"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        what = {"I": "32-bit integers", "F": "floats"}[image.mode]
        raise DataError(
            f"an image of mode {image.mode} ({what}) has no range of values that is known: save it "
            "with 8 or 16 bits"
        )
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    blended = PIL.Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = PIL.Image.new("RGBA", strip.size, (255, 255, 255, 255))
        blended.paste(PIL.Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return blended


def _from_16_bits(image: Image) -> Image:
    """Greyscale of 16 bits, 0 to 65535, with 8: PIL's own conversion would make all above 255
    white."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = 255
    return PIL.Image.fromarray(grey).convert("RGB")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder of PIL raises on broken bytes (OSError, SyntaxError, ValueError,
    struct.error, …) as a DataError. More pixels than PIL warns of are too many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{name} takes more memory than there is") from error
    except PIL.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise DataError(f"{name} can't be decoded: it is none of {known}") from error
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} can't be decoded: {what[:160]}") from error


def short(value: Any, most: int = 80) -> str:
    """A value in an error; of a long one the beginning and the end, where a path has its name."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"

"""Images: opened and resized as transformers' PIL processors do, uint8 by uint8."""

import base64
import errno
import io
import os
import subprocess
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from omnistep.data.errors import DataError
from omnistep.data.image_sizes import Sized, target_sizes
from omnistep.data.images import MOST_BYTES, Source, open_clip, see, short
from omnistep.data.patches import ImageRules, bounds_of, unit_places
from tests.data.pictured import held

QWEN2 = {"patch": 14, "frames": 2, "merge": 2}
QWEN3 = {"patch": 16, "frames": 2, "merge": 2}


def rules_of(max_patches=1 << 16, image_token=1, video_token=2, **rest):
    return ImageRules(
        max_patches=max_patches, image_token=image_token, video_token=video_token, **rest
    )


def picture(width, height, mode="RGB", seed=0):
    random = np.random.default_rng(seed)
    base = random.integers(0, 256, (max(2, height // 8), max(2, width // 8), 4), np.uint8)
    return PIL.Image.fromarray(base, "RGBA").resize((width, height)).convert(mode)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(value, folder="", **rest):
    return open_clip(Source(value, **rest), str(folder))


def normalised(pixels, mean, std):
    """What the tower does with the patches of [patches, channels x frames x side x side]."""
    shape = (len(pixels), 3, -1)
    values = pixels.reshape(shape).astype(np.float32) * np.float32(1 / 255)
    mean, std = (np.array(each, np.float32)[None, :, None] for each in (mean, std))
    return ((values - mean) / std).reshape(len(pixels), -1)


def bytes_of(values, mean, std):
    """The uint8 that normalised values came from."""
    shape = values.shape
    values = values.reshape(shape[0], 3, -1)
    mean, std = (np.array(each)[None, :, None] for each in (mean, std))
    whole = (values * std + mean) * 255
    assert np.abs(whole - whole.round()).max() < 1e-2
    return whole.round().astype(np.uint8).reshape(shape)


SIZES = [(300, 200), (64, 64), (17, 90), (10, 10), (701, 513), (28, 5000), (29, 43)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_in_transformers(mode):
    options = {"transparency": 3} if mode == "P" else {}
    image = picture(120, 70, "RGB" if mode == "P" else "RGBA").convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    processor = Qwen2VLImageProcessorPil()
    image = PIL.Image.open(io.BytesIO(content))
    assert image.mode == mode
    want = processor(image, return_tensors="np")["pixel_values"]
    pixels, _ = see([opened(content)], rules_of(**QWEN2))
    assert np.array_equal(pixels, bytes_of(want, processor.image_mean, processor.image_std))


RAMP = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    ("form", "kind"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("JPEG2000", "<u2")]
)
def test_sixteen_bits_keep_their_range(form, kind):
    """PIL's own conversion makes all above 255 white."""
    grey = PIL.Image.fromarray(RAMP.astype(kind))
    (frame,) = opened(encoded(grey, form)).frames
    found = np.asarray(frame).astype(int)
    assert np.abs(found - RAMP[..., None] / 257).max() <= 0.5
    assert {found.min(), found.max()} == {0, 255}


def test_sixteen_bits_of_a_ppm_and_with_transparency():
    head = b"P5 256 256 65535\n"
    (frame,) = opened(head + RAMP.astype(">u2").tobytes()).frames
    assert np.abs(np.asarray(frame)[..., 0] - RAMP / 257).max() <= 0.5
    content = encoded(PIL.Image.fromarray(RAMP), transparency=300)
    (frame,) = opened(content).frames
    grey = np.asarray(frame)[..., 0]
    assert grey[RAMP == 300].tolist() == [255]
    assert abs(int(grey[RAMP == 301][0]) - 301 / 257) <= 0.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_of_eight_bits(mode):
    image = picture(40, 30).convert({"PA": "P", "HSV": "RGB"}.get(mode, mode)).convert(mode)
    (frame,) = opened(image).frames
    assert (frame.mode, frame.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(frame).astype(int) - picture(40, 30)).mean() < 140
    for premultiplied, plain in (("La", "LA"), ("RGBa", "RGBA")):
        if mode == plain:
            assert opened(image.convert(premultiplied)).frames[0].size == (40, 30)


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_values_without_a_known_range_are_refused(kind, mode):
    content = encoded(PIL.Image.fromarray(RAMP.astype(kind)), "TIFF")
    with pytest.raises(DataError, match=rf"mode {mode} \(.*no range of values that is known"):
        opened(content).frames  # noqa: B018


@pytest.mark.parametrize("as_base64", [False, True])
def test_no_program_is_started(as_base64, tmp_path, monkeypatch):
    """An EPS is a program, which PIL gives to Ghostscript."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    value = base64.b64encode(eps).decode() if as_base64 else "a.png"
    with pytest.raises(DataError, match=r"can't be decoded: it is none of PNG, JPEG"):
        opened(value, tmp_path).frames  # noqa: B018
    assert not started


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for value in ("pipe.png", "/dev/zero"):
        with pytest.raises(DataError, match=r"is a pipe or device, no image's file"):
            opened(value, tmp_path)
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(DataError, match=r"big\.png has 268,435,457 bytes, at most"):
        opened("big.png", tmp_path)


def test_a_record_holds_one_image_at_its_full_size(monkeypatch):
    """Each is made small before the next one is decoded; too many pixels are not decoded at all."""
    alive = most = 0

    def gone():
        nonlocal alive
        alive -= 1

    def upright(opened):
        nonlocal alive, most
        image = PIL.Image.new("RGB", opened.size)
        weakref.finalize(image, gone)
        alive += 1
        most = max(most, alive)
        return image

    content = encoded(PIL.Image.new("L", (4000, 5000)))
    assert len(content) < 30_000
    monkeypatch.setattr("omnistep.data.images._Opened.upright", upright)
    rules = rules_of(**QWEN2, max_patches=4000)
    see([opened(content) for _ in range(12)], rules)
    assert most <= 2  # the one before goes when the next one is there
    with pytest.raises(DataError, match=r"its images have 400,000,000 pixels, at most 357,913,940"):
        see([opened(content) for _ in range(20)], rules)


def test_blending_in_strips_changes_nothing(monkeypatch):
    image = picture(50, 41).convert("RGBA")
    image.putalpha(PIL.Image.fromarray(np.arange(50 * 41).reshape(41, 50).astype(np.uint8)))
    whole = np.asarray(opened(image).frames[0])
    monkeypatch.setattr("omnistep.data.images.STRIP", 170)
    assert np.array_equal(np.asarray(opened(image).frames[0]), whole)


def test_memory_that_lacks_is_a_bad_record(monkeypatch):
    def lacks(*_):
        raise MemoryError

    monkeypatch.setattr("omnistep.data.images._rgb", lacks)
    with pytest.raises(DataError, match="takes more memory than there is"):
        opened(encoded(picture(40, 30))).frames  # noqa: B018


def test_a_long_path_keeps_its_name():
    assert short("/data/" + "x" * 200 + "/cat.png").endswith("/cat.png'")
    assert len(short("y" * 500)) == 81


@pytest.mark.parametrize("base", [QWEN2, QWEN3])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_as_qwen(size, base):
    processor = Qwen2VLImageProcessorPil(
        patch_size=base["patch"], size={"shortest_edge": 4000, "longest_edge": 90_000}
    )
    image = picture(*size)
    want = processor(image, return_tensors="np")
    rules = rules_of(**base, min_pixels=4000, max_pixels=90_000)
    pixels, (grid,) = see([held((image,))], rules)
    assert [grid.time, grid.rows, grid.columns] == want["image_grid_thw"][0].tolist()
    mean, std = processor.image_mean, processor.image_std
    assert np.array_equal(pixels, bytes_of(want["pixel_values"], mean, std))
    assert np.allclose(normalised(pixels, mean, std), want["pixel_values"], rtol=0, atol=1e-6)


def raster(pixels, rows, columns, patch):
    """[patches, values] row by row → [3, height, width]."""
    cut = pixels.reshape(rows, columns, 3, patch, patch).transpose(2, 0, 3, 1, 4)
    return cut.reshape(3, rows * patch, columns * patch)


@pytest.mark.parametrize("size", SIZES)
def test_fixed_sizes_as_clip_and_siglip(size):
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size={"height": 56, "width": 56})
    want = clip(image, return_tensors="np")["pixel_values"]
    pixels, _ = see([held((image,))], rules_of(patch=14, size=56, shortest=60, class_token=True))
    assert pixels.shape == (17, 3 * 14 * 14)
    assert not pixels[0].any()
    got = raster(pixels[1:], 4, 4, 14)
    assert np.array_equal(got[None], bytes_of(want, clip.image_mean, clip.image_std))
    for resample, name in ((3, "bicubic"), (2, "bilinear")):
        siglip = SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=resample)
        want = siglip(image, return_tensors="np")["pixel_values"]
        pixels, _ = see([held((image,))], rules_of(patch=16, size=48, resampling=name))
        got = raster(pixels, 3, 3, 16)
        assert np.array_equal(got[None], bytes_of(want, siglip.image_mean, siglip.image_std))


def test_order_places_and_windows_as_the_tower_of_qwen2_5_vl():
    rules = rules_of(**QWEN2, window=2, min_pixels=1)
    images = [picture(w, h, seed=w) for w, h in ((28 * 5, 28 * 3), (28, 28), (28 * 4, 28 * 4))]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 10**6})
    want = processor(images, return_tensors="np")
    grid = torch.from_numpy(want["image_grid_thw"])
    index, ends = get_vision_window_index(grid, 2, 2 * 2 * 14, 14)

    def windowed(values):
        return values.reshape(len(index), 4, -1)[index].reshape(len(index) * 4, -1)

    pixels, grids = see([held((image,)) for image in images], rules)
    values = bytes_of(want["pixel_values"], processor.image_mean, processor.image_std)
    assert np.array_equal(pixels, windowed(values))
    places, frames, windows = bounds_of(grids, rules)
    assert np.array_equal(places[:, :2], windowed(get_vision_position_ids(grid, 2).numpy()))
    assert windows is not None
    assert np.unique(windows, axis=0).tolist() == np.stack([ends[:-1], ends[1:]], 1).tolist()
    assert np.all(np.diff(windows[:, 0]) >= 0)
    sizes = want["image_grid_thw"].prod(1)
    last = np.cumsum(sizes)
    assert np.array_equal(frames, np.repeat(np.stack([last - sizes, last], 1), sizes, axis=0))
    assert np.array_equal(places[:, 2:], np.repeat(want["image_grid_thw"][:, 1:], sizes, axis=0))
    # a token's unit is where the window order has put it
    units, first = [], 0
    for each in grids:
        units.append(unit_places(each, rules).reshape(-1) + first)
        first += units[-1].size
    assert np.array_equal(np.concatenate(units), torch.argsort(index).numpy())


def test_a_class_token_is_a_patch_of_its_own():
    rules = rules_of(patch=14, size=28, class_token=True)
    _, grids = see([held((picture(30, 30),))] * 2, rules)
    places, frames, windows = bounds_of(grids, rules)
    one = [[-1, -1, 2, 2], [0, 0, 2, 2], [0, 1, 2, 2], [1, 0, 2, 2], [1, 1, 2, 2]]
    assert places.tolist() == one * 2
    assert frames.tolist() == [[0, 5]] * 5 + [[5, 10]] * 5
    assert windows is None
    assert unit_places(grids[0], rules).tolist() == [[1, 2, 3, 4]]


# ---- videos --------------------------------------------------------------------------------


def test_a_video_is_cut_in_pairs_and_its_last_frame_repeated():
    rules = rules_of(**QWEN2, video_min_pixels=28 * 28, video_max_pixels=28 * 56)
    frames = tuple(picture(56, 28, seed=seed) for seed in range(3))
    pixels, (grid,) = see([held(frames, True, 2.0)], rules)
    assert (grid.time, grid.rows, grid.columns, grid.interval) == (2, 2, 4, 1.0)
    assert grid.seconds == (0.25, 1.0)
    times = [see([held((frame,))], rules_of(**QWEN2, min_pixels=1))[0] for frame in frames]
    halves = [each.reshape(8, 3, 2, -1)[:, :, 0] for each in times]
    got = pixels.reshape(2, 8, 3, 2, -1)
    assert np.array_equal(got[0], np.stack([halves[0], halves[1]], axis=2))
    assert np.array_equal(got[1], np.stack([halves[2], halves[2]], axis=2))


def smart_resize_of_videos():
    """transformers' own function, without torchvision, which its file imports."""
    import inspect
    import math
    from importlib.util import find_spec

    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "models/qwen3_vl/video_processing_qwen3_vl.py"
    text = file.read_text()
    start = text.index("def smart_resize(")
    names: dict[str, Any] = {"math": math}
    exec(inspect.cleandoc(text[start : text.index("return h_bar, w_bar", start) + 20]), names)
    return names["smart_resize"]


def test_sizes_of_videos_as_qwen3_vl():
    resize = smart_resize_of_videos()
    rules = rules_of(
        **QWEN3,
        timestamps=True,
        vision_start=3,
        vision_end=4,
    )
    assert (rules.video_min_pixels, rules_of(**QWEN2).video_max_pixels) == (131072, 602112)
    random = np.random.default_rng(0)
    for frames, height, width in random.integers((2, 5, 5), (20, 900, 900), (300, 3)).tolist():
        want = resize(frames, height, width, 2, 32, 128 * 32 * 32, 32 * 32 * 768)
        if max(height, width) > 100 * min(height, width):
            continue
        (got,) = target_sizes([Sized(height, width, frames, True)], rules)
        assert got == want


# ---- the budget ----------------------------------------------------------------------------


def test_a_sample_over_the_budget_is_made_smaller_by_one_factor():
    random = np.random.default_rng(0)
    generous = rules_of(**QWEN2)
    for _ in range(300):
        count = int(random.integers(1, 6))
        shapes = [Sized(*random.integers(30, 900, 2).tolist()) for _ in range(count)]
        rules = rules_of(**QWEN2, max_patches=int(random.integers(6, 300)) * 4)
        before, after = target_sizes(shapes, generous), target_sizes(shapes, rules)
        wanted = sum(h * w // 196 for h, w in before)
        used = sum(h * w // 196 for h, w in after)
        if wanted <= rules.max_patches:
            assert after == before
            continue
        assert used <= rules.max_patches
        assert all(min(size) >= 28 for size in after)
        big = [i for i, size in enumerate(after) if min(size) > 28 * 4]
        shares = [after[i][0] * after[i][1] / (before[i][0] * before[i][1]) for i in big]
        assert not shares or max(shares) <= 1.6 * min(shares)


def test_no_more_than_needed_is_taken_away():
    random = np.random.default_rng(0)
    for _ in range(100):
        rules = rules_of(**QWEN2, max_patches=int(random.integers(200, 500)) * 4)
        shapes = [Sized(*random.integers(600, 1200, 2).tolist()) for _ in range(2)]
        used = sum(h * w // 196 for h, w in target_sizes(shapes, rules))
        assert 0.75 * rules.max_patches <= used <= rules.max_patches


def test_what_can_not_be_made_small_enough_is_refused():
    small = rules_of(**QWEN2, max_patches=8)
    assert target_sizes([Sized(900, 900)] * 2, small) == [(28, 28)] * 2
    with pytest.raises(DataError, match=r"12 patches .*a sample may have 8 \(data.max_patches\)"):
        target_sizes([Sized(900, 900)] * 3, small)
    with pytest.raises(DataError, match="12 patches"):
        target_sizes([Sized(900, 900, 5, True)], small)
    fixed = rules_of(patch=14, size=28, max_patches=8)
    with pytest.raises(DataError, match=r"12 patches .*one size"):
        target_sizes([Sized(90, 90)] * 3, fixed)
    with pytest.raises(ValueError, match="each image of this tower has 4"):
        rules_of(patch=14, size=28, max_patches=3)
    with pytest.raises(ValueError, match="multiple of the 4"):
        rules_of(**QWEN2, max_patches=6)
    with pytest.raises(DataError, match="more than 200 times"):
        target_sizes([Sized(2, 402)], small)


# ---- opening -------------------------------------------------------------------------------


def test_every_way_to_give_an_image(tmp_path):
    image = picture(40, 30)
    content = encoded(image)
    (tmp_path / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    ways = [
        "a.png",
        str(tmp_path / "a.png"),
        f"file://{tmp_path}/a.png",
        {"path": "a.png"},
        {"bytes": None, "path": "a.png"},
        {"bytes": content, "path": "elsewhere.png"},
        content,
        text,
        f"data:image/png;base64,{text}",
        image,
    ]
    for value in ways:
        (frame,) = opened(value, tmp_path).frames
        assert np.array_equal(np.asarray(frame), np.asarray(image)), value


def test_an_image_is_turned_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (frame,) = opened(encoded(picture(40, 30), exif=exif)).frames
    assert frame.size == (30, 40)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("https://a.b/c.png", "training does not download"),
        ("no.png", "there is no image .*no.png. .No such file"),
        ("~nobody/no.png", "there is no image .*no.png. .No such file"),
        ("clip.mp4", "video files can't be decoded here: give a list of frames"),
        ({"url": 1}, "mapping with `bytes` or `path`"),
        (7, "got a int"),
        (b"no image", "can't be decoded"),
        (encoded(picture(90, 90))[:900], "can't be decoded"),
        (encoded(picture(90, 90), "JPEG")[:900], "can't be decoded"),
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png,abc", "must be of base64"),
    ],
)
def test_what_can_not_be_opened(value, words, tmp_path):
    with pytest.raises(DataError, match=words):
        opened(value, tmp_path).frames  # noqa: B018


def test_a_failing_disk_is_no_bad_record(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("omnistep.data.images._read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        opened("a.png", tmp_path)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"can't be decoded: Image size .1600 pixels"):
        opened(encoded(picture(40, 40)))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animated_image_is_a_video(form):
    frames = [picture(40, 30, seed=seed) for seed in range(3)]
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], duration=250, **options
    )
    clip = opened(content, video=True)
    assert (len(clip.frames), clip.video, clip.fps) == (3, True, 4.0)
    assert opened(content, video=True, fps=2.0).fps == 2.0
    if form != "GIF":  # which has 256 colours
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b))
            for a, b in zip(clip.frames, frames, strict=True)
        )


def test_a_list_of_frames_is_a_video():
    clip = opened([encoded(picture(40, 30)), encoded(picture(40, 30))], video=True)
    assert (len(clip.frames), clip.fps) == (2, 24.0)
    with pytest.raises(DataError, match="of different sizes"):
        opened([picture(40, 30), picture(30, 40)], video=True)
    with pytest.raises(DataError, match="no frames"):
        opened([], video=True)
    with pytest.raises(DataError, match="fps of a video are 0"):
        opened([picture(40, 30)], video=True, fps=0)
    rules = ImageRules(patch=14, max_patches=10**4, image_token=1)
    with pytest.raises(DataError, match="takes no videos"):
        see([clip], rules)

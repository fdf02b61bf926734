"""How the images of a model are to be prepared: what its config.json and the
preprocessor_config.json beside it say, as the rules of the data side."""

from collections.abc import Mapping
from typing import Any

from omnistep.bin.model import PREPROCESSOR, VIDEO, Model
from omnistep.data.images import FILTERS
from omnistep.data.patches import ImageRules
from omnistep.models.config import Tower
from omnistep.models.hf_config import ConfigJsonError
from omnistep.models.hf_vision import ImageTokens

Json = Mapping[str, Any]


def image_rules(model: Model, max_patches: int) -> ImageRules | None:
    """Of a model, with room for so many patches in a sample; None where it has no tower.

    Sizes that its preprocessor_config.json and video_preprocessor_config.json do not name are those
    of transformers' processors. Raises ConfigJsonError where they are not built or do not fit
    together.
    """
    raw, tower = model.raw, model.cfg.tower
    if tower is None:
        return None
    images, videos = (model.preprocessors.get(name, {}) for name in (PREPROCESSOR, VIDEO))
    tokens, family = ImageTokens.of(raw), str(raw.get("model_type"))
    vision = raw.get("vision_config") or {}
    try:
        if images.get("do_resize") is False:
            raise ValueError(f"do_resize false ({PREPROCESSOR}) is not built")
        return ImageRules(
            patch=tower.patch,
            max_patches=max_patches,
            image_token=tokens.image,
            video_token=tokens.video,
            vision_start=tokens.start,
            vision_end=tokens.end,
            frames=tower.frames,
            merge=tower.merge,
            window=tower.window,
            class_token=tower.class_token,
            resampling=_resampling(images),
            rope=bool(model.cfg.rope_axes),
            tokens_per_second=(
                float(vision.get("tokens_per_second", 4)) if family == "qwen2_5_vl" else None
            ),
            timestamps=family.startswith("qwen3_vl"),
            **(_one_size(tower, images) if _fixed(tower) else _any_size(images, videos)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigJsonError(f"images can't be prepared for {family}: {error}") from None


def _fixed(tower: Tower) -> bool:
    """Whether its images have one size: its places are learned and it does not turn by them."""
    return bool(tower.side) and not tower.rotary


def _one_size(tower: Tower, images: Json) -> dict[str, int | None]:
    """transformers' CLIP and SigLIP: the first cuts a square out of the middle."""
    side = tower.side * tower.patch
    size, crop = images.get("size"), images.get("crop_size")
    if tower.class_token and not images:
        return {"size": side, "shortest": side}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    size = size or {"height": side, "width": side}
    if "shortest_edge" in size:
        if images.get("do_center_crop") is False:
            raise ValueError(f"do_center_crop false ({PREPROCESSOR}) is not built")
        cut = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
        wanted, shortest = (cut.get("height"), cut.get("width")), size["shortest_edge"]
    else:
        wanted, shortest = (size["height"], size["width"]), None
    if wanted != (side, side):
        raise ValueError(
            f"{PREPROCESSOR} makes them {wanted[0]} x {wanted[1]} pixels, but the tower's images "
            f"have {side} a side (image_size)"
        )
    return {"size": side, "shortest": shortest}


def _any_size(images: Json, videos: Json) -> dict[str, int]:
    """transformers' Qwen2-VL, whose bounds on pixels have two spellings."""
    bounds = {}
    for start, given in (("", images), ("video_", videos)):
        size = given.get("size") or {}
        for end, old, new in (
            ("min_pixels", "min_pixels", "shortest_edge"),
            ("max_pixels", "max_pixels", "longest_edge"),
        ):
            value = given.get(old) or size.get(new)
            if value is not None:
                bounds[start + end] = int(value)
    return bounds


def _resampling(images: Json) -> Any:
    number = images.get("resample", 3)
    names = list(FILTERS)
    if number not in range(len(names)):
        raise ValueError(f"resample {number!r} is none of PIL's filters, 0 to {len(names) - 1}")
    return names[number]

"""The same random images and videos, as our Patches and as transformers reads them; and small
random vision towers of transformers, with their weights in our tree."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
import transformers
from attrs import evolve, frozen
from jaxtyping import Bool
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLVisionConfig,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

from omnistep.core.batch import Patches
from omnistep.core.tree import Tree
from omnistep.models.config import Tower
from omnistep.models.layers import rope_frequencies
from tests.models.reference import Fp64

Grid = tuple[int, int, int]
"""Frames, and rows and columns of patches in each, of an image (one frame) or a video."""


@frozen(eq=False)
class Images:
    """The images of some rows."""

    patches: Patches
    """Of no token yet: see `place_units`."""
    order: tuple[tuple[int, ...], ...]
    """For each row, where in it the units lie, in the order in which transformers has them."""
    pixel_values: Tensor
    """[patches, values], those of all rows one after another, without filler and class tokens."""
    grid_thw: Tensor
    """int64 [images, 3]"""


def make_images(
    tower: Tower,
    rows: Sequence[Sequence[Grid]],
    budget: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Images:
    """Images of these grids in rows of `budget` patches, of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    made = [_make_row(tower, grids, budget, generator) for grids in rows]
    patches = [row for row, _, _ in made]
    windows = [p.windows for p in patches if p.windows is not None]
    stacked = Patches(
        torch.stack([p.pixels for p in patches]),
        torch.stack([p.places for p in patches]),
        torch.stack([p.frames for p in patches]),
        torch.full((len(rows), 0), -1, dtype=torch.int32),
        torch.stack(windows) if windows else None,
    )
    values = torch.cat([pixels for _, _, pixels in made])
    shape = (tower.channels, -1)
    mean, std = (torch.tensor(x, dtype=dtype)[:, None] for x in (tower.mean, tower.std))
    values = (values.to(dtype).unflatten(1, shape) / 255 - mean) / std
    grids = torch.tensor([grid for row in rows for grid in row]).view(-1, 3)
    return Images(stacked, tuple(order for _, order, _ in made), values.flatten(1), grids)


def place_units(images: Images, is_image: Bool[Tensor, "rows seq"]) -> Patches:
    """The Patches for tokens of which these stand for units, in order."""
    units = torch.full(is_image.shape, -1, dtype=torch.int32)
    for row, order in enumerate(images.order):
        units[row, is_image[row]] = torch.tensor(order, dtype=torch.int32)
    return evolve(images.patches, units=units)


def _make_row(
    tower: Tower, grids: Sequence[Grid], budget: int, generator: torch.Generator
) -> tuple[Patches, tuple[int, ...], Tensor]:
    """One row's Patches (without the axis of rows), its order, and its pixels in that order."""
    pixels: list[Tensor] = []
    places: list[tuple[int, ...]] = []
    frames: list[tuple[int, int]] = []
    windows: list[tuple[int, int]] = []
    order: list[int] = []
    theirs = [torch.empty(0, tower.values, dtype=torch.uint8)]
    nothing = torch.zeros(tower.values, dtype=torch.uint8)
    for height, width in [grid[1:] for grid in grids for _ in range(grid[0])]:
        begin = len(pixels)
        if tower.class_token:
            pixels.append(nothing)
            places.append((-1, -1, height, width))
            windows.append((begin, begin + 1))
        units = _units(height, width, tower)
        raster = {unit: i for i, unit in enumerate(sorted(units))}
        shape = (len(units), tower.unit, tower.values)
        drawn = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        theirs.append(drawn.flatten(0, 1))
        at = {unit: len(pixels) // tower.unit + i for i, unit in enumerate(units)}
        order += [at[unit] for unit in raster]
        for _, window in groupby(units, lambda unit: _window(unit, tower)):
            first = len(pixels)
            for row, column in window:
                pixels += drawn[raster[row, column]]
                inside = [(i, j) for i in range(tower.merge) for j in range(tower.merge)]
                corner = (row * tower.merge, column * tower.merge)
                places += [(corner[0] + i, corner[1] + j, height, width) for i, j in inside]
            windows += [(first, len(pixels))] * (len(pixels) - first)
        frames += [(begin, len(pixels))] * (len(pixels) - begin)
    assert len(pixels) <= budget, f"{len(pixels)} patches in a budget of {budget}"
    filler = range(len(pixels), budget)
    alone = [(i, i + 1) for i in filler]
    as_int32 = partial(torch.tensor, dtype=torch.int32)
    patches = Patches(
        torch.stack(pixels + [nothing] * len(filler)),
        as_int32(places + [(0, 0, 1, 1)] * len(filler)),
        as_int32(frames + alone),
        as_int32([]),
        as_int32(windows + alone) if tower.window else None,
    )
    return patches, tuple(order), torch.cat(theirs)


def _units(height: int, width: int, tower: Tower) -> list[tuple[int, int]]:
    """(row, column) of a frame's units, those of a window together."""
    units = [(i, j) for i in range(height // tower.merge) for j in range(width // tower.merge)]
    return sorted(units, key=lambda unit: (_window(unit, tower), unit))


def _window(unit: tuple[int, int], tower: Tower) -> tuple[int, int]:
    side = tower.window or 10**6
    return unit[0] // side, unit[1] // side


QWEN = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
QWEN |= {"spatial_merge_size": 2, "in_channels": 3, "initializer_range": 0.2}
FIXED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
FIXED |= {"num_attention_heads": 2, "image_size": 12, "patch_size": 4}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": QWEN | {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 24},
    "qwen2_5_vl": QWEN
    | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24, "window_size": 16}
    | {"fullatt_block_indexes": [1]},
    "qwen3_vl": QWEN
    | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24}
    | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    "siglip": FIXED | {"vision_use_head": False},
    "clip": FIXED | {"layer_norm_eps": 1e-4},
}
"""Family -> the vision_config of a small model."""

_QWEN = Tower(
    layers=3, embed=32, heads=2, mlp=64, patch=4, frames=2, merge=2, rotary=True, patch_bias=False,
    activation="quick_gelu", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
)  # fmt: skip
_FIXED = Tower(
    layers=3, embed=32, heads=2, mlp=48, patch=4, side=3, projector_norm=None, projector=24,
    mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
)  # fmt: skip
TOWERS = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": evolve(
        _QWEN, mlp=48, norm="rms", gated=True, activation="silu", window=2, full_layers=(1,),
        projector_norm="rms",
    ),
    "qwen3_vl": evolve(
        _QWEN, mlp=48, side=5, patch_bias=True, activation="gelu_tanh", deepstack=(0, 2)
    ),
    "siglip": evolve(_FIXED, post_norm=True),
    "clip": evolve(
        _FIXED, layers=2, class_token=True, pre_norm=True, patch_bias=False, norm_eps=1e-4,
        activation="quick_gelu",
    ),
}  # fmt: skip
"""What they are to us; of CLIP LLaVA leaves the last layer out."""


def make_vision(family: str, dtype: torch.dtype) -> Any:
    """A vision tower of transformers; behind SigLIP and CLIP with LLaVA's projector."""
    config_class, model_class = {
        "qwen2_vl": (Qwen2VLVisionConfig, Qwen2VisionTransformerPretrainedModel),
        "qwen2_5_vl": (Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel),
        "qwen3_vl": (Qwen3VLVisionConfig, Qwen3VLVisionModel),
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    }[family]
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**VISION[family]), attn_implementation="eager")
    if family in ("siglip", "clip"):
        model.projector = torch.nn.Sequential(
            torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)
        )
    model = model.to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "ln_q" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.2)
            elif family in ("siglip", "clip"):
                p.normal_(std=0.2)
    if dtype == torch.float64:
        exact_angles(model)
    return model.train()


def exact_angles(model: torch.nn.Module) -> None:
    """transformers computes a tower's frequencies in fp32 whatever the dtype."""
    modules: Any = model.modules()
    for module in modules:
        if type(module).__name__.endswith("VisionRotaryEmbedding"):
            theta = module.config.rope_parameters["rope_theta"]
            exact, _ = rope_frequencies(2 * len(module.inv_freq), theta, {})
            torch.testing.assert_close(
                exact.to(module.inv_freq.dtype), module.inv_freq, rtol=2e-6, atol=0
            )
            module.inv_freq = exact


def their_features(model: Any, family: str, images: Images) -> tuple[Tensor, list[Tensor]]:
    """(units [units, 24], those of each layer of deepstack), in transformers' order."""
    tower = TOWERS[family]
    pixels = images.pixel_values
    mode = Fp64() if pixels.dtype == torch.float64 else nullcontext()
    with mode:
        if family not in ("siglip", "clip"):
            out = model(pixels, images.grid_thw)
            return out.pooler_output, getattr(out, "deepstack_features", [])
        cut = (-1, tower.side, tower.side, tower.channels, tower.patch, tower.patch)
        whole = pixels.view(cut).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        out = model(whole, output_hidden_states=True)
        last = out.last_hidden_state if family == "siglip" else out.hidden_states[-2][:, 1:]
        return model.projector(last).flatten(0, 1), []


_OUTER = {
    "patch": ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    "patch_bias": ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    "class_token": ("embeddings.class_embedding",),
    "places": ("pos_embed.weight", "embeddings.position_embedding.weight"),
    "pre_norm": ("pre_layrnorm.weight",),
    "pre_norm_bias": ("pre_layrnorm.bias",),
    "post_norm": ("post_layernorm.weight",),
    "post_norm_bias": ("post_layernorm.bias",),
}
_LAYER = {
    "attn_norm": ("norm1", "layer_norm1"),
    "qkv": ("attn.qkv",),
    "o": ("attn.proj", "self_attn.out_proj"),
    "mlp_norm": ("norm2", "layer_norm2"),
    "up": ("mlp.up_proj", "mlp.linear_fc1", "mlp.fc1"),
    "gate": ("mlp.gate_proj",),
    "down": ("mlp.down_proj", "mlp.linear_fc2", "mlp.fc2"),
}
_JOINER = {
    "norm": ("ln_q", "norm"),
    "up": ("mlp.0", "linear_fc1", "0"),
    "down": ("mlp.2", "linear_fc2", "2"),
}


def our_tree(theirs: Mapping[str, Tensor], tower: Tower) -> Tree:
    """A tower's weights, or their gradients, by transformers' names, as our tree."""
    layers = [
        _by_names(theirs, ("blocks.{}.", "encoder.layers.{}."), _LAYER, i)
        for i in range(tower.layers)
    ]
    projector: dict[str, Any] = _by_names(theirs, ("merger.", "projector."), _JOINER)
    if tower.deepstack:
        count = len(tower.deepstack)
        deeper = [
            _by_names(theirs, ("deepstack_merger_list.{}.",), _JOINER, i) for i in range(count)
        ]
        projector["deepstack"] = _stacked(deeper)
    encoder: Tree = {
        ours: theirs[name] for ours, names in _OUTER.items() for name in names if name in theirs
    }
    encoder["patch"] = encoder["patch"].flatten(1)
    if not tower.post_norm:  # CLIP has one that hidden_states do not pass
        encoder = {name: value for name, value in encoder.items() if "post_norm" not in name}
    return {"encoder": encoder | {"layers": _stacked(layers)}, "projector": projector}


def _by_names(
    theirs: Mapping[str, Tensor],
    places: Sequence[str],
    names: Mapping[str, tuple[str, ...]],
    index: int = 0,
) -> dict[str, Tensor]:
    found = {}
    for place in (place.format(index) for place in places):
        for ours, candidates in names.items():
            for name, kind in product(candidates, ("weight", "bias")):
                value = theirs.get(f"{place}{name}.{kind}")
                if value is not None:
                    found[ours + "_bias" * (kind == "bias")] = value
        for kind, end in (("weight", ""), ("bias", "_bias")):
            qkv = [theirs.get(f"{place}self_attn.{x}_proj.{kind}") for x in "qkv"]
            if qkv[0] is not None:
                found[f"qkv{end}"] = torch.cat([x for x in qkv if x is not None])
    return {n: v.unflatten(0, (3, -1)) if n.startswith("qkv") else v for n, v in found.items()}


def _stacked(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

"""Greedy generation after images and videos against transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attrs import evolve, frozen
from torch import Tensor

from omnistep.core import rng
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.tree import Tree
from omnistep.models import hf
from omnistep.models.config import Config
from omnistep.models.generate import Prompt, Sampling, make_generate
from omnistep.models.hf_config import decoder_config, read_config_json
from omnistep.models.hf_names import weight_names
from omnistep.models.hf_vision import with_preprocessor
from omnistep.models.params import params
from tests.models.reference import CPU
from tests.models.reference_vision import VISION, Grid, Images, make_images, place_units

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EVEN = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4)}
"""What make_images normalises by."""
QWEN = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
CLIP = {
    "vision_config": VISION["clip"] | {"model_type": "clip_vision_model"},
    "text_config": TEXT | {"model_type": "qwen3"},
    "vision_feature_layer": -2,
}


def qwen(tower: str, sections: list[int], **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    inside = {**TEXT, "rope_parameters": rope, **text}
    return {"text_config": inside, "vision_config": VISION[tower], **QWEN}


CASES: dict[str, dict[str, Any]] = {
    "qwen2_vl": qwen("qwen2_vl", [2, 2, 2], head_dim=12),
    "qwen2_5_vl": qwen("qwen2_5_vl", [2, 2, 2], head_dim=12),
    "qwen3_vl": qwen("qwen3_vl", [4, 2, 2]),
    "qwen3_vl_moe": qwen("qwen3_vl", [4, 2, 2], **EXPERTS),
    "llava": CLIP,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return make_case(request.param, tmp_path_factory.mktemp("saved"))


def make_case(family: str, folder: Path) -> tuple[Any, Config, Tree]:
    """A small model of transformers, and ours with its weights."""
    config = transformers.AutoConfig.for_model(family, image_token_id=IMAGE, **CASES[family])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            elif "vision_tower" in name or "projector" in name:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    raw = read_config_json(folder)
    cfg = decoder_config(raw)
    assert cfg.tower is not None
    cfg = evolve(cfg, tower=with_preprocessor(cfg.tower, EVEN))
    source = open_weights(folder)
    tree = hf.import_weights(params(cfg), weight_names(raw, cfg), source, torch.float32, CPU)
    return model, cfg, tree


@frozen(eq=False)
class Asked:
    """One prompt, and what transformers has to be given with it."""

    prompt: Prompt
    inputs: dict[str, Tensor]


def ask(model: Any, cfg: Config, parts: Sequence[int | Grid], seed: int) -> Asked:
    """A prompt of so many tokens of text, and images and videos of these grids."""
    assert cfg.tower is not None
    grids = [part for part in parts if not isinstance(part, int)]
    ids: list[int] = []
    g = torch.Generator().manual_seed(seed)
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 90, (part,), generator=g).tolist()
            continue
        time, rows, columns = part
        each, token = rows * columns // cfg.tower.unit, VIDEO if time > 1 else IMAGE
        # Qwen3-VL's frames stand by themselves
        runs = [each] * time if model.config.model_type[:5] == "qwen3" else [each * time]
        for count in runs:
            ids += [START, *[token] * count, END]
    kinds = [{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids]
    inputs = {"input_ids": torch.tensor([ids])}
    if not grids:
        return Asked(Prompt(ids), inputs)
    per_frame = cfg.tower.class_token
    count = sum(t * (h * w + per_frame) for t, h, w in grids)
    images = make_images(cfg.tower, [grids], count, torch.float32, seed)
    patches = place_units(images, torch.tensor([kinds]) > 0)
    if not cfg.rope_axes:
        return Asked(Prompt(ids, patches), inputs | {"pixel_values": whole_images(images, cfg)})
    inputs["mm_token_type_ids"] = torch.tensor([kinds])
    sizes = [t * h * w for t, h, w in grids]
    pixels = images.pixel_values.split(sizes)
    for is_video, names in enumerate(
        (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    ):
        mine = [i for i, grid in enumerate(grids) if (grid[0] > 1) == bool(is_video)]
        if mine:
            inputs[names[0]] = torch.cat([pixels[i] for i in mine])
            inputs[names[1]] = torch.tensor([grids[i] for i in mine])
    places = {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
    rope, _ = model.model.get_rope_index(**places)
    return Asked(Prompt(ids, patches, rope[:, 0].T.int()), inputs)


def whole_images(images: Images, cfg: Config) -> Tensor:
    tower = cfg.tower
    assert tower is not None
    cut = (-1, tower.side, tower.side, tower.channels, tower.patch, tower.patch)
    return images.pixel_values.view(cut).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def prompts_of(model: Any, cfg: Config) -> list[Asked]:
    """None, one, two images, and a video behind an image."""
    if cfg.rope_axes:
        rows = [[7], [3, (1, 4, 6), 5], [(1, 4, 4), 2, (1, 2, 8), 40], [1, (1, 6, 4), (3, 4, 4), 4]]
    else:
        rows = [[7], [3, (1, 3, 3), 5], [(1, 3, 3), 2, (1, 3, 3), 40]]
    return [ask(model, cfg, row, seed) for seed, row in enumerate(rows)]


def theirs(model: Any, asked: Asked, count: int) -> list[int]:
    ids = asked.inputs["input_ids"]
    out = model.generate(
        **asked.inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


def ours(cfg: Config, tree: Tree, prompts: Sequence[Prompt], count: int, **options) -> list:
    generate = make_generate(
        cfg, tree, Sampling(do_sample=False), dtype=torch.float32, **{"compile": False} | options
    )
    steps = list(generate(prompts, count, rng.key(0)))
    return [list(row) for row in zip(*steps, strict=True)]


def test_greedy_equals_transformers(case):
    model, cfg, tree = case
    asked = prompts_of(model, cfg)
    expected = [theirs(model, each, 16) for each in asked]
    together = ours(cfg, tree, [each.prompt for each in asked], 16)
    assert together == expected
    # the images matter: of black ones something else is said
    assert asked[1].prompt.patches is not None
    dark = evolve(asked[1].prompt.patches, pixels=torch.zeros_like(asked[1].prompt.patches.pixels))
    assert ours(cfg, tree, [evolve(asked[1].prompt, patches=dark)], 16) != [expected[1]]


@pytest.mark.slow
def test_compiled_and_without_the_tower_where_nothing_is_seen(tmp_path):
    """New tokens by compiled layers; a batch of text alone does not run the tower."""
    model, cfg, tree = make_case("qwen3_vl", tmp_path)
    asked = prompts_of(model, cfg)
    prompts = [each.prompt for each in asked]
    assert ours(cfg, tree, prompts[:2], 6, compile=True) == [theirs(model, e, 6) for e in asked[:2]]
    blind = tree | {"encoder": {}, "projector": {}}
    assert ours(cfg, blind, prompts[:1], 6) == ours(cfg, tree, prompts[:1], 6)


def test_prompts_that_do_not_fit_the_model(tmp_path):
    model, cfg, tree = make_case("qwen2_vl", tmp_path)
    seen = prompts_of(model, cfg)[1].prompt
    assert seen.patches is not None
    with pytest.raises(ValueError, match="three positions of its tokens"):
        ours(cfg, tree, [evolve(seen, rope=None)], 2)
    with pytest.raises(ValueError, match=r"must be of shape \(1, 4\)"):
        ours(cfg, tree, [evolve(seen, ids=[1, 2, 3, 4])], 2)
    with pytest.raises(ValueError, match="no tower"):
        ours(evolve(cfg, tower=None), tree, [seen], 2)
    assert cfg.tower is not None
    with pytest.raises(ValueError, match="attends within windows"):
        ours(evolve(cfg, tower=evolve(cfg.tower, window=2)), tree, [seen], 2)

"""Greedy generation after images and videos against transformers'."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from attrs import evolve, field, frozen
from torch import Tensor

from omnistep.core import rng
from omnistep.core.tree import Tree
from omnistep.models import hf
from omnistep.models.config import Config
from omnistep.models.generate import Prompt, Sampling, make_generate
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import weight_names
from omnistep.models.params import params
from tests.models.reference import CPU, split_experts
from tests.models.reference_vision import (
    TOWERS,
    VISION,
    Grid,
    Images,
    make_images,
    our_tree,
    place_units,
)

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
NORM = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4)}


@frozen
class Case:
    """A family, what its language model is by itself, and how its frequencies have positions."""

    tower: str
    text: str
    axes: tuple[int, ...] = ()
    extra: dict[str, Any] = field(factory=dict)


CHUNKS, TURNS = (0, 0, 1, 1, 2, 2), (0, 1, 2, 0, 1, 2, 0, 0)
CASES = {
    "qwen2_vl": Case("qwen2_vl", "qwen2", CHUNKS, {"head_dim": 12}),
    "qwen2_5_vl": Case("qwen2_5_vl", "qwen2", CHUNKS, {"head_dim": 12}),
    "qwen3_vl": Case("qwen3_vl", "qwen3", TURNS),
    "qwen3_vl_moe": Case("qwen3_vl", "qwen3_moe", TURNS, EXPERTS),
    "llava": Case("clip", "qwen3"),
}


def make_case(family: str) -> tuple[Any, Config, Tree]:
    """A small model of transformers, and ours with its weights."""
    case = CASES[family]
    text = {**TEXT, **case.extra}
    vision = VISION[case.tower]
    sections = [case.axes.count(axis) for axis in range(3)]
    if case.axes:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        ids = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
        more = {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision, **ids}
    else:
        model_type = {"model_type": "clip_vision_model"}
        more = {
            "text_config": {**text, "model_type": case.text},
            "vision_config": {**vision, **model_type},
            "vision_feature_layer": -2,
        }
    config = transformers.AutoConfig.for_model(family, image_token_id=IMAGE, **more)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    state = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            elif "vision_tower" in name or "projector" in name:
                p.normal_(std=0.2)
    for name, value in model.state_dict().items():
        state[name.removeprefix("model.")] = value
    # its experts' weights always add up to 1, which Qwen3-MoE may leave out
    alone = transformers.AutoConfig.for_model(case.text, **text).to_dict()
    cfg = decoder_config(alone | {"norm_topk_prob": True})
    inside = {
        "model." + name.removeprefix("language_model."): value
        for name, value in state.items()
        if name.startswith("language_model.")
    }
    inside["lm_head.weight"] = state["lm_head.weight"]
    source = hf.InMemory(split_experts(inside, case.text))
    tree = hf.import_weights(params(cfg), weight_names(case.text, cfg), source, torch.float32, CPU)
    cfg = evolve(cfg, tower=TOWERS[case.tower], rope_axes=case.axes)
    seen = {
        name.removeprefix("visual.")
        .removeprefix("vision_tower.")
        .replace("multi_modal_projector.linear_1", "projector.0")
        .replace("multi_modal_projector.linear_2", "projector.2"): value
        for name, value in state.items()
    }
    return model, cfg, tree | our_tree(seen, TOWERS[case.tower])


@frozen(eq=False)
class Asked:
    """One prompt, and what transformers has to be given with it."""

    prompt: Prompt
    inputs: dict[str, Tensor]


def ask(model: Any, cfg: Config, parts: Sequence[int | Grid], family: str, seed: int) -> Asked:
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
        runs = [each] * time if family.startswith("qwen3_vl") else [each * time]
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


def prompts_of(model: Any, cfg: Config, family: str) -> list[Asked]:
    """None, one, two images, and a video behind an image."""
    if cfg.rope_axes:
        rows = [[7], [3, (1, 4, 6), 5], [(1, 4, 4), 2, (1, 2, 8), 40], [1, (1, 6, 4), (3, 4, 4), 4]]
    else:
        rows = [[7], [3, (1, 3, 3), 5], [(1, 3, 3), 2, (1, 3, 3), 40]]
    return [ask(model, cfg, row, family, seed) for seed, row in enumerate(rows)]


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


@pytest.mark.parametrize("family", CASES)
def test_greedy_equals_transformers(family):
    model, cfg, tree = make_case(family)
    asked = prompts_of(model, cfg, family)
    expected = [theirs(model, each, 16) for each in asked]
    together = ours(cfg, tree, [each.prompt for each in asked], 16)
    assert together == expected
    # the pictures matter: with others, others are said
    assert asked[1].prompt.patches is not None
    dark = evolve(asked[1].prompt.patches, pixels=torch.zeros_like(asked[1].prompt.patches.pixels))
    assert ours(cfg, tree, [evolve(asked[1].prompt, patches=dark)], 16) != [expected[1]]


def test_compiled_and_without_the_tower_where_nothing_is_seen():
    """New tokens by compiled layers; a batch of text alone does not run the tower."""
    model, cfg, tree = make_case("qwen3_vl")
    asked = prompts_of(model, cfg, "qwen3_vl")
    prompts = [each.prompt for each in asked]
    assert ours(cfg, tree, prompts[:2], 6, compile=True) == [theirs(model, e, 6) for e in asked[:2]]
    blind = tree | {"encoder": {}, "projector": {}}
    assert ours(cfg, blind, prompts[:1], 6) == ours(cfg, tree, prompts[:1], 6)


def test_prompts_that_do_not_fit_the_model():
    model, cfg, tree = make_case("qwen2_vl")
    seen = prompts_of(model, cfg, "qwen2_vl")[1].prompt
    assert seen.patches is not None
    with pytest.raises(ValueError, match="three positions of its tokens"):
        ours(cfg, tree, [evolve(seen, rope=None)], 2)
    with pytest.raises(ValueError, match=r"must be of shape \(1, 4\)"):
        ours(cfg, tree, [evolve(seen, ids=[1, 2, 3, 4])], 2)
    with pytest.raises(ValueError, match="no tower"):
        ours(evolve(cfg, tower=None), tree, [seen], 2)

"""Whole vision-language models against transformers: logits, the summed loss and the gradient of
every parameter, on rows that mix text, one image, many images and videos."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from attrs import evolve, frozen
from torch import Tensor

from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.grad import value_and_grad
from omnistep.core.tree import Tree
from omnistep.models import decoder, hf
from omnistep.models.config import Config
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import Names, weight_names
from omnistep.models.hf_vision import with_preprocessor
from omnistep.models.layers import rope_frequencies
from omnistep.models.params import params
from tests.models.reference import CPU, Fp64, exported, relative_errors
from tests.models.reference_vision import (
    VISION,
    Grid,
    exact_angles,
    make_images,
    place_units,
)

IMAGE, VIDEO, START, END = 90, 91, 92, 93
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
IDS |= {"vision_start_token_id": START, "vision_end_token_id": END}
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}  # so that positions of images matter
CHUNKS = TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 3]}}
TURNS = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES: dict[str, dict[str, Any]] = {
    "qwen2_vl": IDS | {"text_config": CHUNKS, "vision_config": VISION["qwen2_vl"]},
    "qwen2_vl-tied": IDS
    | {
        "text_config": CHUNKS
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        "vision_config": VISION["qwen2_vl"],
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": IDS | {"text_config": CHUNKS, "vision_config": VISION["qwen2_5_vl"]},
    "qwen3_vl": IDS | {"text_config": TURNS, "vision_config": VISION["qwen3_vl"]},
    "qwen3_vl_moe": IDS
    | {
        "text_config": TURNS | EXPERTS | {"mlp_only_layers": [1]},
        "vision_config": VISION["qwen3_vl"],
    },
    "llava-clip-llama": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION["clip"] | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "llava-siglip-qwen3": {
        "text_config": TEXT | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
        "vision_config": VISION["siglip"] | {"model_type": "siglip_vision_model"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "image_token_index": IMAGE,
    },
}
Sample = Sequence[int | Grid]
"""Its parts: how many tokens of text, or the grid of an image or a video."""
QWEN_SAMPLES: Sequence[Sample] = (
    (9,),
    (3, (1, 4, 6), 5),
    ((1, 4, 4), 2, (1, 2, 8), (1, 6, 10), 4),
    (1, (1, 2, 2), 2, (3, 6, 4), 3, (2, 2, 4), 2),
    (1,),
)
LLAVA_SAMPLES: Sequence[Sample] = (
    (9,),
    (3, (1, 3, 3), 5),
    ((1, 3, 3), 2, (1, 3, 3), (1, 3, 3), 4),
    (1,),
)


@frozen(eq=False)
class Reference:
    """A small random model of transformers, and what it is to us."""

    model: Any
    cfg: Config
    names: Names

    @classmethod
    def of(cls, family: str, extra: Mapping[str, Any], dtype: torch.dtype) -> "Reference":
        config = transformers.AutoConfig.for_model(family, **extra)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the others take no fp64
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForImageTextToText.from_config(config).to(dtype)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name or "ln_q" in name or "bias" in name:
                    p.add_(torch.randn_like(p) * 0.2)
                elif "vision_tower" in name or "projector" in name:
                    p.normal_(std=0.2)
        raw = config.to_dict()
        cfg = decoder_config(raw)
        assert cfg.tower is not None
        pixels = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4)}
        cfg = evolve(cfg, tower=with_preprocessor(cfg.tower, pixels))
        if dtype == torch.float64:
            exact_angles(model)
            _exact_rotary(model, cfg)
        return cls(model.train(), cfg, weight_names(raw, cfg))

    def weights(self, dtype: torch.dtype) -> Tree:
        state, tree = self.model.state_dict(), params(self.cfg)
        source = hf.respelled(hf.InMemory(state), state, self.names, tree)
        return hf.import_weights(tree, self.names, source, dtype, CPU)

    def gradients(self) -> dict[str, Tensor]:
        """Modules have the names of an older version's files."""
        named = self.model.named_parameters()
        return {self.names.spelled(n): p.grad for n, p in named if p.grad is not None}


def _exact_rotary(model: Any, cfg: Config) -> None:
    """transformers computes the text model's frequencies in fp32 whatever the dtype."""
    exact, _ = rope_frequencies(cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling)
    for module in model.model.language_model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            torch.testing.assert_close(
                exact.to(module.inv_freq.dtype), module.inv_freq, rtol=2e-6, atol=0
            )
            module.inv_freq = exact


@frozen(eq=False)
class Row:
    """One row's samples."""

    tokens: list[int]
    kinds: list[int]
    """Of each token: 0 text, 1 image, 2 video."""
    positions: list[int]
    rope: Tensor
    grids: list[Grid]


def make_row(reference: Reference, samples: Sequence[Sample], seq: int, g: torch.Generator) -> Row:
    """These samples, one after another, and padding up to `seq` tokens."""
    row = Row([], [], [], torch.zeros(seq, 3, dtype=torch.int32), [])
    for sample in samples:
        begin, grids = len(row.tokens), [part for part in sample if not isinstance(part, int)]
        for part in sample:
            ids, kinds = _part(part, reference, g)
            row.tokens.extend(ids)
            row.kinds.extend(kinds)
        count = len(row.tokens) - begin
        row.positions.extend(range(count))
        row.grids.extend(grids)
        if reference.cfg.rope_axes:
            kinds = row.kinds[begin:]
            row.rope[begin : begin + count] = _their_rope(reference, kinds, grids)
    lacking = seq - len(row.tokens)
    assert lacking >= 0, f"the samples have {len(row.tokens)} tokens"
    for values in (row.tokens, row.kinds, row.positions):
        values.extend([0] * lacking)
    return row


def _part(
    part: int | Grid, reference: Reference, g: torch.Generator
) -> tuple[list[int], list[int]]:
    """Ids and kinds of the tokens of text, of an image or of a video."""
    if isinstance(part, int):
        return torch.randint(0, 90, (part,), generator=g).tolist(), [0] * part
    assert reference.cfg.tower is not None
    time, rows, columns = part
    each, token = rows * columns // reference.cfg.tower.unit, VIDEO if time > 1 else IMAGE
    by_frame = reference.model.config.model_type.startswith("qwen3_vl")
    runs = [each] * time if by_frame else [each * time]
    ids = [i for count in runs for i in (START, *[token] * count, END)]
    return ids, [{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids]


def _their_rope(reference: Reference, kinds: list[int], grids: Sequence[Grid]) -> Tensor:
    """transformers' positions of a sample: [tokens, 3]."""
    by_kind = [[g for g in grids if (g[0] > 1) == is_video] for is_video in (False, True)]
    image, video = (torch.tensor(found) if found else None for found in by_kind)
    rope, _ = reference.model.model.get_rope_index(
        input_ids=torch.zeros(1, len(kinds), dtype=torch.long),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=image,
        video_grid_thw=video,
    )
    return rope[:, 0].T.int()


def make_case(
    reference: Reference, rows: Sequence[Sequence[Sample]], seq: int, dtype: torch.dtype
) -> tuple[Batch, dict[str, Tensor]]:
    """A Batch, and what transformers takes for it."""
    cfg = reference.cfg
    assert cfg.tower is not None
    g = torch.Generator().manual_seed(1)
    made = [make_row(reference, row, seq, g) for row in rows]
    kinds = torch.tensor([row.kinds for row in made])
    images = make_images(cfg.tower, [row.grids for row in made], 148, dtype)
    tokens = torch.tensor([row.tokens for row in made])
    positions = torch.tensor([row.positions for row in made])
    rope = torch.stack([row.rope for row in made]) if cfg.rope_axes else None
    targets = torch.randint(96, tokens.shape, generator=g)
    weights = (torch.rand(tokens.shape, generator=g) < 0.7).float()
    patches = place_units(images, kinds > 0)
    batch = Batch(tokens, targets, weights, positions=positions, rope=rope, patches=patches)

    inputs = {"input_ids": tokens, "position_ids": positions}
    if rope is None:
        t = cfg.tower
        cut = images.pixel_values.view(-1, t.side, t.side, t.channels, t.patch, t.patch)
        whole = cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return batch, inputs | {"pixel_values": whole}
    inputs["position_ids"] = torch.cat((positions[None], rope.permute(2, 0, 1)))
    grids = [grid for row in made for grid in row.grids]
    pixels = images.pixel_values.split([t * h * w for t, h, w in grids])
    for is_video, end in ((False, ""), (True, "_videos")):
        mine = [i for i, grid in enumerate(grids) if (grid[0] > 1) == is_video]
        inputs[f"pixel_values{end}"] = torch.cat([pixels[i] for i in mine])
        key = "video_grid_thw" if is_video else "image_grid_thw"
        inputs[key] = torch.tensor([grids[i] for i in mine])
    return batch, inputs


@functools.cache
def reference_of(case: str, dtype: torch.dtype) -> Reference:
    return Reference.of(case.partition("-")[0], CASES[case], dtype)


def _errors_of_zeros(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Without rotation a bias on keys changes no score: its gradient is 0, and is held to the scale
    of that on queries."""
    names = [n for n in theirs if n.startswith("vision_tower") and n.endswith("k_proj.bias")]
    scales = {n: theirs[n.replace("k_proj", "q_proj")].norm() for n in names}
    return {n: ((ours[n] - theirs[n]).norm() / scales[n]).item() for n in names}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_match_transformers(case, dtype, tolerance, packed):
    reference = reference_of(case, dtype)
    model, cfg = reference.model, reference.cfg
    samples = QWEN_SAMPLES if cfg.rope_axes else LLAVA_SAMPLES
    rows = [samples[:3], samples[3:]] if packed else [[sample] for sample in samples]
    batch, inputs = make_case(reference, rows, 72, dtype)
    with Fp64() if dtype == torch.float64 else nullcontext():
        out = model(**inputs, use_cache=False).logits
    losses = F.cross_entropy(out.flatten(0, 1), batch.targets.flatten(), reduction="none")
    total = (losses * batch.weights.flatten()).sum()
    model.zero_grad()
    total.backward()

    weights = reference.weights(dtype)
    logits = decoder.make_logits(cfg, dtype=dtype)(weights, batch)
    assert ((logits - out).norm() / out.norm()).item() < tolerance
    tree = decoder.params(cfg)
    loss = decoder.make_stages(cfg, param.one_rank(tree, dtype), compile=False)
    result, grads = value_and_grad(loss)(weights, [batch], [rng.key(0)])
    assert result.weight == batch.weights.sum()
    assert abs(result.total.item() / total.item() - 1) < tolerance
    ours, theirs = exported(tree, reference.names, grads), reference.gradients()
    ours = {name: value for name, value in ours.items() if name not in reference.names.constants}
    errors = relative_errors(ours, theirs) | _errors_of_zeros(ours, theirs)
    assert max(errors.values()) < tolerance, errors


def test_load_balancing_with_images_matches_transformers():
    """Their mean loss of one row without padding, times its weight."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    case = CASES["qwen3_vl_moe"]
    text = case["text_config"] | balanced
    reference = Reference.of("qwen3_vl_moe", case | {"text_config": text}, torch.float64)
    model, cfg = reference.model, reference.cfg
    assert cfg.experts is not None
    assert cfg.experts.aux == 0.3
    batch, inputs = make_case(reference, [[QWEN_SAMPLES[3]]], 43, torch.float64)
    weights = batch.weights.clone()
    weights[:, -1] = 0
    labels = torch.where(weights.roll(1, 1) > 0, batch.tokens, -100)
    with Fp64():
        out = model(**inputs, labels=labels, use_cache=False)
    (out.loss * weights.sum()).backward()
    assert out.aux_loss > 1

    batch = evolve(batch, targets=batch.tokens.roll(-1, 1), weights=weights)
    tree = decoder.params(cfg)
    loss = decoder.make_stages(cfg, param.one_rank(tree, torch.float64), compile=False)
    ours = reference.weights(torch.float64)
    result, grads = value_and_grad(loss)(ours, [batch], [rng.key(0)])
    torch.testing.assert_close(result.objective / result.weight, out.loss, rtol=1e-10, atol=0)
    errors = relative_errors(exported(tree, reference.names, grads), reference.gradients())
    assert max(errors.values()) < 1e-10, errors

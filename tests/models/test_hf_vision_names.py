"""Weights of vision-language models in files: as transformers writes them, in older spellings, and
put together from a text model's and a tower's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from omnistep.core import param
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.checkpoint.weight_files import write_weights
from omnistep.core.param import is_param
from omnistep.core.tree import Tree, leaves_with_names, tree_leaves
from omnistep.models import hf
from omnistep.models.hf_config import compose, decoder_config, written_config
from omnistep.models.hf_names import Names, weight_names
from omnistep.models.hf_vision import tower_kind
from omnistep.models.params import params
from tests.models.reference import CPU, SIZES, exported

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
QWEN |= {"out_hidden_size": 32}
FIXED = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
FIXED |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
SIGLIP = FIXED | {"model_type": "siglip_vision_model", "vision_use_head": False}
TEXT = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 2}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
        | {"mlp_ratio": 2, "patch_size": 4},
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN | {"fullatt_block_indexes": [1], "window_size": 16},
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE, "head_dim": 8},
        "vision_config": QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | MOE | {"rope_parameters": ROPE, "mlp_only_layers": [0]},
        "vision_config": QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
    },
    "llava-clip": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": FIXED | {"model_type": "clip_vision_model"},
        "vision_feature_layer": -1,
    },
    "llava-siglip": {
        "text_config": TEXT | {"model_type": "mixtral", "num_local_experts": 4},
        "vision_config": SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
    },
}
UNUSED = ("post_layernorm.weight", "post_layernorm.bias")
"""Of CLIP and SigLIP, in LLaVA."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory that transformers wrote, of each family."""
    folder = tmp_path_factory.mktemp("saved")
    for name, extra in FAMILIES.items():
        config = transformers.AutoConfig.for_model(name.partition("-")[0], **extra)
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        model.save_pretrained(folder / name)
    return folder


def described(directory: Path) -> tuple[dict[str, Any], Tree, Names]:
    raw = transformers.AutoConfig.from_pretrained(directory).to_dict()
    cfg = decoder_config(raw)
    return raw, params(cfg), weight_names(raw, cfg)


def tensors(directory: Path) -> dict[str, Tensor]:
    weights = open_weights(directory)
    return {name: weights.read(name) for name in weights.infos}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_and_what_is_exported_it_loads(family, saved, tmp_path):
    _, tree, names = described(saved / family)
    theirs = tensors(saved / family)
    used = {name for name in theirs if not name.endswith(UNUSED)}
    assert names.tensors(tree).keys() == used  # nothing is left unread
    weights = hf.import_weights(tree, names, open_weights(saved / family), torch.float32, CPU)

    ours = exported(tree, names, weights)
    assert ours.keys() == theirs.keys()
    for name in used:
        assert torch.equal(ours[name], theirs[name]), name

    write_weights(tmp_path, hf.export_weights(tree, names, weights))
    transformers.AutoConfig.from_pretrained(saved / family).save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    again, info = loaded
    assert not any(info.values()), info
    first = transformers.AutoModelForImageTextToText.from_pretrained(saved / family).state_dict()
    for name, value in again.state_dict().items():
        assert name.endswith(UNUSED) or torch.equal(value, first[name]), name


def other_spelling(family: str, name: str) -> str:
    """As transformers 4.52 wrote it; as the hub has it, where 5.23 writes what 4.52 did."""
    rules = {
        "qwen2_vl": ((r"^model\.", "model.language_model."), (r"^visual", "model.visual")),
        "llava-clip": (
            (r"^language_model\.model", "model.language_model"),
            (r"^language_model\.lm_head", "lm_head"),
            (r"^vision_tower", "model.vision_tower.vision_model"),
            (r"^multi_modal", "model.multi_modal"),
        ),
        "llava-siglip": ((r"^vision_tower", "vision_tower.vision_model"),),
    }
    for pattern, new in rules["qwen2_vl" if family == "qwen2_5_vl" else family]:
        name = re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava-clip", "llava-siglip"])
def test_files_of_other_versions_are_read(family, saved):
    _, tree, names = described(saved / family)
    theirs = tensors(saved / family)
    other = {other_spelling(family, name): value for name, value in theirs.items()}
    assert other.keys() != theirs.keys()
    source = hf.respelled(hf.InMemory(other), other, names, tree)
    weights = hf.import_weights(tree, names, source, torch.float32, CPU)
    for name, value in exported(tree, names, weights).items():
        assert name.endswith(UNUSED) or torch.equal(value, theirs[name]), name


def test_experts_on_the_hub_are_the_other_way_round(saved):
    """Qwen3-VL-MoE's: [experts, in, out]; transformers writes [experts, out, in]."""
    _, tree, names = described(saved / "qwen3_vl_moe")
    theirs = tensors(saved / "qwen3_vl_moe")
    assert theirs["model.language_model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 48, 32)
    hub = {n: v.mT.contiguous() if ".mlp.experts." in n else v for n, v in theirs.items()}
    source = hf.respelled(hf.InMemory(hub), hub, names, tree)
    weights = hf.import_weights(tree, names, source, torch.float32, CPU)
    relayed = hf.relayed_weights(tree, names, source, torch.float64)
    for name, value in exported(tree, names, weights).items():
        assert torch.equal(value, theirs[name]), name
        assert torch.equal(relayed[name].read(), theirs[name].double()), name
    assert relayed.keys() == theirs.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_streamed_as_they_are_imported(family, saved):
    _, tree, names = described(saved / family)
    source = open_weights(saved / family)
    leaves = leaves_with_names(hf.import_weights(tree, names, source, torch.float32, CPU))
    for name, p in leaves_with_names(tree, is_leaf=is_param).items():
        whole = torch.full(p.shape, torch.nan)
        for offset, block in hf.import_blocks(name, p, names, source, torch.float32):
            whole[tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))] = block
        assert torch.equal(whole, leaves[name]), name


def language() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A text model's config.json, and its weights by their names in files."""
    raw = {"model_type": "qwen3", **TEXT, "hidden_size": 24, "head_dim": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    return raw, dict(model.state_dict())


def put_together(directory: Path, held: dict[str, Tensor]) -> tuple[Tree, set[str], dict[str, Any]]:
    """The composed model's leaves and those that no file had; `held`: the encoder's files."""
    text, weights = language()
    encoder = transformers.AutoConfig.from_pretrained(directory).to_dict()
    raw = compose(text, encoder, image_token_id=3)
    cfg = decoder_config(raw)
    tree, names = params(cfg), weight_names(raw, cfg)
    source = hf.composed(
        tower_kind(raw), (hf.InMemory(weights), weights), (hf.InMemory(held), held)
    )
    lacking = hf.absent(tree, names, source)
    leaves = leaves_with_names(tree, is_leaf=is_param)
    made = {name: torch.full(leaves[name].shape, 7.0) for name in lacking}
    values = hf.import_weights(tree, names, source, torch.float32, CPU, instead=made)
    named = exported(tree, names, values)
    again = hf.import_weights(tree, names, hf.InMemory(named), torch.float32, CPU)
    assert all(map(torch.equal, tree_leaves(again), tree_leaves(values)))
    assert torch.equal(named["language_model.model.norm.weight"], weights["model.norm.weight"])
    return values, lacking, named


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", ""])
def test_a_qwen_tower_in_front_of_another_text_model(family, prefix, saved):
    """Its weights are in a whole model's files of any version, or alone; of the projector the last
    layer, whose width is the text model's, is made anew."""
    held = {
        prefix + re.sub(r"^(model\.)?visual\.", "", name): value
        for name, value in tensors(saved / family).items()
        if prefix or "visual." in name
    }
    _, lacking, named = put_together(saved / family, held)
    ends = {"projector.down", "projector.down_bias"}
    if family.startswith("qwen3"):
        ends |= {"projector.deepstack.down", "projector.deepstack.down_bias"}
    assert lacking == ends
    for name, value in named.items():
        if name.startswith("vision_tower.") and (value != 7).any():
            assert torch.equal(value, held[prefix + name.removeprefix("vision_tower.")]), name


@pytest.mark.parametrize("family", ["llava-clip", "llava-siglip"])
@pytest.mark.parametrize("prefix", ["vision_model.", "", "vision_tower."])
def test_a_clip_or_siglip_in_front_of_another_text_model(family, prefix, saved):
    held = {
        name.replace("vision_tower.", prefix): value
        for name, value in tensors(saved / family).items()
        if name.startswith("vision_tower.")
    }
    _, lacking, named = put_together(saved / family, held | {"logit_scale": torch.ones(())})
    assert lacking == {"projector.up", "projector.up_bias", "projector.down", "projector.down_bias"}
    for name in named:
        if not name.startswith("vision_tower.") or name.endswith(UNUSED):
            continue
        assert torch.equal(named[name], held[name.replace("vision_tower.", prefix)]), name


def test_a_projector_that_fits_is_read(saved):
    text, weights = language()
    text |= {"hidden_size": 32, "num_attention_heads": 4}
    held = tensors(saved / "llava-clip")
    encoder = transformers.AutoConfig.from_pretrained(saved / "llava-clip").to_dict()
    raw = compose(text, encoder, image_token_id=3)
    cfg = decoder_config(raw)
    source = hf.composed(
        tower_kind(raw), (hf.InMemory(weights), weights), (hf.InMemory(held), held)
    )
    assert hf.absent(params(cfg), weight_names(raw, cfg), source) == set()


def test_an_encoder_without_the_tower_is_refused():
    _, weights = language()
    with pytest.raises(ValueError, match="of the encoder hold no clip_vision_model, but"):
        hf.composed("clip_vision_model", None, (hf.InMemory(weights), weights))


def test_a_tensor_that_is_missing_is_named(saved):
    _, tree, names = described(saved / "qwen2_vl")
    held = tensors(saved / "qwen2_vl")
    held.pop("visual.blocks.1.attn.qkv.bias")
    source = hf.respelled(hf.InMemory(held), held, names, tree)
    with pytest.raises(ValueError, match=r"no tensor 'visual\.blocks\.1\.attn\.qkv\.bias'"):
        hf.import_weights(tree, names, source, torch.float32, CPU)


def test_a_clip_of_which_a_part_is_used_is_exported_without_the_rest(tmp_path):
    """LLaVA takes the output of the last layer but one; transformers finds all it looks for."""
    extra = {**FAMILIES["llava-clip"], "vision_feature_layer": -2}
    config = transformers.AutoConfig.for_model("llava", **extra)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    raw, tree, names = described(tmp_path / "theirs")
    source = open_weights(tmp_path / "theirs")
    weights = hf.import_weights(tree, names, source, torch.float32, CPU)
    write_weights(tmp_path / "ours", hf.export_weights(tree, names, weights))
    cut = written_config(raw, decoder_config(raw))
    (tmp_path / "ours" / "config.json").write_text(json.dumps(cut))
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    again, info = loaded
    assert not any(info.values()), info
    tokens = torch.tensor([[1, 2, *[90] * 16]])
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 16, 16)}
    model.config.image_token_id = again.config.image_token_id = 90
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    assert decoder_config(cut) == decoder_config(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_transformers(family, saved):
    model = transformers.AutoModelForImageTextToText.from_pretrained(saved / family)
    theirs = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(UNUSED))
    assert param.count(described(saved / family)[1]) == theirs

"""How images are prepared, read from what transformers saves beside a config.json."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from omnistep.bin.image_rules import image_rules
from omnistep.bin.model import PREPROCESSOR, PROCESSOR, read_model, read_preprocessors
from omnistep.core.config import ModelArguments
from omnistep.models.hf_config import ConfigJsonError
from tests.bin.small_vlm import EMOJI

LLAVA = {
    "model_type": "llava",
    "image_token_id": 3,
    "text_config": {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
}


def folder_with(folder: Path, **processor) -> Path:
    """A LLaVA's config.json, and an image processor's file as older versions save it."""
    (folder / "config.json").write_text(json.dumps(LLAVA))
    if processor:
        (folder / PREPROCESSOR).write_text(json.dumps(processor))
    return folder


def read(folder: Path):
    return read_model(ModelArguments(config_path=str(folder)))


def test_a_whole_processor_of_transformers_5_is_read_before_the_older_file(tmp_path):
    folder_with(tmp_path, size={"shortest_edge": 16}, crop_size=16, image_mean=[0.9] * 3)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        resample=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(EMOJI / "tokenizer"))
    LlavaProcessor(images, tokenizer).save_pretrained(tmp_path)
    assert (tmp_path / PROCESSOR).is_file()
    model = read(tmp_path)
    assert model.cfg.tower is not None
    assert (model.cfg.tower.mean, model.cfg.tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    rules = image_rules(model, 32)
    assert rules is not None
    assert (rules.size, rules.shortest, rules.resampling) == (16, 20, "bilinear")


def test_a_processor_that_is_none_of_images_leaves_the_older_file(tmp_path):
    folder_with(tmp_path, image_mean=[0.9] * 3, size={"shortest_edge": 16}, crop_size=16)
    (tmp_path / PROCESSOR).write_text(json.dumps({"patch_size": 4}))
    tower = read(tmp_path).cfg.tower
    assert tower is not None
    assert tower.mean == (0.9,) * 3


def test_without_a_place_nothing_is_read(tmp_path, monkeypatch):
    """As where a checkpoint is converted that lies without its recipe: not the current directory's
    file, which is some other model's."""
    monkeypatch.chdir(folder_with(tmp_path, image_mean=[0.9] * 3))
    assert read_preprocessors(ModelArguments()) == {}


def test_broken_files_are_named(tmp_path):
    (folder_with(tmp_path) / PROCESSOR).write_text("[]")
    with pytest.raises(ConfigJsonError, match=r"processor_config\.json holds a JSON list"):
        read(tmp_path)


@pytest.mark.parametrize("step", ["do_resize", "do_center_crop"])
def test_steps_that_are_left_out_are_refused(tmp_path, step):
    processor = {"size": {"shortest_edge": 16}, "crop_size": 16}
    assert image_rules(read(folder_with(tmp_path, **processor, **{step: None})), 32)
    with pytest.raises(ConfigJsonError, match=f"{step} false .* is not built"):
        image_rules(read(folder_with(tmp_path, **processor, **{step: False})), 32)

"""A random small Qwen2-VL in transformers' layout, with the emoji's tokenizer, and what
transformers has to be given to run it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import omnistep.data.make_emoji as make_emoji

EMOJI = Path(make_emoji.__file__).parent / "emoji"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
"""What an image is in a text."""
_IDS: dict[str, Any] = {
    f"{name}_token_id": make_emoji.SPECIALS.index(f"<|{token}|>")
    for name, token in (
        ("image", "image_pad"),
        ("video", "video_pad"),
        ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    )
}
_TEXT = {
    "vocab_size": make_emoji.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "initializer_range": 0.2,
}
PROCESSOR = Qwen2VLImageProcessorPil(
    size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
    patch_size=4,
    image_mean=[0.5] * 3,
    image_std=[0.2] * 3,
)
TOKENIZER = AutoTokenizer.from_pretrained(str(EMOJI / "tokenizer"))


def save_vlm(folder: Path) -> None:
    """The model, and images a.png and b.png, of which b is made smaller."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=_TEXT, vision_config=_VISION, **_IDS)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    for name, (width, height) in (("a.png", (24, 16)), ("b.png", (100, 60))):
        drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3))
        Image.fromarray(drawn.astype(np.uint8)).save(folder / name)


def load_theirs(folder: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()


def inputs_of(text: str, images: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
    """What transformers' model takes; `text` has PLACE for each image."""
    made = dict(PROCESSOR(images=list(images), return_tensors="pt")) if images else {}
    parts = text.split(PLACE)
    for i, grid in enumerate(made.get("image_grid_thw", ())):
        pads = "<|image_pad|>" * int(grid.prod() // 4)
        parts[i] += f"<|vision_start|>{pads}<|vision_end|>"
    ids = TOKENIZER("".join(parts), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return {"input_ids": ids, "mm_token_type_ids": (ids == _IDS["image_token_id"]).int(), **made}


def chat(*turns: str) -> str:
    """A conversation in the emoji's template, after which the assistant speaks."""
    roles = ("user", "assistant")
    said = [f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)]
    return "".join(said) + "<|im_start|>assistant\n"

"""The common work with images: the model, its samples in each step, and how they are to be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np

EMOJI = Path(__file__).parents[2] / "data" / "emoji"
SAMPLES = 32
"""Of a step."""
PIXELS = 32
"""Of an image's side, as it comes."""


def model_config() -> dict[str, Any]:
    """config.json of a Qwen2-VL of 10 M parameters, of which the tower has a third."""
    return {
        "model_type": "qwen2_vl",
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen2_vl_text",
            "vocab_size": 1024,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": 6,
            "embed_dim": 192,
            "hidden_size": 256,
            "num_heads": 3,
            "mlp_ratio": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
    }


def records(steps: int) -> list[list[dict[str, Any]]]:
    """The conversations of each step: the emoji that one trains on, in a random order."""
    lines = (EMOJI / "train.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    order = np.resize(order, (steps, SAMPLES))
    return [[json.loads(lines[i]) for i in step] for step in order]

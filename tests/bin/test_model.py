"""The model of a run: which of its parts learn."""

from typing import Any

import torch

from omnistep.bin.model import make_model, parts_of, with_frozen
from omnistep.core.config import TrainArguments
from omnistep.models.balance import make_balance
from omnistep.parallel.mesh import Mesh
from tests.bin.test_image_rules import LLAVA

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def test_the_bias_of_a_frozen_router_stays():
    """No gradient moves it, but how full the experts are."""
    model = make_model({**LLAVA, "text_config": DEEPSEEK})
    load = torch.tensor([[4, 0, 2, 2], [0, 8, 0, 0]])
    count = torch.tensor(16)
    sums = {"load": load, "routed": count, "served": count}

    def moved(freeze: Any) -> float:
        frozen = with_frozen(model, TrainArguments(output_dir="", freeze=freeze))
        balance = make_balance(frozen.cfg, Mesh(torch.device("cpu")))
        assert balance is not None
        after, _ = balance.after({"router_bias": torch.zeros(2, 4)}, sums)
        return after["router_bias"].abs().max().item()

    assert moved("encoder") > 0
    assert moved(("encoder", "language_model")) == 0
    learning = parts_of(with_frozen(model, TrainArguments(output_dir="", freeze="language_model")))
    assert learning.pop("language_model") == 0
    assert all(learning.values())

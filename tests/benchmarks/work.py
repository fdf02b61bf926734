"""The common work: sizes, tokens, initial weights, and the gate that a contestant stands at."""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROWS, SEQ, VOCAB = 4, 512, 8192
TOKENS = ROWS * SEQ
EMBED, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 512, 8, 8, 4, 64, 1408
LR, DECAY, CLIP = 3e-4, 0.1, 1.0
EXPERTS, TOP_K, EXPERT_MLP = 8, 2, 768


def tokens(steps: int, seed: int = 0) -> np.ndarray:
    """int64 [steps, rows, seq]: Zipf's unigrams, every second position a fixed map of the last."""
    rng = np.random.default_rng(seed + 1)
    p = 1.0 / np.arange(1, VOCAB + 1)
    p /= p.sum()
    successor = rng.permutation(VOCAB)
    out = []
    for _ in range(steps):
        x = rng.choice(VOCAB, size=(ROWS, SEQ), p=p)
        follow = rng.random((ROWS, SEQ)) < 0.5
        for t in range(1, SEQ):
            x[:, t] = np.where(follow[:, t], successor[x[:, t - 1]], x[:, t])
        out.append(x)
    return np.stack(out).astype(np.int64)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face's names of a Qwen3: N(0, 0.02), norms at one."""
    rng = np.random.default_rng(seed + 2)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    w = {"model.embed_tokens.weight": draw(VOCAB, EMBED)}
    w["model.norm.weight"] = np.ones(EMBED, np.float32)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        w[p + "self_attn.q_proj.weight"] = draw(HEADS * HEAD_DIM, EMBED)
        w[p + "self_attn.k_proj.weight"] = draw(KV_HEADS * HEAD_DIM, EMBED)
        w[p + "self_attn.v_proj.weight"] = draw(KV_HEADS * HEAD_DIM, EMBED)
        w[p + "self_attn.o_proj.weight"] = draw(EMBED, HEADS * HEAD_DIM)
        w[p + "self_attn.q_norm.weight"] = np.ones(HEAD_DIM, np.float32)
        w[p + "self_attn.k_norm.weight"] = np.ones(HEAD_DIM, np.float32)
        w[p + "mlp.gate_proj.weight"] = draw(MLP, EMBED)
        w[p + "mlp.up_proj.weight"] = draw(MLP, EMBED)
        w[p + "mlp.down_proj.weight"] = draw(EMBED, MLP)
        w[p + "input_layernorm.weight"] = np.ones(EMBED, np.float32)
        w[p + "post_attention_layernorm.weight"] = np.ones(EMBED, np.float32)
    return w


def flops_per_step() -> float:
    """6 per matrix weight and token, and attention's causal half; no recomputation."""
    per_layer = 2 * EMBED * HEADS * HEAD_DIM + 2 * EMBED * KV_HEADS * HEAD_DIM + 3 * EMBED * MLP
    products = 6 * TOKENS * (LAYERS * per_layer + EMBED * VOCAB)
    return products + 6 * LAYERS * ROWS * SEQ * SEQ * HEADS * HEAD_DIM


def moe_config() -> dict[str, object]:
    """config.json of a Qwen3-MoE."""
    return {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "intermediate_size": MLP,
        "moe_intermediate_size": EXPERT_MLP,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": SEQ,
        "tie_word_embeddings": True,
        "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def moe_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face's names in a checkpoint of a Qwen3-MoE: N(0, 0.02), norms at one."""
    rng = np.random.default_rng(seed + 3)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    w = {name: value for name, value in weights(seed).items() if ".mlp." not in name}
    for i in range(LAYERS):
        p = f"model.layers.{i}.mlp."
        w[p + "gate.weight"] = draw(EXPERTS, EMBED)
        for e in range(EXPERTS):
            w[p + f"experts.{e}.gate_proj.weight"] = draw(EXPERT_MLP, EMBED)
            w[p + f"experts.{e}.up_proj.weight"] = draw(EXPERT_MLP, EMBED)
            w[p + f"experts.{e}.down_proj.weight"] = draw(EMBED, EXPERT_MLP)
    return w


def moe_active_weights() -> int:
    """Matrix weights that a token is multiplied with."""
    attention = 2 * EMBED * HEAD_DIM * (HEADS + KV_HEADS)
    experts = EXPERTS * EMBED + TOP_K * 3 * EMBED * EXPERT_MLP
    return LAYERS * (attention + experts) + EMBED * VOCAB


def moe_flops_per_step() -> float:
    """6 per active weight and token, and attention's causal half; no recomputation."""
    pairs = ROWS * SEQ * SEQ
    return 6 * TOKENS * moe_active_weights() + 6 * LAYERS * pairs * HEADS * HEAD_DIM


class Profiler:
    """Writes a table of the operators of steps 5 to 7 to `path`, if there is one."""

    def __init__(self, path: str):
        self.path = path

    def at(self, step: int) -> None:
        """Before each step."""
        if self.path and step == 5:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()
        if self.path and step == 8:
            self.profiler.stop()
            table = self.profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=70
            )
            Path(self.path).write_text(table)


class Timer:
    """`start` before a step, `stop` after it: writes seconds, those of all CPUs together, loss and
    peak memory."""

    def start(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.begin, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, loss: float) -> None:
        seconds, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {"seconds": seconds, "cpu_seconds": cpu, "loss": loss, "peak_mb": peak}
        print(json.dumps(figures), flush=True)

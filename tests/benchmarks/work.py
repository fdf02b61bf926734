"""The common work: sizes, tokens, initial weights, and the gate that a contestant stands at."""

import json
import resource
import sys
import time

import numpy as np

ROWS, SEQ, VOCAB = 4, 512, 8192
TOKENS = ROWS * SEQ
EMBED, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 512, 8, 8, 4, 64, 1408
LR, DECAY, CLIP = 3e-4, 0.1, 1.0


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


class Timer:
    """`start` before a step, `stop` after it: writes seconds, loss and peak memory."""

    def start(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.begin = time.perf_counter()

    def stop(self, loss: float) -> None:
        seconds = time.perf_counter() - self.begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak}), flush=True)

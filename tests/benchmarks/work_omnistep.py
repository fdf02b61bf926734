"""Omnistep on the common work, as a researcher would write it."""

import argparse

import numpy as np
import torch
import work

from omnistep.core import param, rng
from omnistep.core.allocator import keep_freed_memory
from omnistep.core.batch import Batch
from omnistep.core.optim import adamw
from omnistep.core.step import init_state, make_train_step
from omnistep.models import decoder, hf
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import weight_names
from omnistep.parallel.remat import Remat


def config() -> decoder.Config:
    return decoder.Config(
        vocab=work.VOCAB,
        embed=work.EMBED,
        layers=work.LAYERS,
        heads=work.HEADS,
        kv_heads=work.KV_HEADS,
        head_dim=work.HEAD_DIM,
        mlp=work.MLP,
        tied=True,
        qk_norm=True,
    )


def train(
    family: str,
    cfg: decoder.Config,
    initial: dict[str, np.ndarray],
    steps: int,
    remat: Remat = "none",
    profile: str = "",
) -> None:
    keep_freed_memory()  # as bin/train does
    tree = decoder.params(cfg)
    cpu = torch.device("cpu")
    source = hf.InMemory({name: torch.from_numpy(value) for name, value in initial.items()})
    params = hf.import_weights(
        tree, weight_names({"model_type": family}, cfg), source, torch.float32, cpu
    )
    initial.clear()
    del source
    optimizer = adamw(weight_decay=work.DECAY, decay_mask=param.decay_mask(tree))
    train_step = make_train_step(
        decoder.make_stages(cfg, param.one_rank(tree, torch.float32), mode=remat),
        optimizer,
        lambda step: torch.full((), work.LR),
        max_grad_norm=work.CLIP,
    )
    state = init_state(params, optimizer, rng.key(0))
    positions = torch.arange(work.SEQ).expand(work.ROWS, work.SEQ).contiguous()
    weights = torch.ones(work.ROWS, work.SEQ)
    weights[:, -1] = 0
    timer, profiler = work.Timer(), work.Profiler(profile)
    for i, tokens in enumerate(torch.from_numpy(work.tokens(steps))):
        profiler.at(i)
        timer.start()
        batch = Batch(tokens, tokens.roll(-1, 1), weights, positions=positions)
        state, metrics = train_step(state, batch)
        timer.stop(float(metrics["loss"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--model", choices=["dense", "moe"], default="dense")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--profile", default="", help="write a table of steps 5 to 7 here")
    options = parser.parse_args()
    if options.model == "moe":
        work_to_do = "qwen3_moe", decoder_config(work.moe_config()), work.moe_weights()
    else:
        work_to_do = "qwen3", config(), work.weights()
    train(*work_to_do, options.steps, options.remat, options.profile)

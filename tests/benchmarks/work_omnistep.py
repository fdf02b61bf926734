"""Omnistep on the common work, as a researcher would write it."""

import argparse

import torch
import work

from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.optim import adamw
from omnistep.core.step import init_state, make_train_step
from omnistep.models import decoder, hf
from omnistep.models.hf_names import weight_names


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--profile", default="", help="write a table of steps 5 to 7 here")
    options = parser.parse_args()

    cfg = config()
    tree = decoder.params(cfg)
    initial = work.weights()
    cpu = torch.device("cpu")
    source = hf.InMemory({name: torch.from_numpy(value) for name, value in initial.items()})
    params = hf.import_weights(tree, weight_names("qwen3", cfg), source, torch.float32, cpu)
    del initial, source
    optimizer = adamw(weight_decay=work.DECAY, decay_mask=param.decay_mask(tree))
    train_step = make_train_step(
        decoder.make_stages(cfg, param.one_rank(tree, torch.float32), mode=options.remat),
        optimizer,
        lambda step: torch.full((), work.LR),
        max_grad_norm=work.CLIP,
    )
    state = init_state(params, optimizer, rng.key(0))
    positions = torch.arange(work.SEQ).expand(work.ROWS, work.SEQ).contiguous()
    weights = torch.ones(work.ROWS, work.SEQ)
    weights[:, -1] = 0
    timer, profiler = work.Timer(), None
    for i, tokens in enumerate(torch.from_numpy(work.tokens(options.steps))):
        if options.profile and i == 5:
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            profiler.start()
        timer.start()
        batch = Batch(tokens, tokens.roll(-1, 1), weights, positions=positions)
        state, metrics = train_step(state, batch)
        timer.stop(float(metrics["loss"]))
        if profiler and i == 7:
            profiler.stop()
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            with open(options.profile, "w") as file:
                file.write(table)
            profiler = None


if __name__ == "__main__":
    main()

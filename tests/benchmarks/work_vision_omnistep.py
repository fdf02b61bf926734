"""Omnistep on the common work with images, as a researcher would write it: the samples of a step
are packed into one row."""

import argparse
from pathlib import Path

import torch
import work
import work_vision

from omnistep.core import param, rng
from omnistep.core.allocator import keep_freed_memory
from omnistep.core.batch import Batch
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.optim import adamw
from omnistep.core.step import init_state, make_train_step
from omnistep.data.assemble import assemble
from omnistep.data.chat import open_template
from omnistep.data.files.records import Record
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Conversation
from omnistep.models import decoder, hf
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import weight_names

STEP = 64
"""A row's length is a multiple of this."""


def batches(steps: int) -> list[Batch]:
    """All of one size: that which the longest needs."""
    tokenizer = load_tokenizer(work_vision.EMOJI / "tokenizer")
    config = work_vision.model_config()
    vision = config["vision_config"]
    of_sample = (work_vision.PIXELS // vision["patch_size"]) ** 2
    rules = ImageRules(
        patch=vision["patch_size"],
        max_patches=of_sample,
        image_token=config["image_token_id"],
        video_token=config["video_token_id"],
        frames=vision["temporal_patch_size"],
        merge=vision["spatial_merge_size"],
        min_pixels=work_vision.PIXELS**2,
        rope=True,
    )
    template = open_template("tokenizer", tokenizer)
    read = Conversation(tokenizer, 512, template, images=rules)
    rows = [
        [piece for record in step for piece in read(Record(record, "train.jsonl"))]
        for step in work_vision.records(steps)
    ]
    longest = max(sum(len(piece.ids) for piece in row) for row in rows)
    seq, patches = -(-longest // STEP) * STEP, work_vision.SAMPLES * of_sample
    return [assemble([row], seq, 0, "positions", rules, patches) for row in rows]


def train(folder: Path, steps: int, profile: str) -> None:
    keep_freed_memory()  # as bin/train does
    raw = work_vision.model_config()
    cfg, cpu = decoder_config(raw), torch.device("cpu")
    tree = decoder.params(cfg)
    source, names = open_weights(folder), weight_names(raw, cfg)
    weights = hf.import_weights(tree, names, source, torch.float32, cpu)
    optimizer = adamw(weight_decay=work.DECAY, decay_mask=param.decay_mask(tree))
    train_step = make_train_step(
        decoder.make_stages(cfg, param.one_rank(tree, torch.float32)),
        optimizer,
        lambda step: torch.full((), work.LR),
        max_grad_norm=work.CLIP,
    )
    state = init_state(weights, optimizer, rng.key(0))
    timer, profiler = work.Timer(), work.Profiler(profile)
    for i, batch in enumerate(batches(steps)):
        profiler.at(i)
        timer.start()
        state, metrics = train_step(state, batch)
        timer.stop(float(metrics["loss"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--profile", default="", help="write a table of steps 5 to 7 here")
    options = parser.parse_args()
    train(options.model, options.steps, options.profile)

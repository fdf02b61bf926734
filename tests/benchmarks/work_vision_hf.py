"""transformers' Qwen2-VL on the common work with images: its processor's batches, padded."""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
import work
import work_vision

IMAGE = "<|image_pad|>"


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """What Qwen2VLProcessor makes: that class itself insists on torchvision, for videos."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(work_vision.EMOJI / "tokenizer")
    vision = work_vision.model_config()["vision_config"]
    see = transformers.Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        min_pixels=work_vision.PIXELS**2,
        max_pixels=work_vision.PIXELS**2,
    )
    made = []
    for records in work_vision.records(steps):
        seen = see([image_of(record) for record in records], return_tensors="pt")
        units = seen["image_grid_thw"].prod(1) // vision["spatial_merge_size"] ** 2
        texts, answers = zip(*(text_of(record, tokenizer) for record in records), strict=True)
        long = [text.replace(IMAGE, IMAGE * n) for text, n in zip(texts, units, strict=True)]
        batch = tokenizer(long, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        batch["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int()
        end = batch["attention_mask"].sum(1, keepdim=True) - 1  # where a line break follows
        index = torch.arange(ids.shape[1])
        learnt = (index < end) & (index >= end - torch.tensor(answers)[:, None])
        made.append({**batch, **seen, "labels": torch.where(learnt, ids, -100)})
    return made


def image_of(record: dict[str, Any]) -> PIL.Image.Image:
    data = record["images"][0].partition("base64,")[2]
    return PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def text_of(record: dict[str, Any], tokenizer: Any) -> tuple[str, int]:
    """The conversation, and how many tokens the answer has, end of turn included."""
    user, assistant = record["messages"]
    words = {"type": "text", "text": user["content"].removeprefix("<image>")}
    messages = [{"role": "user", "content": [{"type": "image"}, words]}, assistant]
    marked = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text, sum(marked["assistant_masks"])


def train(folder: Path, steps: int, compile: bool, profile: str) -> None:
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": work.DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=work.LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if compile else model
    timer, profiler = work.Timer(), work.Profiler(profile)
    for i, batch in enumerate(batches(steps)):
        profiler.at(i)
        timer.start()
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.stop(loss.item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", default="", help="write a table of steps 5 to 7 here")
    options = parser.parse_args()
    train(options.model, options.steps, options.compile, options.profile)

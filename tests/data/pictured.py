"""A small tokenizer with the special tokens of the Qwen-VL families, and rules that suit it."""

import json

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from omnistep.data.images import FPS, Clip
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import load_tokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT = ["user assistant system hello world what is in this image <0.3 seconds> a cat, a dog"] * 3
PARTS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""A template that loops over parts, as the Qwen-VL families' own."""


def write_tokenizer(folder, template=PARTS):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def qwen_rules(tokenizer, *, timestamps=False, patch=14, **rest):
    """Of a tower of Qwen's, with small images."""
    image, video, start, end = (
        tokenizer.token_id(token)
        for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
    bounds = {
        name: rest.pop(name, default * (patch * 2) ** 2)
        for name, default in (
            ("min_pixels", 1),
            ("max_pixels", 40),
            ("video_min_pixels", 1),
            ("video_max_pixels", 40),
        )
    }
    given = {"max_patches": 1000, "frames": 2, "merge": 2, "rope": True, **rest}
    return ImageRules(
        patch=patch,
        image_token=image,
        video_token=video,
        vision_start=start,
        vision_end=end,
        timestamps=timestamps,
        **bounds,
        **given,
    )


def held(frames, video=False, fps=FPS):
    """A clip of images that are decoded already."""
    return Clip(frames[0].size, len(frames), lambda: iter(frames), video, fps)

"""A trained model as a Hugging Face directory: weights, config, tokenizer."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from omnistep.bin.model import GENERATION, PREPROCESSOR, PROCESSOR, VIDEO, Model, stop_tokens
from omnistep.core.checkpoint.pieces import LazyTensor
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.weight_files import write_weights
from omnistep.data.chat import Template
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.turns import turn_end
from omnistep.models.hf_config import ARCHITECTURES, written_config

OTHER_FILES = (GENERATION, PREPROCESSOR, VIDEO, PROCESSOR)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
)
MORE_TEMPLATES = "additional_chat_templates"
"""A folder beside these."""


def export(
    directory: Path,
    model: Model,
    weights: Mapping[str, LazyTensor],
    tokenizer: Tokenizer | None,
    template: Template | None,
    ranks: Ranks,
) -> None:
    """Writes what `transformers.AutoModelForCausalLM.from_pretrained(directory)` reads, with the
    tokenizer and the chat template it was trained by, if any. Files of an earlier export are
    replaced one by one, each by a whole one. Collective: all ranks write weights, rank 0 the
    rest. Raises CheckpointError on all of them where one fails."""
    write_weights(directory, weights, ranks=ranks)
    dtype = next(iter(weights.values())).dtype

    def write_rest() -> None:
        written = write_config(directory, model, dtype, tokenizer, template)
        if tokenizer is not None:
            written |= copy_tokenizer(directory, tokenizer, template)
        for name in {*TOKENIZER_FILES, *OTHER_FILES} - written:  # of another model
            (directory / name).unlink(missing_ok=True)

    ranks.ask_first(write_rest)


def write_config(
    directory: Path,
    model: Model,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    template: Template | None,
) -> set[str]:
    """config.json as the model was given, with what it is now; generation_config.json, where it had
    one or a turn ends with a token of its own. Of tokens that end an answer the model's own come
    first. Returns the names of the files."""
    stale = ("torch_dtype", "quantization_config")  # dtype's older name; of what was read, if any
    config = {k: v for k, v in written_config(model.raw, model.cfg).items() if k not in stale}
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    config["dtype"] = str(dtype).removeprefix("torch.")
    ends: list[int] = []
    if tokenizer is not None:
        ends = stop_tokens(model, tokenizer.eos_id)
        end = None if template is None else turn_end(template, tokenizer)
        ends += [] if end is None or end in ends else [end]
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    generation = dict(model.generation)
    if generation or template is not None:
        generation |= {"eos_token_id": config["eos_token_id"]} if ends else {}
        _write(directory / GENERATION, json.dumps(generation, indent=2) + "\n")
    _write(directory / "config.json", json.dumps(config, indent=2) + "\n")
    for name, content in model.preprocessors.items():
        _write(directory / name, json.dumps(content, indent=2) + "\n")
    written = {"config.json", *model.preprocessors}
    return {*written, GENERATION} if generation or template is not None else written


def copy_tokenizer(directory: Path, tokenizer: Tokenizer, template: Template | None) -> set[str]:
    """The tokenizer's files, with the template in the place of its own. Returns their names."""
    own = template is None or template.jinja == tokenizer.chat_template
    source, written = Path(tokenizer.path), set[str]()
    for name in TOKENIZER_FILES:
        # tokenizer.path may be a file of any name
        file = source if name == "tokenizer.json" else source.parent / name
        if file.is_file():
            written.add(name)
            if not _same(file, directory / name):
                shutil.copyfile(file, directory / name)
    more, there = source.parent / MORE_TEMPLATES, directory / MORE_TEMPLATES
    if not (more.exists() and there.exists() and more.samefile(there)):
        shutil.rmtree(there, ignore_errors=True)  # of another model, or another template
        if own and more.is_dir():
            shutil.copytree(more, there)
    if template is not None and not own:
        _write(directory / "chat_template.jinja", template.jinja)
        written.add("chat_template.jinja")
        place = directory / "tokenizer_config.json"
        if place.is_file():
            named = json.loads(place.read_text(encoding="utf-8")) | {
                "chat_template": template.jinja
            }
            _write(place, json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    return written


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)

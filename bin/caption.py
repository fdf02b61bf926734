"""bin/caption: how much of what a model says of images it sees in them."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen

from omnistep.bin.ask import IMAGE, Ask
from omnistep.bin.build import read_tokenizer
from omnistep.bin.model import Model, RunError, read_model, read_weights
from omnistep.bin.sample import Speaker, chat_template, make_speaker, rules_of
from omnistep.core import rng
from omnistep.core.cache import keep_compiled_code_private
from omnistep.core.config import InferArguments, ModelArguments
from omnistep.core.param import one_rank
from omnistep.core.screen import show_error, write_all_characters
from omnistep.core.tree import Tree
from omnistep.data.assemble import assemble
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.images import Source, open_clip
from omnistep.data.source import open_source
from omnistep.data.transform import Conversation, Tokens
from omnistep.models.decoder import make_stages
from omnistep.models.hf_config import ConfigJsonError
from omnistep.models.params import params
from omnistep.parallel.mesh import pick_device

DESCRIPTION = """\
Holds a trained model to conversations about images that it has not seen, each with one answer of
the assistant at its end (the caption), and tells for each way of asking

  loss      of what training learns, the assistant's words: nats per token, and per caption
  category  how often the greedy caption is right up to the separator
  caption   how often it is right to the last letter

The ways of asking:

  own       with the record's own images
  other     with those of another record: of the one half the file further on, or the next after
            it whose caption differs. What a model can say without knowing what is seen
  none      without images, and without <image> in the messages. A model that has always seen images
            was not made for this
  blind     --blind MODEL: another model, trained on the captions alone, without images. The fair
            text-only baseline

and besides, what one would get who always says the file's most frequent category.
"""
LONGEST = 1 << 14
"""Tokens of a conversation; what is longer is cut at the front, as in training."""
GRID = (8, 6)
"""Images of the picture, across and down."""


@frozen(eq=False)
class Captioner:
    """A model ready to be asked."""

    model: Model
    params: Tree
    ask: Ask
    speaker: Speaker

    @property
    def transform(self) -> Conversation:
        assert self.ask.template is not None
        return Conversation(
            self.ask.tokenizer, LONGEST, self.ask.template, ("messages",), self.ask.rules
        )


@frozen
class Score:
    """What a way of asking came to."""

    way: str
    nats_per_token: float
    nats_per_caption: float
    category: float
    """Share of captions that are right up to the separator."""
    caption: float
    """Share that is right altogether."""
    said: tuple[str, ...] = attrs.field(repr=False)


def open_captioner(path: str, max_tokens: int) -> Captioner:
    """The model of a directory in Hugging Face's layout, with its tokenizer and chat template."""
    if not Path(path).is_dir():
        raise RunError(f"there is no directory {path}")
    place = ModelArguments(config_path=path, tokenizer_path=path)
    model = read_model(place)
    tokenizer, rules = read_tokenizer(place, model.cfg), rules_of(model)
    weights = read_weights(path, model, torch.float32, pick_device())
    infer = InferArguments(model_path=path, do_sample=False, max_tokens=max_tokens, compile=False)
    ask = Ask(tokenizer, rules, chat_template(tokenizer, rules))
    return Captioner(model, weights, ask, make_speaker(infer, model, weights, tokenizer))


# ---- records -------------------------------------------------------------------------------


def read_records(path: str, limit: int | None) -> list[Record]:
    """Raises DataError: no conversation whose last message is the assistant's."""
    source = open_source(path, ("messages",), beside=("images",), argument="DATA")
    records = [source[i] for i in range(min(len(source), limit or len(source)))]
    for record in records:
        messages = fields_of(record).get("messages")
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError(f"{record.where}: its last message is not the assistant's")
    return records


def fields_of(record: Record) -> Mapping[str, Any]:
    if isinstance(record.content, str):
        raise DataError(f"{record.where}: a conversation is expected, not text")
    return record.content


def caption_of(record: Record) -> str:
    return fields_of(record)["messages"][-1]["content"]


def changed(record: Record, **fields: Any) -> Record:
    return attrs.evolve(record, content={**fields_of(record), **fields})


def question_of(record: Record) -> Record:
    """The messages before the caption."""
    return changed(record, messages=fields_of(record)["messages"][:-1])


def with_others_images(records: Sequence[Record]) -> list[Record]:
    """Each with the images of the one half of them further on, or the next after it that has
    another caption. They must be as many."""
    exchanged = []
    for i, record in enumerate(records):
        start = i + len(records) // 2
        after = (records[n % len(records)] for n in range(start, start + len(records)))
        other = next((r for r in after if caption_of(r) != caption_of(record)), None)
        if other is None:
            raise DataError(
                f"{record.where}: no other caption is among the records, so no other images can be "
                "shown in place of its own: give a file of at least two captions"
            )
        mine, theirs = (fields_of(r).get("images") or [] for r in (record, other))
        if len(mine) != len(theirs):
            raise DataError(
                f"{record.where} has {len(mine)} images and {other.where} {len(theirs)}: images "
                "can be exchanged only where all records have as many"
            )
        exchanged.append(attrs.evolve(changed(record, images=theirs), folder=other.folder))
    return exchanged


def without_images(records: Sequence[Record]) -> list[Record]:
    def blind(message: Mapping[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": content.replace(IMAGE, "")}
        return {**message, "content": [part for part in content if part.get("type") == "text"]}

    return [
        changed(record, messages=[blind(m) for m in fields_of(record)["messages"]], images=None)
        for record in records
    ]


# ---- scores --------------------------------------------------------------------------------


def losses(captioner: Captioner, records: Sequence[Record], size: int) -> tuple[float, float]:
    """(sum of the nats of all learned tokens, their number), `size` records at a time."""
    cfg, rules, tokenizer = captioner.model.cfg, captioner.ask.rules, captioner.ask.tokenizer
    loss = make_stages(cfg, one_rank(params(cfg), torch.float32), compile=False)
    transform, key = captioner.transform, rng.key(0, pick_device())
    total = weight = 0.0
    for part in _parts(records, size):
        rows = [[piece] for record in part for piece in transform(record)]
        batch = assemble(
            rows,
            max(len(piece.ids) for (piece,) in rows),
            tokenizer.eos_id,
            "positions",
            rules,
            _budget(rows, rules.unit) if rules else 0,
        )
        with torch.no_grad():
            out = loss(captioner.params, batch, key)
        total, weight = total + float(out.total), weight + float(out.weight)
    return total, weight


def _budget(rows: Sequence[Sequence[Tokens]], unit: int) -> int:
    """At least one unit: a tower always has something to look at."""
    return max(unit, *(piece.patches for (piece,) in rows))


def captions(captioner: Captioner, records: Sequence[Record], size: int) -> list[str]:
    """What the model says itself, always its likeliest token."""
    ask, said = captioner.ask, []
    for part in _parts(records, size):
        prompts = [ask.conversation(question_of(record)) for record in part]
        said += captioner.speaker.answers(prompts, len(said))
    return [text.strip() for text in said]


def _parts(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    return (records[i : i + size] for i in range(0, len(records), size))


def score(
    way: str, captioner: Captioner, records: Sequence[Record], separator: str, size: int
) -> Score:
    total, weight = losses(captioner, records, size)
    said, true = captions(captioner, records, size), [caption_of(record) for record in records]
    right = [
        a.split(separator)[0] == b.split(separator)[0] for a, b in zip(said, true, strict=True)
    ]
    return Score(
        way,
        nats_per_token=total / weight,
        nats_per_caption=total / len(records),
        category=sum(right) / len(records),
        caption=sum(a == b for a, b in zip(said, true, strict=True)) / len(records),
        said=tuple(said),
    )


def table(scores: Sequence[Score], most_frequent: tuple[str, float], count: int) -> str:
    lines = [f"{count} captions", f"{'':>8}  nats/token  nats/caption  category  caption"]
    lines += [
        f"{s.way:>8}  {s.nats_per_token:10.3f}  {s.nats_per_caption:12.2f}  {s.category:8.1%}  "
        f"{s.caption:7.1%}"
        for s in scores
    ]
    name, share = most_frequent
    return "\n".join([*lines, f"{'':>8}  always {name!r}: {share:.1%} of the categories"])


# ---- picture -------------------------------------------------------------------------------


def draw(records: Sequence[Record], said: Sequence[str], separator: str, path: Path) -> None:
    """Some of the images, evenly through the file, each over what was said of it (green where its
    category is right) and what it is."""
    from matplotlib.figure import Figure

    across, down = GRID
    chosen = [i * len(records) // (across * down) for i in range(across * down)]
    chosen = list(dict.fromkeys(chosen))
    figure = Figure(figsize=(across * 1.9, down * 1.75))
    for place, i in enumerate(chosen, 1):
        axes = figure.add_subplot(down, across, place)
        axes.axis("off")
        image = fields_of(records[i])["images"][0]
        axes.imshow(open_clip(Source(image), records[i].folder).frames[0])
        true = caption_of(records[i])
        right = said[i].split(separator)[0] == true.split(separator)[0]
        words = (said[i], "seagreen" if right else "firebrick"), (true, "black")
        for line, (text, colour) in enumerate(words):
            axes.text(
                0.5, -0.04 - 0.17 * line, _short(text), color=colour, fontsize=6.5,
                ha="center", va="top", transform=axes.transAxes,
            )  # fmt: skip
    figure.tight_layout(h_pad=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _short(text: str, most: int = 34) -> str:
    text = "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in re.sub(r"\s+", " ", text))
    return text if len(text) <= most else text[: most - 1] + "…"


# ---- the command ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    write_all_characters()
    args = _parser().parse_args(argv)
    try:
        keep_compiled_code_private()
        run(args, print)
    except (RunError, DataError, ConfigJsonError, OSError) as error:
        show_error(error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "omnistep-caption",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="directory of weights, config and tokenizer (output_dir/hf)")
    parser.add_argument("data", help="conversations; what data.eval_path may be")
    parser.add_argument("--blind", metavar="MODEL", help="directory of a model without images")
    parser.add_argument("--separator", default=": ", help="ends the category; default %(default)r")
    parser.add_argument("--limit", type=int, help="read only so many records")
    parser.add_argument("--max-tokens", type=int, default=32, help="of a caption; %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="records at once; %(default)s")
    parser.add_argument("--grid", type=Path, help="write a picture of images and captions (.png)")
    parser.add_argument("--json", type=Path, help="write the numbers, and all that was said")
    return parser


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Score]:
    records = read_records(args.data, args.limit)
    own = open_captioner(args.model, args.max_tokens)
    if own.ask.rules is None:
        raise RunError(f"{args.model} takes no images: its config.json has no vision tower")
    asked = {"own": (own, records), "other": (own, with_others_images(records))}
    asked["none"] = (own, without_images(records))
    if args.blind:
        asked["blind"] = (open_captioner(args.blind, args.max_tokens), without_images(records))
    scores = [
        score(way, captioner, given, args.separator, args.batch_size)
        for way, (captioner, given) in asked.items()
    ]
    counts = Counter(caption_of(record).split(args.separator)[0] for record in records)
    name, count = counts.most_common(1)[0]
    say(table(scores, (name, count / len(records)), len(records)))
    if args.grid:
        draw(records, scores[0].said, args.separator, args.grid)
        say(f"images and captions: {args.grid}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        true = [caption_of(record) for record in records]
        content = {"scores": [attrs.asdict(s) for s in scores], "true": true}
        args.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        say(f"numbers: {args.json}")
    return scores


if __name__ == "__main__":
    sys.exit(main())

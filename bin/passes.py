"""What the data of a run amounts to: how often it is read, and the date that templates tell."""

import datetime
from pathlib import Path

import attrs
from attrs import frozen

from omnistep.core.config import Arguments, DataArguments
from omnistep.core.config_io import parse
from omnistep.data.blocks import Block, Task
from omnistep.data.loader import Loader
from omnistep.data.sandbox import uses
from omnistep.data.tokenizer import Tokenizer

MANY = 20
"""Passes above which a run is warned that was not told how large its data is."""
DEFAULT_SIZE = attrs.fields(DataArguments).train_size.default


@frozen
class Passes:
    """How often a run reads its data, about."""

    count: float
    given: bool
    """data.train_size was."""

    @property
    def text(self) -> str:
        return f"about {self.count:.1f} passes over the data"

    @property
    def warning(self) -> str | None:
        if self.given or self.count <= MANY:
            return None
        return (
            f"data.train_size was not given, and its default of {DEFAULT_SIZE:,} tokens makes "
            f"{self.count:,.0f} passes over this data: give the tokens of an epoch"
        )


def passes(loader: Loader, args: Arguments, tokens: int) -> Passes | None:
    """Estimates the passes that `tokens` tokens make, from the first samples of data that can be
    read at random; None where that would be slow, or can't be told."""
    reader, config = loader.reader, loader.config
    samples = getattr(reader, "samples", 0)
    if not config.packed or config.images is not None or reader.blocks is None or not samples:
        return None
    found = reader[Task(None, 0, 0)]
    if not isinstance(found, Block) or not len(found.ids):
        return None
    blocks = reader.blocks if reader.blocks > 1 else 1.0
    return Passes(tokens / (len(found.ids) * blocks), args.data.train_size != DEFAULT_SIZE)


def with_date(args: Arguments, tokenizer: Tokenizer, recipe: Path) -> Arguments:
    """The arguments with the date that the chat template tells, where it tells one and none is
    given: that of the run that goes on, by its recipe, or today. So a run that goes on renders the
    same texts."""
    data = args.data
    if data.data_type != "conversation" or data.chat_date is not None:
        return args
    jinja = tokenizer.chat_template or "" if data.chat_template == "tokenizer" else ""
    if Path(data.chat_template).expanduser().is_file():
        jinja = Path(data.chat_template).expanduser().read_text(encoding="utf-8", errors="replace")
    if not uses(jinja + (tokenizer.tool_use_template or ""), "strftime_now"):
        return args
    before = None
    if args.train.load_checkpoint_path is not None and recipe.is_file():
        before = parse([str(recipe)]).data.chat_date
    date = before or datetime.date.today().isoformat()
    return attrs.evolve(args, data=attrs.evolve(data, chat_date=date))


def moment(chat_date: str | None) -> datetime.datetime | None:
    """The moment that templates take for the present: noon of a date."""
    if chat_date is None:
        return None
    return datetime.datetime.combine(datetime.date.fromisoformat(chat_date), datetime.time(12))

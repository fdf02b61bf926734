"""The Reader that the data arguments ask for: its sources, their transforms, their order."""

import datetime
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import attrs
import cattrs
import yaml
from attrs import frozen

from omnistep.core.config_rules import DATASETS, TEXT_KEYS, expand_path
from omnistep.data.blocks import BlockRules, Reader
from omnistep.data.chat import open_template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.mapping import MappingReader, Part
from omnistep.data.messages import VIDEO_KEYS
from omnistep.data.order import Shuffled, mix
from omnistep.data.source import (
    BLOCK_SAMPLES,
    Files,
    Source,
    key_names,
    open_source,
    open_stream,
)
from omnistep.data.streaming import Stream, StreamReader, Unread
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.transform import Conversation, Plaintext, Transform

DataType = Literal["plaintext", "conversation"]
SHUFFLED_RECORDS, SHUFFLED_PARTS = 512, 32
"""The shuffle buffer of streams, unless it is given: in records, in 16 KiB parts of a .txt."""
BLOCK_PIXELS, FEWEST_SAMPLES = 32 << 20, 8
"""A block holds images of at most so many bytes where that leaves it so many samples."""


@frozen(kw_only=True)
class Described:
    """The arguments that say what the data is; their meaning is theirs."""

    path: str
    argument: str = "data.train_path"
    """where `path` was given, for errors"""
    data_type: DataType = "plaintext"
    datasets_type: str = "mapping"
    text_keys: tuple[str, ...] = attrs.field(default=("content_split",), converter=key_names)
    chat_template: str = "default"
    now: datetime.datetime | None = None
    """The moment that the template tells."""
    image_keys: tuple[str, ...] = attrs.field(default=("images",), converter=key_names)
    shuffle_buffer: int | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """Fields that belong to a conversation, where a record has them."""
        if self.data_type == "plaintext":
            return ()
        return ("tools", *self.image_keys, *VIDEO_KEYS)


@frozen(kw_only=True)
class Weighted:
    """An entry under `sources:` of a .yaml that data.train_path names."""

    path: str
    """spelled like data.train_path; relative to the .yaml"""
    weight: float
    """its share of the samples, relative to the others'"""
    name: str | None = None
    """in logs; by default the path's last part"""
    data_type: DataType | None = None
    text_keys: str | tuple[str, ...] | None = None
    chat_template: str | None = None


def open_reader(described: Described, tokenizer: Tokenizer, rules: BlockRules, seed: int) -> Reader:
    """Raises DataError where the data, the template or the dataset can't be had."""
    kind = described.datasets_type
    if kind not in ("mapping", "iterable"):
        return _custom(described, tokenizer, rules, seed)
    weighted = Path(described.path).suffix in (".yaml", ".yml")
    if kind == "iterable" and weighted:
        raise DataError(
            f"{described.argument} {described.path}: weighted sources are read by random access; "
            "set data.datasets_type to mapping"
        )
    if kind == "iterable":
        stream = open_stream(
            described.path,
            described.text_keys,
            beside=described.beside,
            argument=described.argument,
        )
        buffer = described.shuffle_buffer or _samples(
            SHUFFLED_PARTS if stream.only_text else SHUFFLED_RECORDS, rules
        )
        transform = make_transform(described, tokenizer, rules)
        return StreamReader(stream, transform, buffer, seed, rules)
    if weighted:
        return _mixture(described, tokenizer, rules, seed)
    source = _source(described)
    part = Part("data", source, make_transform(described, tokenizer, rules))
    order = Shuffled(len(source), seed)
    return MappingReader((part,), order, _samples(source.block_samples, rules), rules)


def make_transform(described: Described, tokenizer: Tokenizer, rules: BlockRules) -> Transform:
    if described.data_type == "plaintext":
        return Plaintext(tokenizer, rules.longest, described.text_keys)
    template = open_template(described.chat_template, tokenizer, rules.images, described.now)
    return Conversation(
        tokenizer,
        rules.longest,
        template,
        described.text_keys,
        rules.images,
        described.image_keys,
    )


def _source(described: Described) -> Files:
    return open_source(
        described.path,
        described.text_keys,
        beside=described.beside,
        argument=described.argument,
    )


def _samples(usual: int, rules: BlockRules) -> int:
    """Of a block: fewer where images would make it large."""
    if rules.images is None:
        return usual
    most = BLOCK_PIXELS // (rules.images.max_patches * rules.images.values)
    return min(usual, max(FEWEST_SAMPLES, most))


# ---- weighted sources ----------------------------------------------------------------------


def _mixture(described: Described, tokenizer: Tokenizer, rules: BlockRules, seed: int) -> Reader:
    parts = []
    listed = read_weighted(Path(described.path).expanduser(), described.argument)
    for entry in listed:
        own = {
            name: value
            for name in ("data_type", "text_keys", "chat_template")
            if (value := getattr(entry, name)) is not None
        }
        if "data_type" in own and "text_keys" not in own:
            own["text_keys"] = TEXT_KEYS[own["data_type"]]
        argument = f"{described.path}, source {entry.name}"
        inner = attrs.evolve(described, path=entry.path, argument=argument, **own)
        source = _source(inner)
        transform = make_transform(inner, tokenizer, rules)
        parts.append(Part(entry.name or "", source, transform))
    order = mix([len(part.source) for part in parts], [entry.weight for entry in listed], seed)
    block = _samples(min(part.source.block_samples for part in parts), rules)
    return MappingReader(tuple(parts), order, block, rules)


def read_weighted(file: Path, argument: str) -> list[Weighted]:
    """The sources a .yaml lists, each with a name of its own and a path from here."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{argument}: {file} can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{argument}: {file} is not YAML: {' '.join(str(error).split())}") from None
    listed = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(listed, list) or not listed or set(content) != {"sources"}:
        raise DataError(
            f"{argument}: {file} must hold `sources:`, a list of {{path, weight}} with "
            f"{', '.join(a.name for a in attrs.fields(Weighted)[2:])} where wanted"
        )
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(
        str | tuple[str, ...] | None, lambda value, _: value and key_names(value)
    )
    found = []
    for number, entry in enumerate(listed, 1):
        try:
            source = converter.structure(entry, Weighted)
        except Exception as error:  # cattrs collects them in groups
            reasons = "; ".join(cattrs.transform_error(error))
            raise DataError(f"{argument}: {file}, source {number}: {reasons}") from None
        if not 0 < source.weight < float("inf"):
            raise DataError(
                f"{argument}: {file}, source {number}: weight is {source.weight}; it must be "
                "greater than 0"
            )
        path = ",".join(_from(file.parent, part.strip()) for part in source.path.split(","))
        name = source.name or Path(source.path).name
        if name in (other.name for other in found):
            raise DataError(f"{argument}: {file}: two sources are called {name}; give them names")
        found.append(attrs.evolve(source, path=path, name=name))
    return found


def _from(folder: Path, path: str) -> str:
    return str(folder / Path(expand_path(path)).expanduser())


# ---- custom datasets -----------------------------------------------------------------------


@frozen(eq=False)
class Indexed:
    """Anything with a length and random access, as a Source."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        return _record(self.dataset[index], f"{self.name}, sample {index + 1}")


@frozen(eq=False)
class Iterated:
    """Anything that can be iterated over again and again, as a Stream of one file."""

    dataset: Iterable[Any]
    name: str
    files: int = 1

    def open(self, file: int) -> Iterator[Unread]:
        for number, value in enumerate(self.dataset, 1):
            yield partial(_record, value, f"{self.name}, sample {number}")


def _custom(described: Described, tokenizer: Tokenizer, rules: BlockRules, seed: int) -> Reader:
    name = described.datasets_type
    dataset = _load(name)(described.path)
    transform = make_transform(described, tokenizer, rules)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        source: Source = Indexed(dataset, name)
        if len(source) == 0:
            raise DataError(f"data.datasets_type {name}: the data is empty, it has no samples")
        if described.shuffle_buffer is not None:
            raise DataError(
                f"data.shuffle_buffer shuffles streams; data.datasets_type {name} returned what "
                "has random access, and all of that is shuffled: leave it out"
            )
        order = Shuffled(len(source), seed)
        return MappingReader(
            (Part("data", source, transform),), order, _samples(BLOCK_SAMPLES, rules), rules
        )
    if not hasattr(dataset, "__iter__") or iter(dataset) is dataset:
        raise DataError(
            f"data.datasets_type {name} returned a {type(dataset).__name__}; it must return what "
            "has __len__ and __getitem__, or what iter() can start again and again"
        )
    stream: Stream = Iterated(dataset, name)
    buffer = described.shuffle_buffer or _samples(SHUFFLED_RECORDS, rules)
    return StreamReader(stream, transform, buffer, seed, rules)


def _load(name: str) -> Any:
    """The function that a dotted path or a registered name means."""
    registered = {entry.name: entry for entry in entry_points(group=DATASETS)}
    if name in registered:
        return registered[name].load()
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"data.datasets_type {name}: {error} (looked from {Path.cwd()})") from error


def _record(value: Any, where: str) -> Record:
    if isinstance(value, Record):
        return value
    if isinstance(value, str | Mapping):
        return Record(value, where)
    raise DataError(f"{where}: a text or a mapping is expected, this is a {type(value).__name__}")

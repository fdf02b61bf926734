"""A made-up source whose tokens say which piece they belong to, and what checks batches of it."""

import itertools
from typing import Any

import attrs
import numpy as np
import tokenizers
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

from omnistep.core.batch import segment_starts
from omnistep.core.checkpoint.ranks import ALONE
from omnistep.data.files.records import Record
from omnistep.data.loader import make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.mapping import MappingReader, Part
from omnistep.data.order import Shuffled
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.transform import Tokens

PAD = 1
TOKENIZER = Tokenizer(
    tokenizers.Tokenizer(tokenizers.models.BPE()), "", 10**9, eos_id=0, pad_id=PAD
)
SPAN = 64  # a token's id is SPAN * (number of its piece) + its place in the piece


@attrs.frozen
class Made:
    """A source of samples of given pieces' lengths."""

    samples: tuple[tuple[int, ...], ...]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        first = 1 + sum(len(sample) for sample in self.samples[:index])
        pieces = [[first + i, n] for i, n in enumerate(self.samples[index])]
        return Record({"pieces": pieces}, f"sample {index}")


def pieces_of(record):
    return [
        Tokens(np.arange(SPAN * number, SPAN * number + length, dtype=np.int32))
        for number, length in record.content["pieces"]
    ]


def reader_of(source, config, transform=pieces_of, block_samples=8):
    order = Shuffled(len(source), config.seed)
    return MappingReader((Part("data", source, transform),), order, block_samples, config.rules)


def loader_of(samples, *, block_samples=8, transform=pieces_of, ranks=ALONE, **config):
    config = LoaderConfig(**config)
    reader = reader_of(Made(samples), config, transform, block_samples)
    return make_loader(reader, TOKENIZER, config, ranks)


def take(loader, count, state=None):
    return list(itertools.islice(loader.batches(state), count))


def same(a, b):
    (x, form), (y, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(
        p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(x, y, strict=True)
    )


def vars_of(batch):
    return attrs.asdict(batch, recurse=False)


@st.composite
def cases(draw):
    """Samples and a configuration in which every piece fits."""
    length = st.integers(1, 16)
    samples = draw(
        st.lists(st.lists(length, min_size=1, max_size=3).map(tuple), min_size=4, max_size=40)
    )
    packed = draw(st.sampled_from(["rmpad", "rmpad_with_pos_ids", None]))
    config = {
        "max_seq_len": draw(st.integers(16, 20)),
        "micro_batch_size": draw(st.integers(1, 4)),
        "accumulate": draw(st.integers(1, 2)),
        "block_samples": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 9)),
    }
    if packed:
        config[packed] = True
        if config["micro_batch_size"] > 1:
            config["dyn_bsz_margin"] = draw(st.integers(0, 9))
        config["bsz_warmup_steps"] = draw(st.integers(0, 6))
    else:
        config["drop_last"] = draw(st.booleans()) and len(samples) >= 8
    return tuple(samples), config


def check_rows(batch, budget):
    """Every row is pieces one after another, then padding; returns the pieces' numbers."""
    numbers = []
    starts = segment_starts(batch)
    for r, row in enumerate(batch.tokens.tolist()):
        used = sum(token != PAD for token in row)
        assert all(token == PAD for token in row[used:])
        begin = 0
        for i, token in enumerate(row[:used]):
            number, place = divmod(token, SPAN)
            if place == 0:
                numbers.append(number)
                begin = i
            assert place == i - begin
            assert starts[r, i] == begin
            goes_on = i + 1 < used and row[i + 1] == token + 1
            assert batch.weights[r, i] == goes_on
            assert batch.targets[r, i] == (token + 1 if goes_on else 0)
        assert used <= budget
        assert not batch.weights[r, used:].any()
        assert not batch.targets[r, used:].any()
        if batch.positions is not None:
            assert not batch.positions[r, used:].any()
    return numbers


def micro_batches(batch, accumulate):
    if accumulate == 1:
        return [batch]
    return [
        attrs.evolve(batch, **{k: v[i] for k, v in vars_of(batch).items() if v is not None})
        for i in range(accumulate)
    ]


LENGTHS = tuple(
    (int(a), int(b)) for a, b in np.random.default_rng(0).integers(1, 17, (90, 2)).tolist()
)
PACKED: dict[str, Any] = {
    "max_seq_len": 16,
    "micro_batch_size": 4,
    "rmpad_with_pos_ids": True,
    "block_samples": 8,
}

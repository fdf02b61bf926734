"""The stream of batches with images: whole, the same for any workers, resumable to the bit, and of
the same shapes whatever the mix."""

import itertools
import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from omnistep.core.batch import segment_starts
from omnistep.core.checkpoint.ranks import ALONE
from omnistep.data.errors import DataError
from omnistep.data.loader import make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.sources import Described, open_reader
from omnistep.data.state import DataState
from tests.data.made import same
from tests.data.pictured import qwen_rules, write_tokenizer
from tests.data.test_images import encoded
from tests.data.together import together

COUNT = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Conversations with no, one and several images. An image's pixels all have one value, and a
    conversation says the values of its images."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lines, value = [], 1
    for _ in range(COUNT):
        values = list(range(value, value + int(random.integers(0, 4))))
        value += len(values)
        for each in values:
            size = tuple(random.integers(28, 120, 2).tolist())
            image = PIL.Image.new("RGB", size, (each % 256,) * 3)
            (folder / f"{each}.png").write_bytes(encoded(image))
        question = "<image>" * len(values) + "hello world " * int(random.integers(1, 9))
        answer = " ".join(map(str, values)) or "none"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"messages": messages, "images": [f"{each}.png" for each in values]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.txt").write_text("hello world what is in this image\n" * 800)
    assert value < 256
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


PACKED = {"max_seq_len": 160, "micro_batch_size": 3, "rmpad_with_pos_ids": True}
PADDED = PACKED | {"rmpad_with_pos_ids": False}


def loader_of(
    folder, tokenizer, name="chats.jsonl", kind="mapping", patches=96, ranks=ALONE, **config
):
    told: list[str] = []
    images = qwen_rules(tokenizer, window=2, max_patches=patches)
    config = LoaderConfig(**(PACKED | config), images=images)
    words = name.endswith(".txt")
    described = Described(
        path=str(folder / name),
        data_type="plaintext" if words else "conversation",
        datasets_type=kind,
        text_keys="text" if words else "messages",
        chat_template="qwen2vl",
        shuffle_buffer=16 if kind == "iterable" else None,
    )
    reader = open_reader(described, tokenizer, config.rules, config.seed)
    return make_loader(reader, tokenizer, config, ranks, told.append), told


def take(loader, count, state=None) -> list[Any]:
    return list(itertools.islice(loader.batches(state), count))


def values_of(batch, tokenizer):
    """Of each sample in a batch with images, the values of its pixels; they must be those it says,
    each image's patches all of one value and bounded by one frame."""
    found = []
    starts, patches = segment_starts(batch), batch.patches
    for row in range(len(batch.tokens)):
        for start in np.unique(starts[row]).tolist():
            here = np.flatnonzero(starts[row].numpy() == start)
            units = patches.units[row, here].numpy()
            units = units[units >= 0]
            if not len(units):
                continue
            pixels = patches.pixels[row].reshape(-1, 4 * 1176)[units]
            assert (pixels == pixels[:, :1]).all()
            values = [value for value, _ in itertools.groupby(pixels[:, 0].tolist())]
            frames = patches.frames[row].reshape(-1, 4, 2)[units]
            assert len(np.unique(frames.reshape(-1, 2), axis=0)) == len(values)
            learnt = batch.targets[row, here][batch.weights[row, here] > 0]
            said = tokenizer.decode(learnt.tolist(), skip_special_tokens=True).strip()
            assert said == " ".join(map(str, values))
            found += values
    return found


@pytest.mark.parametrize("config", [PACKED, PADDED])
def test_every_image_comes_once_with_its_own_words(config, folder, tokenizer):
    loader, _ = loader_of(folder, tokenizer, **config)
    found = [v for batch in loader.eval_batches() for v in values_of(batch, tokenizer)]
    images = sorted(int(path.stem) for path in folder.glob("*.png"))
    assert sorted(found) == images


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_the_stream_resumes_to_the_bit(kind, folder, tokenizer):
    def again():
        return loader_of(folder, tokenizer, kind=kind, accumulate=2)[0]

    whole = take(again(), 14)
    held = 0
    for place in (1, 4, 7):
        state = DataState.from_json(json.loads(json.dumps(whole[place][1].to_json())))
        held += len(state.held)
        rest = take(again(), 6, state)
        want = whole[place + 1 : place + 7]
        assert [state for _, state in rest] == [state for _, state in want]
        assert all(same(a, b) for (a, _), (b, _) in zip(rest, want, strict=True))
    assert held


def test_a_piece_that_waits_keeps_its_own_pixels_alone(folder, tokenizer):
    loader, _ = loader_of(folder, tokenizer)
    held: list[Any] = [
        p for a in loader._arrivals(loader._one_pass(), ()) for p in a.held if p.vision
    ]
    assert held
    assert all(piece.vision.pixels.base is None for piece in held)


def test_workers_and_the_place_of_packing_change_nothing(folder, tokenizer):
    want = take(loader_of(folder, tokenizer)[0], 8)
    options: dict[str, Any]
    for options in ({"num_workers": 2}, {"num_workers": 1, "dyn_bsz_runtime": "main"}):
        loader, _ = loader_of(folder, tokenizer, **options)
        got = take(loader, 8)
        assert all(same(a, b) for (a, _), (b, _) in zip(got, want, strict=True))
        loader.close()


def test_ranks_that_read_together_share_the_rows_of_one(folder, tokenizer):
    whole = take(loader_of(folder, tokenizer, accumulate=2)[0], 5)

    def act(ranks):
        own = {"data_rank": ranks.rank, "data_ranks": 2}
        return take(loader_of(folder, tokenizer, ranks=ranks, **own)[0], 5)

    parts = together(2, act)
    for step, (batch, state) in enumerate(whole):
        assert all(part[step][1] == state for part in parts)
        shares = [tree_map(lambda leaf: leaf[None], part[step][0]) for part in parts]
        assert same(tree_map(lambda *rows: torch.cat(rows), *shares), batch)


@pytest.mark.parametrize("config", [PACKED, PADDED, PADDED | {"rmpad": True}])
def test_all_mixes_have_the_same_shapes(config, folder, tokenizer):
    (folder / "text.jsonl").write_text(
        "".join(
            json.dumps(record) + "\n"
            for line in (folder / "chats.jsonl").read_text().splitlines()
            if not (record := json.loads(line))["images"]
        )
    )
    shapes = set()
    for name in ("chats.jsonl", "text.jsonl", "words.txt"):
        loader, _ = loader_of(folder, tokenizer, name, accumulate=2, **config)
        for batch, _ in take(loader, 3):
            leaves = tree_leaves(batch)
            assert len(leaves) == 10
            shapes.add(tuple((leaf.shape, leaf.dtype) for leaf in leaves))
            seen = (batch.patches.units >= 0).any()
            assert seen == (name == "chats.jsonl")
    assert len(shapes) == 1


def test_rows_keep_the_budget_of_patches_too(folder, tokenizer):
    loader, _ = loader_of(folder, tokenizer, patches=96)
    batches = [batch for batch, _ in take(loader, 30)]
    used = np.array([int((batch.patches.units >= 0).sum()) * 4 for batch in batches])
    assert batches[0].patches.pixels.shape[1] == 3 * 96
    assert used.max() <= 3 * 96
    tokens = np.array([int((batch.positions > 0).sum()) for batch in batches])
    assert (np.maximum(used / (3 * 96), tokens / 480) > 0.85).mean() > 0.8


def test_another_budget_is_another_stream(folder, tokenizer):
    (_, state) = take(loader_of(folder, tokenizer)[0], 1)[0]
    with pytest.raises(DataError, match=r"data.max_patches was 96, is 100"):
        take(loader_of(folder, tokenizer, patches=100)[0], 1, state)


def test_broken_images_are_skipped_and_counted(folder, tokenizer, tmp_path):
    lines = (folder / "chats.jsonl").read_text().splitlines()
    for path in folder.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    broken = next(i for i, line in enumerate(lines) if json.loads(line)["images"])
    name = json.loads(lines[broken])["images"][0]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    loader, _ = loader_of(tmp_path, tokenizer)
    with pytest.raises(DataError, match=rf"chats.jsonl, line {broken + 1}: .*{name} can't be dec"):
        take(loader, 20)
    loader, told = loader_of(tmp_path, tokenizer, bad_records="skip")
    _, state = take(loader, 12)[-1]
    assert state.skipped >= 1
    assert f"{name} can't be decoded" in told[0]

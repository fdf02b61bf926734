"""Tokens that stand for images: their number, units and positions, as transformers has them."""

from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from omnistep.core.batch import positions, segment_starts
from omnistep.data.assemble import assemble
from omnistep.data.errors import DataError
from omnistep.data.image_tokens import expand, with_times
from omnistep.data.images import see
from omnistep.data.patches import Grid
from omnistep.data.transform import Tokens
from tests.data.pictured import held
from tests.data.test_images import QWEN2, picture, rules_of

IMAGE, VIDEO, START, END = 1, 2, 3, 4
FAMILIES = {
    "qwen2_vl": (Qwen2VLModel, {}),
    "qwen2_5_vl": (Qwen2_5_VLModel, {"tokens_per_second": 2.0, "window": 2}),
    "qwen3_vl": (
        Qwen3VLModel,
        {"timestamps": True, "vision_start": START, "vision_end": END},
    ),
}


def upstream(model, ids, grids):
    """transformers' own positions [tokens, 3] of one sample."""
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    self = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    self.get_vision_position_ids = model.get_vision_position_ids.__get__(self)
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    shapes = {
        video: [[g.time, g.rows, g.columns] for g in grids if g.video == video]
        for video in (False, True)
    }
    rope, _ = model.get_rope_index(
        self,
        torch.from_numpy(ids).long()[None],
        torch.from_numpy(kinds)[None],
        torch.tensor(shapes[False]) if shapes[False] else None,
        torch.tensor(shapes[True]) if shapes[True] else None,
        second_per_grid_ts=torch.tensor([g.interval for g in grids if g.video]),
    )
    return rope[:, 0].T.numpy()


def mixture(random, timestamps):
    """A text with one token an image, and its grids. Between two images stands text, as all
    templates have it."""
    ids, grids = random.integers(10, 99, random.integers(0, 9)).tolist(), []
    for _ in range(random.integers(0, 5)):
        video = bool(random.integers(0, 2))
        time = int(random.integers(1, 5)) if video else 1
        rows, columns = (2 * random.integers(1, 7, 2)).tolist()
        seconds = tuple((np.arange(time) / 3).tolist())
        grids.append(Grid(time, rows, columns, video, seconds, float(random.choice([0.5, 1 / 3]))))
        for _ in range(time if timestamps and video else 1):
            ids += [*random.integers(10, 99, 2).tolist(), START, VIDEO if video else IMAGE, END]
    ids += random.integers(10, 99, random.integers(1, 9)).tolist()
    return np.array(ids, np.int32), grids


def pixels_of(grids, rules):
    count = sum(grid.time * grid.rows * grid.columns for grid in grids)
    return np.zeros((count, rules.values), np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_as_transformers(family):
    model, options = FAMILIES[family]
    rules = rules_of(**QWEN2, rope=True, **options)
    random = np.random.default_rng(0)
    for _ in range(200):
        ids, grids = mixture(random, rules.timestamps)
        learn = random.random(len(ids)) < 0.5
        made = expand(ids, learn, pixels_of(grids, rules), grids, rules)
        assert made.vision.rope is not None
        assert np.array_equal(made.vision.rope, upstream(model, made.ids, grids))
        # each unit once, where its image's tokens are; text is as it was
        stands = np.isin(made.ids, rules.tokens)
        assert np.array_equal(made.ids[~stands], ids[~np.isin(ids, rules.tokens)])
        assert np.array_equal(made.learn[~stands], learn[~np.isin(ids, rules.tokens)])
        assert not made.learn[stands].any()
        assert np.array_equal(stands, made.vision.units >= 0)
        assert sorted(made.vision.units[stands]) == list(range(len(made.vision.pixels) // 4))


def test_a_token_has_the_unit_of_its_place():
    """Rows and columns of the patches of a token's unit are those of its position."""
    rules = rules_of(**QWEN2, window=2, rope=True, min_pixels=1)
    pixels, grids = see([held((picture(28 * 5, 28 * 3),)), held((picture(28, 56),))], rules)
    ids = np.array([IMAGE, 50, IMAGE], np.int32)
    vision = expand(ids, np.zeros(3, bool), pixels, grids, rules).vision
    assert vision.rope is not None
    stands = vision.units >= 0
    corners = vision.places[vision.units[stands] * 4]
    first = np.where(np.arange(len(stands)) < 15, 0, 6)[:, None]
    assert np.array_equal(corners[:, :2] // 2, (vision.rope[:, 1:] - first)[stands])


def test_a_class_token_becomes_no_token():
    rules = rules_of(patch=14, size=28, class_token=True)
    pixels, grids = see([held((picture(30, 30),))] * 2, rules)
    ids = np.array([50, IMAGE, IMAGE, 51], np.int32)
    made = expand(ids, np.ones(4, bool), pixels, grids, rules)
    assert made.ids.tolist() == [50] + [IMAGE] * 8 + [51]
    assert made.vision.units.tolist() == [-1, 1, 2, 3, 4, 6, 7, 8, 9, -1]
    assert made.vision.rope is None


def test_too_many_or_too_few_tokens():
    rules = rules_of(**QWEN2)
    grid = Grid(1, 2, 2)
    for ids, grids in (([5, IMAGE], []), ([5], [grid]), ([VIDEO], [grid])):
        with pytest.raises(DataError, match=r"has token \d \d times, but there are \d images"):
            expand(np.array(ids), np.ones(len(ids), bool), pixels_of(grids, rules), grids, rules)
    grids = [grid, Grid(1, 2, 2, True)]
    with pytest.raises(DataError, match="another order"):
        expand(np.array([VIDEO, IMAGE]), np.ones(2, bool), pixels_of(grids, rules), grids, rules)


def test_times_are_written_as_qwen3_vl():
    frames = tuple(picture(56, 56) for _ in range(5))
    rules = rules_of(**QWEN2, timestamps=True, vision_start=3, vision_end=4)
    _, grids = see([held(frames, True, 3.0), held(frames[:1]), held(frames[:2], True)], rules)
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<v>",
        vision_start_token="<s>",
        vision_end_token="<e>",
    )
    processor._calculate_timestamps = Qwen3VLProcessor._calculate_timestamps.__get__(processor)
    metadata = [
        SimpleNamespace(fps=fps, frames_indices=np.arange(n)) for fps, n in ((3.0, 5), (None, 2))
    ]
    text = "a<s><v><e>b<v>c"
    want = "a<s>{}<e>b{}c"
    each = []
    for number, grid in enumerate([grids[0], grids[2]]):
        sizes = np.array([[grid.time, 2, 2]])
        inputs = {"video_grid_thw": np.concatenate([sizes] * 2), "video_metadata": metadata}
        each.append(Qwen3VLProcessor.replace_video_token(processor, inputs, number))
    spans = [(0, 1), (10, 11), (14, 15)]
    written, moved = with_times(text, spans, grids, "<v>", ("<s>", "<e>"))
    assert written == want.format(*each)
    assert [written[a:b] for a, b in moved] == ["a", "b", "c"]
    with pytest.raises(DataError, match="<v> 1 times, but there are 2"):
        with_times("<v>", [], grids, "<v>", ("<s>", "<e>"))


# ---- batches -------------------------------------------------------------------------------


def made_pieces(random, rules, count):
    pieces = []
    for _ in range(count):
        ids, grids = mixture(random, False)
        pixels = random.integers(0, 256, pixels_of(grids, rules).shape, np.uint8)
        made = expand(ids, np.ones(len(ids), bool), pixels, grids, rules)
        vision = made.vision if grids else None
        pieces.append(Tokens(made.ids, made.learn, vision=vision))
    return pieces


@pytest.mark.parametrize("window", [None, 2])
def test_a_batch_holds_the_patches_of_its_pieces(window):
    rules = rules_of(**QWEN2, rope=True, window=window)
    random = np.random.default_rng(1)
    rows = [made_pieces(random, rules, count) for count in (3, 0, 5)]
    seq = max(sum(len(p.ids) for p in row) for row in rows) + 7
    budget = max(sum(p.patches for p in row) for row in rows) + 8
    batch = assemble(rows, seq, 9, "positions", rules, budget)
    patches, rope = batch.patches, batch.rope
    assert patches is not None
    assert rope is not None
    assert patches.pixels.shape == (3, budget, 1176)
    assert (patches.windows is None) == (window is None)
    dtypes = {k: v.dtype for k, v in attrs.asdict(patches, recurse=False).items() if v is not None}
    assert dtypes.pop("pixels") == torch.uint8
    assert set(dtypes.values()) == {torch.int32}
    starts = segment_starts(batch)
    for row, pieces in enumerate(rows):
        at = first = 0
        for piece in pieces:
            here, patch = slice(at, at + len(piece.ids)), slice(first, first + piece.patches)
            assert starts[row, at] == at
            # images are never learnt
            learnt = batch.weights[row, here].bool()
            assert not np.isin(batch.targets[row, here][learnt], rules.tokens).any()
            if piece.vision is None:
                assert np.array_equal(rope[row, here], np.arange(len(piece.ids))[:, None] + [0] * 3)
                assert (patches.units[row, here] == -1).all()
            else:
                vision = piece.vision
                assert np.array_equal(patches.pixels[row, patch], vision.pixels)
                assert np.array_equal(patches.places[row, patch], vision.places)
                assert np.array_equal(patches.frames[row, patch], vision.frames + first)
                if patches.windows is not None:
                    assert np.array_equal(patches.windows[row, patch], vision.windows + first)
                assert np.array_equal(rope[row, here], vision.rope)
                units = patches.units[row, here].numpy()
                assert np.array_equal(
                    units, np.where(vision.units < 0, -1, vision.units + first // 4)
                )
            at, first = here.stop, patch.stop
        assert not patches.pixels[row, first:].any()
        assert patches.places[row, first:].tolist() == [[0, 0, 1, 1]] * (budget - first)
        alone = [[i, i + 1] for i in range(first, budget)]
        assert patches.frames[row, first:].tolist() == alone
        if patches.windows is not None:
            assert patches.windows[row, first:].tolist() == alone
        assert (patches.units[row, at:] == -1).all()
        assert not rope[row, at:].any()
    assert np.array_equal(positions(batch)[1], np.zeros(seq))


def test_text_alone_is_a_batch_of_the_same_shapes():
    rules = rules_of(**QWEN2, rope=True)
    random = np.random.default_rng(2)
    text = Tokens(np.arange(20, 30, dtype=np.int32))
    one = assemble([[text]], 400, 9, "positions", rules, 1000)
    other = assemble([made_pieces(random, rules, 2)], 400, 9, "positions", rules, 1000)
    assert one.rope is not None
    assert one.patches is not None
    assert one.rope[0, :10].tolist() == [[i] * 3 for i in range(10)]
    assert not one.patches.pixels.any()
    flat = [tree_leaves(batch) for batch in (one, other)]
    assert [(leaf.shape, leaf.dtype) for leaf in flat[0]] == [
        (leaf.shape, leaf.dtype) for leaf in flat[1]
    ]
    assert assemble([[text]], 400, 9, "positions").patches is None
    # an image's token within a plain text stands for nothing, and is not learnt either
    spelled = Tokens(np.array([20, IMAGE, 21], np.int32))
    assert assemble([[spelled]], 4, 9, "positions", rules, 4).weights.tolist() == [[0, 1, 0, 0]]
    no_rope = attrs.evolve(rules, rope=False)
    assert assemble([[text]], 400, 9, "positions", no_rope, 1000).rope is None

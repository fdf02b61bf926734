"""From planned rows to the tensors of a Batch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int32, Int64

from omnistep.core.batch import Batch, Patches
from omnistep.data.patches import ImageRules
from omnistep.data.transform import Tokens

Boundaries = Literal["positions", "cu_seqlens"]


def most_pieces(seq: int) -> int:
    """Pieces a packed row of `seq` tokens may hold, so that cu_seqlens has a static width."""
    return max(1, seq // 8)


def assemble(
    rows: Sequence[Sequence[Tokens]],
    seq: int,
    pad_id: int,
    boundaries: Boundaries,
    images: ImageRules | None = None,
    patches: int = 0,
) -> Batch:
    """Rows of pieces, one after another, filled up with `pad_id` to `seq` tokens.

    A token's target is the next token of its piece. Weight 1 where that target is to be learnt;
    0 on a piece's last token, on padding, where the target is 0, and where it stands for an image.
    Padding tokens are samples of one token by their positions (0 each); in cu_seqlens, [rows,
    most_pieces + 2], they are one sample. tokens and targets are int64, weights float32, positions
    int64. With `images` the batch has Patches, filled up to `patches` a row, and (where the model
    has three positions) rope; a piece without images counts alike in all three.
    """
    tokens = np.full((len(rows), seq), pad_id, np.int64)
    targets = np.zeros((len(rows), seq), np.int64)
    weights = np.zeros((len(rows), seq), np.float32)
    positions = np.zeros((len(rows), seq), np.int64)
    cu_seqlens = np.full((len(rows), most_pieces(seq) + 2), seq, np.int32)
    count = np.arange(seq)
    for row, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces):
            end = at + len(piece.ids)
            tokens[row, at:end] = piece.ids
            targets[row, at : end - 1] = piece.ids[1:]
            weights[row, at : end - 1] = 1 if piece.learn is None else piece.learn[1:]
            positions[row, at:end] = count[: end - at]
            if boundaries == "cu_seqlens":
                cu_seqlens[row, number] = at
            at = end
        cu_seqlens[row, len(pieces)] = at
    rope = None
    if images is not None:
        weights[np.isin(targets, images.tokens)] = 0
        rope = torch.from_numpy(_rope(rows, positions)) if images.rope else None
    by_positions = boundaries == "positions"
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions) if by_positions else None,
        cu_seqlens=None if by_positions else torch.from_numpy(cu_seqlens),
        rope=rope,
        patches=None if images is None else _patches(rows, seq, images, patches),
    )


def _rope(
    rows: Sequence[Sequence[Tokens]], positions: Int64[np.ndarray, "rows seq"]
) -> Int32[np.ndarray, "rows seq 3"]:
    rope = np.repeat(positions[:, :, None], 3, axis=2).astype(np.int32)
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            end = at + len(piece.ids)
            if piece.vision is not None and piece.vision.rope is not None:
                rope[row, at:end] = piece.vision.rope
            at = end
    return rope


def _patches(
    rows: Sequence[Sequence[Tokens]], seq: int, images: ImageRules, patches: int
) -> Patches:
    """What fills the budget up is a frame and a window of its own."""
    pixels = np.zeros((len(rows), patches, images.values), np.uint8)
    places = np.tile(np.array([0, 0, 1, 1], np.int32), (len(rows), patches, 1))
    alone = np.arange(patches, dtype=np.int32)[:, None] + np.array([0, 1], np.int32)
    frames = np.tile(alone, (len(rows), 1, 1))
    windows = None if images.window is None else frames.copy()
    units = np.full((len(rows), seq), -1, np.int32)
    for row, pieces in enumerate(rows):
        at = first = 0
        for piece in pieces:
            if (vision := piece.vision) is not None:
                last = first + piece.patches
                pixels[row, first:last] = vision.pixels
                places[row, first:last] = vision.places
                frames[row, first:last] = vision.frames + first
                if windows is not None and vision.windows is not None:
                    windows[row, first:last] = vision.windows + first
                own = vision.units
                units[row, at : at + len(own)] = np.where(own < 0, -1, own + first // images.unit)
                first = last
            at += len(piece.ids)
    return Patches(
        pixels=torch.from_numpy(pixels),
        places=torch.from_numpy(places),
        frames=torch.from_numpy(frames),
        windows=None if windows is None else torch.from_numpy(windows),
        units=torch.from_numpy(units),
    )

"""From planned rows to the tensors of a Batch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from omnistep.core.batch import Batch
from omnistep.data.transform import Tokens

Boundaries = Literal["positions", "cu_seqlens"]


def most_pieces(seq: int) -> int:
    """Pieces a packed row of `seq` tokens may hold, so that cu_seqlens has a static width."""
    return max(1, seq // 8)


def assemble(
    rows: Sequence[Sequence[Tokens]], seq: int, pad_id: int, boundaries: Boundaries
) -> Batch:
    """Rows of pieces, one after another, filled up with `pad_id` to `seq` tokens.

    A token's target is the next token of its piece. Weight 1 where that target is to be learnt;
    0 on a piece's last token and on padding, where the target is 0. Padding tokens are samples
    of one token by their positions (0 each); in cu_seqlens, [rows, most_pieces + 2], they are
    one sample. tokens and targets are int64, weights float32, positions int64.
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
    by_positions = boundaries == "positions"
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions) if by_positions else None,
        cu_seqlens=None if by_positions else torch.from_numpy(cu_seqlens),
    )

"""How many steps an epoch has."""

from fractions import Fraction
from math import ceil


def packed_steps(
    train_size: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    max_seq_len: int,
    dyn_bsz_margin: int = 0,
    bsz_warmup_ratio: float = 0.0,
) -> int:
    """ceil(train_size * (1 + bsz_warmup_ratio/2) / tokens_per_step), of `train_size` tokens.

    tokens_per_step = global_batch_size * max_seq_len * (1 - dyn_bsz_margin/T), with
    T = micro_batch_size * max_seq_len. Exact: the ratio is taken as the decimal it is written as.
    """
    row = micro_batch_size * max_seq_len
    if not 0 <= dyn_bsz_margin < row:
        raise ValueError(
            f"train.dyn_bsz_margin is {dyn_bsz_margin}; allowed is 0 to {row - 1}, less than a "
            f"row of train.micro_batch_size * data.max_seq_len = {row} tokens"
        )
    tokens = train_size * (1 + Fraction(str(bsz_warmup_ratio)) / 2)
    per_step = Fraction(global_batch_size * max_seq_len * (row - dyn_bsz_margin), row)
    return ceil(tokens / per_step)


def padded_steps(pieces: int, *, global_batch_size: int, drop_last: bool) -> int:
    """Full batches of `pieces` rows; with drop_last false also the partial one."""
    return pieces // global_batch_size if drop_last else -(-pieces // global_batch_size)

"""What a loader is told: plain values, checked together."""

from typing import Literal

from attrs import frozen

from omnistep.data.assemble import most_pieces
from omnistep.data.blocks import BlockRules
from omnistep.data.pack import PackLimits
from omnistep.data.patches import ImageRules


@frozen(kw_only=True)
class LoaderConfig:
    """Plain values; where a name is one of the arguments', so is its meaning."""

    max_seq_len: int
    micro_batch_size: int = 1
    accumulate: int = 1
    """micro-batches of a step"""
    rmpad: bool = False
    rmpad_with_pos_ids: bool = False
    dyn_bsz_margin: int = 0
    dyn_bsz_runtime: Literal["worker", "main"] = "worker"
    bsz_warmup_steps: int = 0
    """int(N * bsz_warmup_ratio)"""
    seed: int = 42
    drop_last: bool = True
    """Of padded batches. Packed rows go on over the end of an epoch: there is no last batch."""
    num_workers: int = 0
    prefetch_factor: int = 2
    """blocks in flight per worker"""
    pin_memory: bool = False
    """Has an effect where CUDA is available."""
    bad_records: Literal["stop", "skip"] = "stop"
    images: ImageRules | None = None
    """None: the model has no tower, and batches have no patches."""
    data_rank: int = 0
    data_ranks: int = 1

    def __attrs_post_init__(self) -> None:
        at_least_one = ("max_seq_len", "micro_batch_size", "accumulate", "prefetch_factor")
        for name in (*at_least_one, "data_ranks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.rmpad and self.rmpad_with_pos_ids:
            raise ValueError("train.rmpad and train.rmpad_with_pos_ids are both true; choose one")
        if not 0 <= self.dyn_bsz_margin < self.row_tokens:
            raise ValueError(
                f"train.dyn_bsz_margin is {self.dyn_bsz_margin}; allowed is 0 to "
                f"{self.row_tokens - 1}, less than a row"
            )
        if not self.packed and (self.dyn_bsz_margin or self.bsz_warmup_steps):
            raise ValueError(
                "train.dyn_bsz_margin and train.bsz_warmup_ratio shape packed rows; set "
                "train.rmpad_with_pos_ids or train.rmpad, or leave them at 0"
            )
        if not 0 <= self.data_rank < self.data_ranks:
            raise ValueError(f"data_rank {self.data_rank} is not one of {self.data_ranks} ranks")

    @property
    def packed(self) -> bool:
        return self.rmpad or self.rmpad_with_pos_ids

    @property
    def row_tokens(self) -> int:
        """T, the length of a row."""
        return self.max_seq_len * (self.micro_batch_size if self.packed else 1)

    @property
    def row_patches(self) -> int:
        """P, the patches a row has room for; 0: the model has no tower."""
        if self.images is None:
            return 0
        return self.images.max_patches * (self.micro_batch_size if self.packed else 1)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch."""
        return 1 if self.packed else self.micro_batch_size

    @property
    def rank_rows(self) -> int:
        """Rows of a step on one data rank."""
        return self.micro_rows * self.accumulate

    @property
    def limits(self) -> PackLimits:
        budget = self.row_tokens - self.dyn_bsz_margin
        most = most_pieces(self.row_tokens) if self.packed else 1
        return PackLimits(budget, most, self.row_patches)

    @property
    def rules(self) -> BlockRules:
        return BlockRules(
            limits=self.limits,
            packs=self.dyn_bsz_runtime == "worker",
            longest=self.longest_piece,
            skips=self.bad_records == "skip",
            images=self.images,
        )

    @property
    def longest_piece(self) -> int:
        return min(self.max_seq_len, self.limits.budget)

    def budget(self, step: int) -> int:
        """Tokens the packer may put into a row of step `step` (from 0): grows linearly to T -
        margin over the first bsz_warmup_steps. A row always takes at least one piece."""
        full = self.limits.budget
        if step >= self.bsz_warmup_steps:
            return full
        return -(-full * (step + 1) // self.bsz_warmup_steps)

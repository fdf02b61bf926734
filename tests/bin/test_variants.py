"""Settings that may not change the numbers, and settings that only have to work."""

import math

import pytest

from omnistep.bin import train
from omnistep.core.logs import read_metrics
from tests.bin.runs import PADDED, call, losses, settings, succeeded, words

SMOOTH = {"train_lr": 1e-3, "train_max_steps": 4}


@pytest.fixture
def run(files, tmp_path):
    """Losses by step of a run with these changes."""
    count = 0

    def run(**changes):
        nonlocal count
        count += 1
        output = tmp_path / str(count)
        succeeded(call(train.main, words(settings(files, output, **SMOOTH | changes))))
        return losses(output)

    return run


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "run"
    succeeded(call(train.main, words(settings(files, output, **SMOOTH))))
    return losses(output)


def close(expected):
    return pytest.approx(expected, rel=1e-5)


def test_accumulation_does_not_change_the_losses(run):
    padded = {**PADDED, "train_max_steps": 4, "train_global_batch_size": 4}
    whole, half, quarter = (run(**padded, train_micro_batch_size=n) for n in (4, 2, 1))
    assert len(whole) == 4
    assert whole[4] < whole[1]
    assert half == close(whole)
    assert quarter == close(whole)


def test_accumulated_packed_rows_are_each_a_share_of_the_step(run, packed):
    """Other rows, so other batches; but as many steps of as many tokens, learnt as well."""
    accumulated = run(train_micro_batch_size=1, train_global_batch_size=2)
    assert len(accumulated) == len(packed)
    assert accumulated[4] == pytest.approx(packed[4], rel=0.05)


def test_both_ways_to_pack_are_the_same(run, packed):
    assert run(train_rmpad=True, train_rmpad_with_pos_ids=False) == close(packed)


def test_padded_and_packed_start_at_the_same_loss(run, packed):
    assert run(**PADDED)[1] == pytest.approx(packed[1], rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_data_parallel_mode": "fsdp1"},
        {"train_data_parallel_mode": "fsdp2"},
        {"train_data_parallel_mode": "fsdp2", "train_enable_full_shard": False},
        {"train_use_doptim": True},
        {"train_init_device": "cpu"},
        {"train_init_device": "meta"},
        {"data_num_workers": 1, "data_prefetch_factor": 1},
        {"train_dyn_bsz_runtime": "main"},
        {"train_enable_full_determinism": True},
        {"train_empty_cache_steps": 1},
        {"data_pin_memory": False},
        {"train_save_steps": 1, "train_keep_checkpoints": 1},
        {"train_compute_dtype": "float32"},
    ],
    ids=str,
)
def test_these_change_no_bit(changes, run, packed):
    assert run(**changes) == packed


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_change_the_losses(checkpointing, reentrant, run, packed):
    found = run(train_enable_gradient_checkpointing=checkpointing, train_enable_reentrant=reentrant)
    assert found == close(packed)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"train_compute_dtype": "bfloat16"}, 2e-2),
        ({"train_enable_mixed_precision": False, "train_compute_dtype": "bfloat16"}, 2e-2),
        ({"train_enable_mixed_precision": False}, 0),
        ({"train_optimizer": "anyprecision_adamw", "train_compute_dtype": "bfloat16"}, 2e-2),
        ({"train_optimizer": "anyprecision_adamw", "train_compute_dtype": "float32"}, 2e-2),
    ],
    ids=str,
)
def test_precisions(changes, tolerance, run, packed):
    assert run(**changes, train_max_steps=2, train_save_hf_weights=True) == pytest.approx(
        {step: packed[step] for step in (1, 2)}, rel=tolerance
    )


def test_double_precision_from_the_same_weights(run, trained):
    whole = {"train_enable_mixed_precision": False, "train_compute_dtype": "float64"}
    single = run(model_model_path=trained / "hf")
    double = run(model_model_path=trained / "hf", **whole)
    assert double == close(single)
    assert double != single


def rates(files, output, **changes):
    chosen = settings(files, output, data_train_size=8 * 64, train_lr_min=1e-3, **changes)
    succeeded(call(train.main, words(chosen)))
    return [row["lr"] for row in read_metrics(output / "metrics.jsonl") if "lr" in row]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", [0, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-3, 1e-3]),
        ("linear", [0, 5e-3, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3, 1e-3]),
        (
            "cosine",
            [0, 5e-3]
            + [1e-3 + 9e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
            + [1e-3],
        ),
    ],
)
def test_every_path_of_the_learning_rate(style, expected, files, tmp_path):
    """8 steps: 2 of warm-up, the decay ends with the 6th."""
    found = rates(
        files,
        tmp_path / "run",
        train_lr_decay_style=style,
        train_lr_warmup_ratio=0.25,
        train_lr_decay_ratio=0.75,
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_max_steps_caps_each_epoch(run):
    assert len(run(train_max_steps=2, train_num_train_epochs=3)) == 6


def test_epochs_of_padded_data(files, tmp_path):
    """5 sequences, 2 a step: the fifth is dropped, or a step of its own beside padding."""
    weights = {}
    for drop in (True, False):
        output = tmp_path / str(drop)
        chosen = settings(
            files,
            output,
            train_rmpad_with_pos_ids=False,
            data_train_path=files.short,
            data_drop_last=drop,
            train_num_train_epochs=2,
        )
        result = succeeded(call(train.main, words(chosen)))
        rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
        weights[drop] = [row["weight"] for row in rows]
        assert f"2 epoch(s) of {2 if drop else 3}" in result.out
    assert len(weights[True]) == 4
    assert len(weights[False]) == 6
    first, second = sum(weights[False][:3]), sum(weights[False][3:])
    assert first == second > sum(weights[True][:2])


def test_the_packer_leaves_the_margin_and_warms_up(files, tmp_path):
    output = tmp_path / "run"
    chosen = settings(
        files,
        output,
        data_train_size=6 * 64,
        train_dyn_bsz_margin=16,
        train_bsz_warmup_ratio=0.5,
    )
    succeeded(call(train.main, words(chosen)))
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 10  # ceil(384 * 1.25 / 48)
    weights = [row["weight"] for row in rows]
    assert weights[0] < weights[-1] <= 48
    assert max(weights[:2]) <= 48 * 2 / 5 + 32


def test_weight_decay_and_clipping_are_applied(run, packed):
    decayed, clipped = run(train_weight_decay=10.0), run(train_max_grad_norm=1e-9)
    assert decayed[1] == clipped[1] == packed[1]
    assert decayed[4] != packed[4]
    assert abs(clipped[4] - clipped[1]) < abs(packed[4] - packed[1]) or clipped[4] != packed[4]
    assert run(train_max_grad_norm=0)[1] == packed[1]


def test_another_seed_is_another_run(run, packed):
    assert run(train_seed=7)[1] != packed[1]

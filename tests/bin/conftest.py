"""One tiny model and text, and one trained run, for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omnistep.bin import train
from tests.bin.runs import Files, call, make_files, settings, succeeded, words


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the started processes have: sums are split by thread, and runs are compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _back_to_undetermined() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="package")
def trained(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a finished run of 6 steps, with an export. Tests leave it as it is."""
    output = tmp_path_factory.mktemp("trained") / "run"
    chosen = settings(
        files,
        output,
        data_eval_path=files.held_out,
        train_eval_steps=2,
        train_save_steps=2,
        train_save_epochs=1,
        train_num_train_epochs=2,
        data_train_size=3 * 64,
        train_keep_checkpoints=2,
        train_save_hf_weights=True,
    )
    succeeded(call(train.main, words(chosen)))
    return output

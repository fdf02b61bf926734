"""Compiled code lies where nobody else can write; without a home it lies somewhere."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from omnistep.core import cache
from omnistep.models import attention_cpu


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    for name in (cache.VARIABLE, cache.INDUCTOR, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_places(monkeypatch, tmp_path):
    assert cache.private_directory("kernels") == tmp_path / "home/.cache/omnistep/kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.private_directory("kernels") == tmp_path / "xdg/omnistep/kernels"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "mine"))
    assert cache.private_directory("kernels") == tmp_path / "mine/kernels"
    assert (tmp_path / "mine/kernels").stat().st_mode & 0o777 == 0o700


def test_the_default_of_torch_is_nobodys_choice(monkeypatch, tmp_path):
    for value in (None, f"{tmp_path}/tmp/torchinductor_me"):
        if value:
            monkeypatch.setenv(cache.INDUCTOR, value)
        cache.keep_compiled_code_private()
        assert os.environ[cache.INDUCTOR] == f"{tmp_path}/home/.cache/omnistep/inductor"
    monkeypatch.setenv(cache.INDUCTOR, "/chosen")
    cache.keep_compiled_code_private()
    assert os.environ[cache.INDUCTOR] == "/chosen"


@pytest.mark.parametrize("how", ["writable", "foreign"])
def test_a_directory_that_others_can_write_is_refused(how, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "mine"))
    place = cache.private_directory("kernels")
    if how == "writable":
        place.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
        if place.stat().st_uid == 0:  # what root owns is trusted
            os.chown(place, 12345, -1)
            monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match=r"can be written by others|belongs to another user"):
        cache.private_directory("kernels")


def test_a_kernel_that_others_can_write_is_not_loaded(monkeypatch, tmp_path):
    built = tmp_path / "built.so"
    built.touch()

    def compiled(command, **_):
        Path(command[-1]).touch()

    monkeypatch.setattr(subprocess, "run", compiled)
    library = attention_cpu.compile_kernel("/bin/sh")
    assert library.parent == tmp_path / "home/.cache/omnistep/kernels"
    assert attention_cpu.compile_kernel("/bin/sh") == library
    library.chmod(0o666)
    with pytest.raises(PermissionError, match=r"attention_cpu_.*so can be written by others"):
        attention_cpu.compile_kernel("/bin/sh")


def test_without_a_home(monkeypatch, tmp_path):
    """As `docker --user 12345` has it: no HOME, no line in passwd."""
    monkeypatch.setattr(Path, "home", raises_no_home)
    place = cache.private_directory("kernels")
    assert place == tmp_path / f"tmp/omnistep-{os.geteuid()}/kernels"
    assert cache.private_directory("kernels") == place
    place.parent.chmod(0o777)  # or made by another user
    other = cache.private_directory("kernels")
    assert other.parent.parent == tmp_path / "tmp"
    assert other != place


def raises_no_home():
    raise RuntimeError("Could not determine home directory.")

"""Which rank of which job this process is; how it joins the other ranks, and how it fails.

A job's ranks are started by `--nproc` (spawn.py), by torchrun, or by srun. Each finds the others
through a store of keys at one address: in the process that started the ranks, or in rank 0.
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from attrs import frozen

from omnistep.bin.heartbeat import LOST_PEER, Heartbeat
from omnistep.core.config_errors import ConfigError
from omnistep.core.screen import show
from omnistep.parallel.mesh import destroy_groups, forget_groups

NPROC = "--nproc"
LAUNCHER = "OMNISTEP_LAUNCHER"
"""The environment's name for the process id of the `spawn` that started this rank."""

FAILURE = "omnistep/failure"
"""The store's key for `rank\\ntext` of the first rank that failed by itself."""

LOST = "omnistep/lost"
"""The same of the first rank that failed because it missed another one."""

HEAD_START = 1.0
"""Seconds that a failed rank leaves to rank 0, which mostly fails in the same way, to say why."""


class LaunchError(Exception):
    """This rank cannot join the others; str() says what to do."""


@frozen
class Launch:
    """This process among the ranks of its job; by default it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its machine."""
    host: str = "127.0.0.1"
    port: int = 0
    """Where the store is."""
    by: Literal["nobody", "--nproc", "torchrun", "srun"] = "nobody"
    launcher: int = 0
    """Process id of the `spawn` that it must not outlive."""


# ---- who am I ------------------------------------------------------------------------------


def read_launch(environ: Mapping[str, str]) -> Launch:
    """What the environment says of this process. Raises ConfigError where a value is missing or
    no number.

    torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. srun: what belongs to the
    step. The script that sbatch runs, and a shell of salloc, see the whole job's SLURM_NTASKS
    and a SLURM_PROCID of 0 too, but are no task of a step.
    """
    if {"RANK", "WORLD_SIZE"} <= environ.keys():
        return _torchrun(environ)
    if {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environ.keys():
        return _srun(environ)
    return Launch()


def take_nproc(argv: Sequence[str], launch: Launch) -> tuple[list[str], int]:
    """The words without `--nproc N` or `--nproc=N`, and N; the last one wins, without one it is 1.

    Raises ConfigError where N is not a number from 1 on, or this is one of several ranks already.
    """
    rest, text, words = [], None, list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != NPROC:
            rest.append(word)
        elif equals:
            text = value
        else:
            text = words.pop(0) if words and not words[0].startswith("-") else ""
    if text is None:
        return rest, 1
    given = f"{NPROC} = {text}" if text else NPROC
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([f"{given}: expected how many ranks to start, as in {NPROC} 2"])
    if launch.world_size > 1:
        started = f"{launch.world_size} ranks were started by {launch.by} already"
        raise ConfigError([f"{given}: {started}; leave {NPROC} out"])
    return rest, int(text)


def _torchrun(environ: Mapping[str, str]) -> Launch:
    if (size := _integer(environ, "WORLD_SIZE")) == 1:
        return Launch()
    launcher = _integer(environ, LAUNCHER, 0)
    return Launch(
        _integer(environ, "RANK"),
        size,
        _integer(environ, "LOCAL_RANK"),
        _value(environ, "MASTER_ADDR"),
        _integer(environ, "MASTER_PORT"),
        "--nproc" if launcher else "torchrun",
        launcher,
    )


def _srun(environ: Mapping[str, str]) -> Launch:
    if (size := _integer(environ, "SLURM_STEP_NUM_TASKS")) == 1:
        return Launch()
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST") or _value(environ, "SLURM_JOB_NODELIST")
    return Launch(
        _integer(environ, "SLURM_PROCID"),
        size,
        _integer(environ, "SLURM_LOCALID"),
        environ.get("MASTER_ADDR") or first_host(nodes),
        _integer(environ, "MASTER_PORT", slurm_port(job, step)),
        "srun",
    )


def first_host(nodes: str) -> str:
    """The first of SLURM's hosts: `a[07-09,12],b` is a07, `rack[1-2]n[3,5]` is rack1n3."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def slurm_port(job: int, step: int) -> int:
    """The same port on all ranks, mostly another one for each step that shares the host; below
    32768, where Linux begins to hand out ports by itself."""
    return 12_000 + (16 * job + step) % 20_000


def _value(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise ConfigError([f"the environment has RANK or SLURM_PROCID, but no {name}"])
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    if not (text := _value(environ, name)).isdecimal():
        raise ConfigError([f"{name} = {text} (environment): expected a whole number"])
    return int(text)


# ---- joining and leaving -------------------------------------------------------------------


COLLECTIVE = timedelta(minutes=30)
"""What a collective waits at most: ranks that compile may be minutes apart."""


def join(launch: Launch, device_kind: Literal["cpu", "cuda"], rank_timeout: float = 120.0) -> None:
    """Makes this process one of the ranks of torch.distributed; nothing where it is the only one.

    Ranks talk by gloo between CPU tensors, by nccl between those of a GPU; each takes the GPU of
    its local rank. `rank_timeout`: seconds that the others have to come, and then a rank without a
    sign of life to live. Raises LaunchError where they do not all come.
    """
    if launch.world_size == 1:
        return
    if launch.launcher:
        _end_with(launch.launcher)
    backend, device = "gloo", None
    if device_kind == "cuda":
        device = torch.device("cuda", pick_gpu(launch, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store = meet(launch, rank_timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("torch", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE,
        device_id=device,
    )
    Heartbeat(
        lambda timeout: _of_this_attempt(_connect(launch, timeout)),
        launch.rank,
        launch.world_size,
        rank_timeout,
        told=lambda line: _tell_launcher(launch, line),
    ).start()


def meet(launch: Launch, patience: float) -> dist.Store:
    """Waits until all ranks of this attempt have come to the store, and returns it.

    After a restart (torchrun --max-restarts) a rank may reach the store of the attempt before,
    which goes away in a moment: then it comes again. Raises LaunchError that names the ranks that
    did not come, or the store's address.
    """
    deadline, serves = time.monotonic() + patience, launch.rank == 0 and not _agent_has_store()
    while True:
        left = max(deadline - time.monotonic(), 1.0)
        try:
            base = _connect(launch, timedelta(seconds=left), serves=serves)
        except dist.DistError as error:
            in_use = "EADDRINUSE" in str(error) or "in use" in str(error)
            if in_use and time.monotonic() < min(deadline, deadline - patience + 10):
                time.sleep(0.5)  # by the attempt before
                continue
            reason = "it is in use" if in_use else lost_peer(error)
            raise LaunchError(
                f"the ranks meet at {launch.host}:{launch.port}, which does not work: {reason}. "
                "MASTER_ADDR and MASTER_PORT set another place"
            ) from None
        store = _of_this_attempt(base)
        try:
            store.set(f"here/{launch.rank}", "")
            store.add("here", 1)
            while store.add("here", 0) < launch.world_size:
                if time.monotonic() > deadline:
                    raise LaunchError(_missing(store, launch, patience))
                time.sleep(0.05)
            return store
        except dist.DistError as error:
            if serves or time.monotonic() > deadline:
                raise LaunchError(f"rank 0 is gone: {lost_peer(error)}") from None


def _missing(store: dist.Store, launch: Launch, patience: float) -> str:
    ranks = range(launch.world_size)
    missing = [str(rank) for rank in ranks if not store.check([f"here/{rank}"])]
    who = ", ".join(missing[:20]) + (", …" if len(missing) > 20 else "")
    return (
        f"of {launch.world_size} ranks {len(missing)} did not come within {patience:.0f} s "
        f"(train.rank_timeout): {who}"
    )


def _connect(launch: Launch, timeout: timedelta, *, serves: bool = False) -> dist.Store:
    return dist.TCPStore(
        launch.host,
        launch.port,
        is_master=serves,
        wait_for_workers=False,
        timeout=timeout,
    )


def _agent_has_store() -> bool:
    """torchrun's agent, or our own launcher, serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """Where the store outlives ranks, those that are started again must not find what the first
    ones wrote."""
    return dist.PrefixStore(f"omnistep/{_attempt()}", store)


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _tell_launcher(launch: Launch, line: str) -> None:
    """So that `spawn` prints what a rank says whose standard error it keeps."""
    with suppress(dist.DistError):
        _connect(launch, timedelta(seconds=2)).set(_key(FAILURE), f"{launch.rank}\n{line}")


def _key(name: str) -> str:
    return name if _attempt() == "0" else f"{name}/{_attempt()}"


def leave(code: int) -> int:
    """Ends together with the other ranks: one that went early would take the store with it, or
    have torchrun end those that are still saving. Returns the exit code where there is one rank.

    Of several, none comes back: a thread of gloo that lets go of a tensor while the interpreter
    is being taken down aborts the process (seen in torch 2.13), so that is not done.
    """
    if not dist.is_initialized():
        return code
    dist.all_reduce(torch.zeros(1))
    destroy_groups()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pick_gpu(launch: Launch, count: int) -> int:
    """Which of the `count` GPUs that this process sees is its own.

    srun may show each task its one GPU only; then that is the one. Raises LaunchError where there
    are more ranks than GPUs.
    """
    if launch.local_rank < count:
        return launch.local_rank
    if launch.by == "srun" and count == 1:
        return 0
    raise LaunchError(
        f"there is no GPU for local rank {launch.local_rank} (from 0): it sees {count}. Start at "
        f"most {count} ranks on a machine, or set train.init_device: cpu"
    )


def _end_with(launcher: int) -> None:
    """Has the system kill this process when its launcher is killed and cannot do it any more."""
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyright: ignore
    if os.getppid() != launcher:  # killed before we asked
        os._exit(1)


# ---- failing -------------------------------------------------------------------------------


def fail(launch: Launch, error: Exception, *, expected: bool) -> int:
    """Prints why this rank fails, unless another one has said why the job does; the exit code.

    An expected error is one line, others are a traceback. Ranks mostly fail for one reason:
    all meet the same error, or one meets it and the others then miss that one. So the first one
    to fail speaks, and that is rank 0 where it fails within a second as the others do.
    """
    who = f"rank {launch.rank}: " if launch.rank else ""
    code, key = (2 if isinstance(error, ConfigError) else 1), FAILURE
    if lost := lost_peer(error):
        code, key = LOST_PEER, LOST
        text = f"error: {who}another rank is lost: {lost}"
    elif expected:
        text = f"error: {who}{error}"
    else:
        trace = "".join(traceback.format_exception(error)).rstrip()
        text = f"error: rank {launch.rank}:\n{trace}"
    if _speaks(launch, error, key, text):
        show(text, sys.stderr)
    forget_groups()
    return code


def lost_peer(error: Exception) -> str:
    """What an error says of a connection, if that is all it says: another rank, or the network
    to it, has gone."""
    # gloo raises a bare RuntimeError: [/path/gloo/transport/tcp/pair.cc:553] Connection closed ...
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    if not is_gloo and not isinstance(error, dist.DistError):
        return ""
    return re.split(r"\.\s|\n", re.sub(r"^\[\S*\] ", "", str(error)))[0] or type(error).__name__


def _speaks(launch: Launch, error: Exception, key: str, text: str) -> bool:
    if launch.world_size == 1:
        return True
    if not dist.is_initialized():
        # the ranks of a machine read the same command line and files
        return launch.local_rank == 0 or not isinstance(error, ConfigError)
    if launch.rank:
        time.sleep(HEAD_START)
    mine = f"{launch.rank}\n{text}"
    try:
        # asked first: to a store that has gone, torch's client logs pages before it raises
        socket.create_connection((launch.host, launch.port), 2).close()
        store = dist.TCPStore(
            launch.host, launch.port, is_master=False, timeout=timedelta(seconds=2)
        )
        is_first = store.compare_set(_key(key), "", mine).decode() == mine
        return is_first and (key == FAILURE or not store.check([_key(FAILURE)]))
    except (OSError, dist.DistError):
        return False  # it was rank 0's, which has gone, and has said why

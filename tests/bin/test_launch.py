"""Many ranks: who started them, how they are started here, and how they end together."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnistep.bin import train
from omnistep.bin.heartbeat import LOST_PEER, Heartbeat
from omnistep.bin.launch import (
    Launch,
    LaunchError,
    first_host,
    lost_peer,
    meet,
    pick_gpu,
    read_launch,
    slurm_port,
    take_nproc,
)
from omnistep.bin.spawn import (
    GRACE,
    Verdict,
    _serve_store,
    blame,
    codes_of_failed,
    rank_environment,
    spawn,
)
from omnistep.bin.stop import ASKED, AT_ONCE, INTERRUPTED, RESUME_ME
from omnistep.core.config_errors import ConfigError
from tests.bin.runs import call, settings, wait_until, words
from tests.forkserver.client import ENVIRONMENT, ROOT, ForkServer, Job, Result

# ---- who am I ------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "node[06-09]",
}
BATCH = {name: text for name, text in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(5, 8, 1, "node7", 29500, "torchrun")),
        (TORCHRUN | SRUN, Launch(5, 8, 1, "node7", 29500, "torchrun")),
        (TORCHRUN | {"OMNISTEP_LAUNCHER": "77"}, Launch(5, 8, 1, "node7", 29500, "--nproc", 77)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch()),
        ({"RANK": "3"}, Launch()),
        (SRUN, Launch(5, 8, 1, "node06", slurm_port(4711, 2), "srun")),
        (SRUN | {"SLURM_STEP_NODELIST": "node08"}, Launch(5, 8, 1, "node08", 27_378, "srun")),
        (SRUN | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}, Launch(5, 8, 1, "h", 9, "srun")),
        (BATCH, Launch()),  # the script of sbatch --ntasks 8
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch()),  # a shell of salloc
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "4711"}, Launch()),
    ],
)
def test_who_started_this_process(environ, expected):
    assert read_launch(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN | {"MASTER_PORT": ""}, "no MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no LOCAL_RANK"),
        (TORCHRUN | {"RANK": "two"}, r"RANK = two \(environment\): expected a whole number"),
        (SRUN | {"SLURM_JOB_NODELIST": ""}, "no SLURM_JOB_NODELIST"),
    ],
)
def test_an_environment_that_does_not_say_it_all(environ, expected):
    with pytest.raises(ConfigError, match=expected):
        read_launch(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login-1.cluster", "login-1.cluster"),
        ("a7,a9", "a7"),
        ("node[007-012,3]", "node007"),
        ("node[3,5],gpu1", "node3"),
        ("gpu1,node[3,5]", "gpu1"),
        ("rack[1-2]n[04,5]-ib,x", "rack1n04-ib"),
    ],
)
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_port_for_each_step():
    ports = {slurm_port(job, step) for job in range(10**7, 10**7 + 50) for step in range(4)}
    assert len(ports) == 200
    assert all(1024 < port < 32_768 for port in [*ports, slurm_port(2**31, 2**32 - 6)])


@pytest.mark.parametrize(
    ("argv", "rest", "nproc"),
    [
        ("r.yaml --train.lr 1", "r.yaml --train.lr 1", 1),
        ("--nproc 2 r.yaml", "r.yaml", 2),
        ("r.yaml --nproc 4 --train.lr 1", "r.yaml --train.lr 1", 4),
        ("r.yaml --nproc=3", "r.yaml", 3),
        ("--nproc=3 r.yaml --nproc 1", "r.yaml", 1),
    ],
)
def test_nproc_anywhere(argv, rest, nproc):
    assert take_nproc(argv.split(), Launch()) == (rest.split(), nproc)


@pytest.mark.parametrize("argv", ["--nproc", "--nproc=", "--nproc --train.lr 1"])
def test_nproc_without_a_number(argv):
    with pytest.raises(ConfigError, match=r"^--nproc: expected how many ranks"):
        take_nproc(argv.split(), Launch())


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "r.yaml"])
def test_nproc_that_is_no_number(text):
    with pytest.raises(ConfigError, match=rf"^--nproc = {text}: expected how many ranks"):
        take_nproc([f"--nproc={text}"], Launch())


def test_nproc_in_a_job_of_ranks():
    launch = read_launch(TORCHRUN)
    assert take_nproc(["r.yaml"], launch) == (["r.yaml"], 1)
    with pytest.raises(ConfigError, match="8 ranks were started by torchrun already; leave"):
        take_nproc(["--nproc=2"], launch)


def test_the_gpu_of_a_rank():
    assert pick_gpu(Launch(5, 8, 1), 4) == 1
    assert pick_gpu(Launch(5, 8, 3, by="srun"), 1) == 0
    with pytest.raises(LaunchError, match=r"no GPU for local rank 3.*at most 1 ranks.*init_device"):
        pick_gpu(Launch(5, 8, 3, by="torchrun"), 1)


def test_what_tells_of_another_rank():
    closed = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1. This is"
    assert lost_peer(RuntimeError(closed)) == "Connection closed by peer [::1]:1"
    assert not lost_peer(RuntimeError("shapes differ"))
    assert not lost_peer(ValueError(closed))


# ---- verdicts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "said", "expected"),
    [
        ({0: 2}, "0\nerror: x", Verdict(2, ())),
        ({0: LOST_PEER, 2: 1}, "2\nTraceback", Verdict(1, ("Traceback",))),
        ({0: LOST_PEER}, "2\nTraceback", Verdict(1, ("Traceback",))),
        ({0: LOST_PEER, 1: -9}, None, (137, "rank 1 was killed by SIGKILL")),
        ({0: LOST_PEER, 1: -64}, None, (192, "rank 1 was killed by SIGRTMAX")),
        ({0: LOST_PEER, 1: 7}, None, (7, "rank 1 ended with exit code 7")),
        ({0: LOST_PEER, 1: LOST_PEER}, None, (LOST_PEER, "rank 0 ended with exit code 69")),
    ],
)
def test_whose_fault_it_is(codes, said, expected):
    verdict = blame(codes, said, {1: "last words"})
    if isinstance(expected, tuple):
        code, text = expected
        words = ("last words",) if "rank 1" in text else ()
        expected = Verdict(code, (*words, f"error: {text}, so the others were ended"))
    assert verdict == expected


@pytest.mark.parametrize(
    ("codes", "failed", "said", "expected"),
    [
        ([-9, LOST_PEER, LOST_PEER], [1], "2\nrank 0 is silent", {1: LOST_PEER, 2: LOST_PEER}),
        ([LOST_PEER, -15, 1], [0], "2\nTraceback", {0: LOST_PEER, 2: 1}),
        ([LOST_PEER, -15, -15], [0], "2\nTraceback", {0: LOST_PEER}),
        ([-9, 0], [0], None, {0: -9}),
        ([-9, 3], [0], "7\nno rank of ours", {0: -9}),
    ],
)
def test_who_said_why_may_end_after_others(codes, failed, said, expected):
    """As where a rank is stopped: one of the others tells of it, and all see that it was told."""
    assert codes_of_failed(codes, failed, said) == expected
    silent = expected.get(2) == LOST_PEER
    assert (blame(expected, said, {}).code == LOST_PEER) == silent


def test_the_environment_of_a_rank():
    environ = rank_environment({"HOME": "/h", "RANK": "9"}, 1, 10_000, 123)
    assert read_launch(environ) == Launch(1, 10_000, 1, "127.0.0.1", 123, "--nproc", os.getpid())
    assert environ["OMP_NUM_THREADS"] == "1"
    assert environ["HOME"] == "/h"
    own = rank_environment({"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "ib0"}, 0, 2, 123)
    assert (own["OMP_NUM_THREADS"], own["GLOO_SOCKET_IFNAME"]) == ("7", "ib0")


# ---- real ranks ----------------------------------------------------------------------------

RANK = [sys.executable, "-m", "tests.bin.rank"]


@pytest.fixture
def launch(plain_server: ForkServer, tmp_path: Path) -> Callable[..., Job]:
    """Starts `case`, in which one of two ranks is chosen. Each rank that has joined puts a file
    into tmp_path, named by its process id."""

    def start(case: str, chosen: int = 0, grace: float = GRACE, timeout: float = 120) -> Job:
        argv, ready = [case, chosen, grace], {"READY": str(tmp_path), "RANK_TIMEOUT": str(timeout)}
        return plain_server.start("tests.bin.rank:launch", argv, ranks=2, environ=ready)

    return start


def started(ready: Path, nproc: int) -> bool:
    return len(list(ready.iterdir())) == nproc


def test_ranks_add_up(capfd, monkeypatch):
    """As processes that import everything themselves."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert spawn([*RANK, "sum"], 2) == 0
    out, err = capfd.readouterr()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out.splitlines() == ["rank 0 of 2", "3", f"{threads} threads"]
    assert err == ""


def failed(result: Result, code: int) -> str:
    """What it said, without what rank 0 says when it is ended before it misses the one that failed
    by itself."""
    assert result.code == code
    return result.err.removeprefix(ASKED.decode())


def test_one_rank_fails_and_the_others_wait_for_it(launch):
    err = failed(launch("raise", 1).wait(), 1)
    assert err.startswith("error: rank 1:\nTraceback (most recent call last):\n")
    assert err.endswith("ValueError: boom\n")
    assert err.count("Traceback") == err.count("error: ") == 1


def test_one_rank_meets_an_expected_error(launch):
    err = failed(launch("expected", 1).wait(), 2)
    assert err == "error: rank 1: what one rank sees\n"


def test_all_ranks_meet_the_same_error(launch):
    result = launch("all fail").wait()
    assert (result.code, result.err) == (2, "error: what all ranks see\n")


@pytest.mark.parametrize(
    ("case", "code", "last"),
    [
        ("kill", 137, "error: rank 1 was killed by SIGKILL, so the others were ended\n"),
        ("exit", 7, "the last words\nerror: rank 1 ended with exit code 7, so the others were"),
    ],
)
def test_a_rank_goes_without_a_word(case, code, last, launch):
    err = failed(launch(case, 1).wait(), code)
    assert last in err
    assert "Traceback" not in err
    assert err.count("\n") <= 3


def test_a_rank_that_does_not_end_is_killed(launch):
    result = launch("stuck", 1, grace=0.5).wait()  # until no process is left
    assert result.code == 1
    assert result.err.count("Traceback") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_all_ranks_stop_at_the_same_step(number, launch, tmp_path):
    job = launch("stop")
    wait_until(lambda: started(tmp_path, 2))
    job.kill(number)
    result = job.wait()
    assert result.code == RESUME_ME
    assert result.out.splitlines() == ["rank 0 of 2", "the same step"]
    assert result.err == ASKED.decode()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named(rank, launch):
    err = failed(launch("stopped", rank, timeout=2).wait(), LOST_PEER)
    (line,) = err.splitlines()
    assert line.startswith(f"error: rank {rank} has given no sign of life for 2 s (train.rank_time")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_when_others_have_ended_is_named(rank, launch):
    """No heart beats any more; the launcher sees it."""
    err = failed(launch("stopped at the end", rank, timeout=2).wait(), LOST_PEER)
    assert err.startswith(f"error: rank {rank} has given no sign of life for 2 s (train.rank_time")


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    me = Launch(0, 3, 0, "127.0.0.1", port, "srun")
    with pytest.raises(LaunchError, match=r"of 3 ranks 2 did not come within 1 s .*: 1, 2$"):
        meet(me, 1)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        me = Launch(0, 2, 0, "127.0.0.1", port, "srun")
        with pytest.raises(LaunchError, match=rf"meet at 127.0.0.1:{port}, .*: it is in use"):
            meet(me, 1)


def test_the_launchers_store_is_for_this_machine_alone():
    store = _serve_store()
    listening = [
        line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()
        if line.split()[1].endswith(f":{store.port:04X}") and line.split()[3] == "0A"
    ]
    assert listening == [f"0100007F:{store.port:04X}"]


@pytest.mark.parametrize("how", ["--standalone", "static"])
def test_torchrun_starts_ranks_again(how, tmp_path):
    """After a rank was killed; the new ones must not meet what the first ones left in the store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--standalone"] if how == "--standalone" else ["--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.bin.rank", "restart", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 1 of 2") == 2  # it says so before it is killed


class Beats(dict):
    """A store of this process; the clock stands still."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]

    def set(self, key, value):
        self[key] = value

    def compare_set(self, key, expected, value):
        return self.setdefault(key, value).encode()


def test_who_is_silent():
    store, told = Beats(), []

    def connect(_: object) -> Any:
        return store

    first, second = (Heartbeat(connect, rank, 3, 8.0, told.append) for rank in (0, 1))
    assert first.look(0) is None
    assert second.look(0) is None
    for now in (4, 8, 12):
        store["beat/2"] = str(now) if now < 8 else "4"
        assert second.look(now) is None
        assert (first.look(now) is None) == (now < 13)
    line = first.look(12.1)
    assert line is not None
    assert line.startswith("error: rank 2 has given no sign of life for 8 s")
    assert told == [line]
    ended = []
    second.end = ended.append
    assert second.look(12.2) is None
    assert ended == [LOST_PEER]


def test_interrupted_twice_they_end_at_once(launch, tmp_path):
    job = launch("stuck", 7)
    wait_until(lambda: started(tmp_path, 2))
    job.kill(signal.SIGINT)
    wait_until(lambda: job.stderr.read_bytes() == ASKED)
    job.kill(signal.SIGINT)
    result = job.wait()
    assert (result.code, result.err) == (INTERRUPTED, (ASKED + AT_ONCE).decode())


def test_ranks_do_not_outlive_their_launcher(launch, tmp_path):
    job = launch("stuck", 7)
    wait_until(lambda: started(tmp_path, 2))
    job.kill(signal.SIGKILL)
    assert job.wait(20).code == -signal.SIGKILL  # None, if a process of it had to be killed


def test_one_process_interrupted_twice_ends_at_once():
    script = (
        "import os, signal\n"
        "from omnistep.bin.stop import Stop\n"
        "from omnistep.parallel.mesh import Group\n"
        "with Stop() as stop:\n"
        "    assert not stop.agreed(Group())\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.agreed(Group())\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still there')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, b"", ASKED + AT_ONCE)


# ---- the command ---------------------------------------------------------------------------

FIRST = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "argv", "expected"),
    [
        ({}, ["--nproc=0"], "error: --nproc = 0: expected how many ranks"),
        (FIRST, ["--nproc", "2"], "error: --nproc = 2: 8 ranks were started by torchrun"),
        (FIRST | {"LOCAL_RANK": ""}, [], "error: the environment has RANK"),
        ({}, ["--nproc=2", "--train.tensor_parallel_size=4"], "error: train.tensor_parallel_size"),
    ],
)
def test_what_is_wrong_with_a_launch(environ, argv, expected, files, tmp_path, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = call(train.main, [*argv, *words(settings(files, tmp_path / "run"))])
    assert result.code == 2
    assert result.err.startswith(expected)
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_the_first_rank_of_a_machine_tells_of_the_configuration(tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    result = call(train.main, [str(tmp_path / "missing.yaml")])
    assert (result.code, result.err) == (2, "")

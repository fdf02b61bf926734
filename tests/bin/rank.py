"""One rank of a job that test_launch.py starts: `python -m tests.bin.rank <case> [rank]`. It joins
and leaves as bin/train does, and does nothing in between but what the case asks for. `launch` is
the job's launcher."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import omnistep.bin.launch
from omnistep.bin.launch import LaunchError, fail, join, leave, read_launch
from omnistep.bin.spawn import spawn
from omnistep.bin.stop import RESUME_ME, Stop
from omnistep.core.config_errors import ConfigError
from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.mesh import Mesh, make_mesh

RANK_TIMEOUT = float(os.environ.get("RANK_TIMEOUT", "120"))


def launch(argv: list[str]) -> int:
    """`[CASE, RANK, GRACE, --nproc, N]`."""
    case, chosen, grace, _, nproc = argv
    command = [sys.executable, "-m", "tests.bin.rank", case, chosen]
    return spawn(command, int(nproc), float(grace), RANK_TIMEOUT)


def main(argv: list[str]) -> int:
    case, chosen = argv[0], int(argv[1]) if argv[1:] else 0
    me = read_launch(os.environ)
    try:
        join(me, "cpu", RANK_TIMEOUT)
        mesh = make_mesh({"dp_shard": me.world_size}, torch.device("cpu"))
        with Stop(silent=me.rank > 0) as stop:
            return leave(act(case, mesh, stop, mesh.rank == chosen))
    except (ConfigError, LaunchError) as error:
        return fail(me, error, expected=True)
    except Exception as error:
        return fail(me, error, expected=False)


def act(case: str, mesh: Mesh, stop: Stop, is_chosen: bool) -> int:
    print(f"rank {mesh.rank} of {mesh.world.size}", flush=True)
    if "READY" in os.environ:
        Path(os.environ["READY"], str(os.getpid())).touch()
    if case == "sum":
        print(all_reduce(torch.tensor([mesh.rank + 1]), mesh.world).item())
        print(f"{torch.get_num_threads()} threads")
        return 0
    if case == "stop":
        return steps(mesh, stop)
    if case == "all fail":
        raise ConfigError(["what all ranks see"])
    if is_chosen and case == "expected":
        raise ConfigError(["what one rank sees"])
    if is_chosen and case == "raise":
        raise ValueError("boom")
    if is_chosen and case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if is_chosen and case == "exit":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)
    if is_chosen and case == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if is_chosen and case == "stopped at the end":  # when all have met in `leave`
        omnistep.bin.launch.destroy_groups = lambda: os.kill(os.getpid(), signal.SIGSTOP)
    if is_chosen and case == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "stuck" and not is_chosen:
        time.sleep(600)
    if case == "stuck":
        raise ValueError("boom")
    all_reduce(torch.ones(1), mesh.world)  # the others wait here for the one that is gone
    return 0


def steps(mesh: Mesh, stop: Stop) -> int:
    """Ranks of different speed, as a loop without any other communication."""
    step = 0
    while not stop.agreed(mesh.world):
        step += 1
        time.sleep(0.01 * (1 + mesh.rank))
    all_steps = [all_reduce(torch.tensor([step]), mesh.world, op).item() for op in ("sum", "max")]
    print("the same step" if all_steps[0] == all_steps[1] * mesh.world.size else all_steps)
    return RESUME_ME


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

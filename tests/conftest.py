"""What all tests share: one thread and one compiler a worker, compiled code for one run of the
suite, the servers that fork jobs, and in which order and by which worker tests are run."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and by the first process of the run: its workers inherit it.
for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(name, "1")
if "OMNISTEP_TESTS_CACHE" not in os.environ:
    # compiled code of an earlier run could hide what a change has broken
    OWN_CACHE = tempfile.TemporaryDirectory(prefix="omnistep-tests-")
    os.environ["OMNISTEP_TESTS_CACHE"] = OWN_CACHE.name
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = OWN_CACHE.name
    os.environ["OMNISTEP_CACHE"] = OWN_CACHE.name
    os.environ["MPLCONFIGDIR"] = OWN_CACHE.name  # else in the home directory

import pytest  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from tests import tracing  # noqa: E402
from tests.forkserver.client import PROGRAMS, ForkServer  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts jobs that have imported all that a run imports."""
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Without jax: for runs that fork data workers."""
    server = ForkServer(tmp_path_factory.mktemp("plain_server"), PROGRAMS)
    yield server
    server.close()


@pytest.fixture
def without_inductor() -> Iterator[None]:
    with tracing.without_inductor():
        yield


# ---- the order of tests, and which worker runs them ----------------------------------------


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one worker a core. Tests that start ranks have several processes for a while; the
    system shares the cores among them."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files without slow tests go first, so that most mistakes are seen early. Of the others those
    that take longest go first, so that no worker is left alone with one at the end."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path in slow, longest.get(item.path, len(LONGEST))))


LONGEST = (
    "parallel/test_matrix.py",
    "parallel/test_traffic.py",
    "parallel/test_memory.py",
    "faults/test_faults.py",
    "models/test_compiled.py",
    "models/test_moe.py",
    "models/test_ring.py",
)


class Scheduler(LoadScopeScheduling):
    """A worker runs a file in one piece: its tests share fixtures, and what they compiled. Files
    are begun in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    config.option.loadscopereorder = False
    return Scheduler(config, log)  # pyright: ignore[reportArgumentType]


# ---- where the time goes -------------------------------------------------------------------


SECONDS: defaultdict[str, float] = defaultdict(float)
"""Of each test, its fixtures included."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    SECONDS[report.nodeid] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After long runs, so that growth is seen."""
    if sum(SECONDS.values()) < 60:
        return
    folders: defaultdict[str, float] = defaultdict(float)
    for test, seconds in SECONDS.items():
        folders[str(Path(test.split("::")[0]).parent)] += seconds
    for title, found, count in (("folders", folders, 99), ("the ten slowest tests", SECONDS, 10)):
        terminalreporter.section(f"seconds: {title}")
        for name in sorted(found, key=lambda name: -found[name])[:count]:
            terminalreporter.line(f"{found[name]:8.1f}  {name}")

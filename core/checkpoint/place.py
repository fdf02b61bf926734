"""Where checkpoints lie: in a local directory, or in a bucket under `gs://` or `s3://`.

A bucket has objects and no directories: what stands here for a directory is the objects whose
names begin with its path. Nothing there can be renamed, so a step is committed by an object of its
own, `commit_success.txt`, which is written last and deleted first: the same that orbax goes by.

tensorstore speaks to the buckets, so that nothing else need be installed. It finds Google's
credentials as gcloud leaves them, and AWS's (and of what resembles it) in the usual variables and
files. `AWS_ENDPOINT_URL` and `AWS_REGION` are passed on, since it does not look at them itself.
"""

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts
from attrs import frozen

COMMITTED = "commit_success.txt"
DAMAGED = "damaged.txt"
DRIVERS = {"gs": "gcs", "s3": "s3"}
RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"}
"""Two minutes in all. tensorstore's own 32 times keep a wrong address quiet for a quarter hour."""
BUCKETS = {"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES}
"""What a tensorstore Context says of buckets."""
OUT_OF_REACH = (
    *("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"),
    *("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE"),
)
"""The errors of tensorstore that say nothing about the data: another time it may be read."""


class OutOfReachError(OSError):
    """A bucket that cannot be spoken to, or not by us; the message says which and why."""


def is_url(place: object) -> bool:
    return "://" in str(place)


def kvstore(directory: str) -> dict[str, Any]:
    """tensorstore's spec of what lies under a local directory or the URL of one in a bucket."""
    if not is_url(directory):
        return {"driver": "file", "path": f"{directory}/"}
    scheme, _, rest = directory.partition("://")
    bucket, _, path = rest.partition("/")
    spec = {"driver": DRIVERS[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}
    return spec | (_s3_settings() if scheme == "s3" else {})


def _s3_settings() -> dict[str, Any]:
    env = os.environ
    settings: dict[str, Any] = {
        "endpoint": env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"),
        "aws_region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
    }
    if "AWS_ACCESS_KEY_ID" in env:  # else it complains about each file that it does not find
        settings["aws_credentials"] = {"type": "environment"}
    return {name: value for name, value in settings.items() if value}


def reason(error: Exception) -> str:
    """tensorstore's message without the specification that it appends."""
    return str(error).split(" [", 1)[0] or type(error).__name__


def is_out_of_reach(error: Exception) -> bool:
    """Whether this is about the way to the data (network, permissions), not about the data."""
    return str(error).split(":", 1)[0] in OUT_OF_REACH


def read_file(directory: str, name: str) -> bytes:
    """Raises FileNotFoundError, OutOfReachError or another OSError."""
    if not is_url(directory):
        return (Path(directory) / name).read_bytes()
    content = Bucket(directory).read(name)
    if content is None:
        raise FileNotFoundError(f"{directory}/{name} does not exist")
    return content


@frozen
class Bucket:
    """A directory in a bucket. Methods raise OutOfReachError."""

    url: str
    """`gs://bucket/path` or `s3://bucket/path`, without a slash at the end."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Bucket":
        return Bucket(self.url.rpartition("/")[0])

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none of that name."""
        found = self._do(lambda store: store.read(name))
        return found.value if found.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        self._do(lambda store: store.write(name, content))

    def names(self) -> list[str]:
        """Of all objects, at any depth, relative to this directory."""
        # The gcs driver (0.1.86) takes a listing that is refused for an empty one. A refused read
        # raises, also of what does not exist.
        self.read(COMMITTED)
        return [name.decode() for name in self._do(lambda store: store.list())]

    def delete(self, name: str) -> None:
        self._do(lambda store: store.write(name, None))

    def delete_all(self) -> None:
        """Deletes every object. A step is no longer committed from the first moment on."""
        self.delete(COMMITTED)
        self._do(lambda store: store.delete_range(ts.KvStore.KeyRange()))

    def _do(self, action: Callable[[ts.KvStore], Any]) -> Any:
        try:
            store = ts.KvStore.open(kvstore(self.url), context=ts.Context(BUCKETS)).result()
            return action(store).result()
        except Exception as error:
            raise OutOfReachError(f"{self.url} is out of reach: {reason(error)}") from error


Place = Path | Bucket


def open_place(directory: str | Path) -> Place:
    """The absolute local path or the Bucket that is meant. ValueError for other URLs."""
    text = str(directory)
    if not is_url(text):
        return Path(directory).expanduser().resolve()  # tensorstore takes no `..`
    scheme, _, rest = text.partition("://")
    parts = [part for part in rest.split("/") if part]
    if scheme not in DRIVERS or not parts or rest.startswith("/"):
        raise ValueError(
            f"{text}: checkpoints lie in a local directory, gs://bucket/path or s3://bucket/path"
        )
    return Bucket(f"{scheme}://{'/'.join(parts)}")


def make(directory: Place) -> None:
    """Makes the directory; a bucket needs none."""
    if isinstance(directory, Path):
        directory.mkdir(parents=True, exist_ok=True)


def try_to_write(directory: Place) -> None:
    """Makes the directory. Raises OSError where nothing can be written to it."""
    make(directory)
    if isinstance(directory, Path):
        with tempfile.TemporaryFile(dir=directory):
            return
    name = f"writable-{uuid.uuid4().hex}.txt"  # its own: writes of one object are rationed
    directory.write(name, b"written and deleted at the start of a run")
    directory.delete(name)


def committed(directory: Place) -> list[int]:
    """The committed steps, ascending."""
    if isinstance(directory, Bucket):
        steps = [name.split("/") for name in directory.names()]
        return sorted(int(s) for s, *rest in steps if s.isdecimal() and rest == [COMMITTED])
    if not directory.is_dir():
        return []
    # a local step that is not committed has another name: orbax renames it at the end
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def is_committed(directory: Place, step: int) -> bool:
    """The same of one step, without a listing of them all."""
    place = directory / str(step)
    return place.is_dir() if isinstance(place, Path) else place.read(COMMITTED) is not None


def outdated(steps: Sequence[int], keep: int | None, keep_every: int | None) -> list[int]:
    """Which of the ascending steps go: all but the newest `keep` and the multiples of
    `keep_every`; none where `keep` is None."""
    old = steps[:-keep] if keep is not None else []
    return [step for step in old if not keep_every or step % keep_every]


def set_aside(directory: Place, step: int) -> str:
    """Makes a committed step one that nothing reads, and says where it is now.

    Locally it is renamed to `<step>.damaged`. In a bucket it stays in its place, marked, until
    its step is saved again.
    """
    if isinstance(directory, Bucket):
        place = directory / str(step)
        place.write(DAMAGED, b"This checkpoint could not be restored and was set aside.")
        place.delete(COMMITTED)
        return f"{place} ({DAMAGED})"
    taken = (directory / f"{step}.damaged{n or ''}" for n in itertools.count())
    place = next(path for path in taken if not path.exists())
    (directory / str(step)).rename(place)
    return str(place)

"""Buckets on this machine, for tests: Google's, as far as tensorstore asks, and moto's S3."""

import contextlib
import itertools
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

import attrs
import pytest

PAGE = 3
"""Objects in one answer to a listing: few, so that there is more than one."""


@attrs.define
class Gcs:
    """The objects of one bucket, by name: (generation, content)."""

    objects: dict[str, tuple[int, bytes]] = attrs.field(factory=dict)
    changes_left: int | None = None
    """How many writes and deletions are still done. Then all is refused: as far as the bucket can
    see, who asks has died. None: no end."""
    lock: threading.Lock = attrs.field(factory=threading.Lock)
    generations: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))


def _handler(gcs: Gcs) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            self.answer("GET")

        def do_POST(self) -> None:
            self.answer("POST")

        def do_DELETE(self) -> None:
            self.answer("DELETE")

        def answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            found = re.fullmatch(r"(?:/upload)?/storage/v1/b/bucket/o(?:/(.*))?", url.path)
            with gcs.lock:
                if gcs.changes_left == 0:
                    refused = {"error": {"code": 403, "message": "refused by the test"}}
                    return self.send(403, json.dumps(refused).encode())
                if found is None:
                    return self.send(404)
                if found[1] is None and method == "GET":
                    return self.send(200, json.dumps(self.listing(query)).encode())
                name = query["name"] if method == "POST" else unquote(found[1])
                generation, content = gcs.objects.get(name, (0, None))
                wanted, unwanted = (query.get(f"ifGeneration{k}Match") for k in ("", "Not"))
                if wanted is not None and int(wanted) != generation:
                    return self.send(412)
                if method != "GET" and gcs.changes_left is not None:
                    gcs.changes_left -= 1
                if method == "POST":
                    gcs.objects[name] = (next(gcs.generations), body)
                    return self.send(200, json.dumps(self.resource(name)).encode())
                if content is None:
                    return self.send(404)
                if unwanted is not None and int(unwanted) == generation:
                    return self.send(304)
                if method == "DELETE":
                    del gcs.objects[name]
                    return self.send(204)
            self.part_of(content, generation)

        def part_of(self, content: bytes, generation: int) -> None:
            headers = {"x-goog-generation": str(generation)}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                return self.send(200, content, headers)
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.send(206, content[first : last + 1], headers)

        def listing(self, query: dict[str, str]) -> dict[str, Any]:
            first, end = query.get("startOffset", ""), query.get("endOffset")
            names = [n for n in sorted(gcs.objects) if n >= first and (not end or n < end)]
            names = [name for name in names if name > query.get("pageToken", "")]
            page = {"items": [self.resource(name) for name in names[:PAGE]]}
            return page | ({"nextPageToken": names[PAGE - 1]} if len(names) > PAGE else {})

        def resource(self, name: str) -> dict[str, str]:
            generation, content = gcs.objects[name]
            return {"name": name, "generation": str(generation), "size": str(len(content))}

        def send(
            self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def gcs(patch: pytest.MonkeyPatch) -> Iterator[Gcs]:
    """A served `gs://bucket`; this process and its children find it through the environment."""
    bucket = Gcs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(bucket))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A served `s3://bucket`, likewise. Skips the test where moto is not installed."""
    moto = pytest.importorskip("moto.server", reason="moto, which plays S3, is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    try:
        urlopen(Request(f"{endpoint}/moto-api/reset", method="POST"))  # it outlives its servers
        urlopen(Request(f"{endpoint}/bucket", method="PUT"))
        yield
    finally:
        server.stop()

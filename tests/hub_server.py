"""A hub on the loopback address: speaks as much of the Hugging Face hub's protocol as downloads need, and fails on
request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")  # kept outside of git, and behind a redirect


@dataclass
class FakeHub:
    """One model, and what is to go wrong.

    folder: its files.
    """

    folder: Path
    repo: str = "owner/StableVSR"
    url: str = ""
    license: str | None = "openrail++"
    kind: str = "StableVSRPipeline"
    refused: tuple[int, str] | None = None  # status and error code of every request
    stops_at: dict[str, int] = field(default_factory=dict)  # by path: no byte after this one is sent
    cuts: dict[str, int] = field(default_factory=dict)  # the same, but only once
    damaged: set[str] = field(default_factory=set)  # sent with another last byte
    lost: set[str] = field(default_factory=set)  # listed, but not there
    unlisted: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def contents(self) -> dict[str, bytes]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def listing(self) -> dict:
        """As GET /api/models/REPO?blobs=true answers."""
        siblings = []
        for path, content in self.contents().items():
            if path not in self.unlisted:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"rfilename": path, "size": len(content), "blobId": blob}
                if path.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entry |= {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}}
                siblings.append(entry)
        card = {"license": self.license} if self.license else {}
        config = {"diffusers": {"_class_name": self.kind}}
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "config": config, "tags": []}

    def downloaded(self) -> list[str]:
        """The paths of the files that were sent, at least in part, in this order."""
        return [path for kind, path, _, _ in self.requests if kind == "file"]

    def ranges(self, path: str) -> list[str | None]:
        """The ranges that were asked for of this file."""
        return [span for kind, found, span, _ in self.requests if kind == "file" and found == path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.refused:
            self._fail(*self.hub.refused)
        elif path.startswith("/api/models/"):
            self._list(path.removeprefix("/api/models/"))
        elif path.startswith("/cdn/"):
            self._send_file(path.removeprefix("/cdn/"))
        elif path.startswith(f"/{self.hub.repo}/resolve/{COMMIT}/"):
            self._resolve(path.removeprefix(f"/{self.hub.repo}/resolve/{COMMIT}/"))
        else:
            self._fail(404, "EntryNotFound")

    def _list(self, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        self._note("list", path)
        if repo != self.hub.repo:
            self._fail(401, "RepoNotFound")
        elif revision not in ("", "main", "v1", COMMIT):
            self._fail(404, "RevisionNotFound")
        else:
            self._answer(200, json.dumps(self.hub.listing()).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str) -> None:
        self._note("resolve", path)
        if path in self.hub.lost or path not in self.hub.contents():
            self._fail(404, "EntryNotFound")
        elif path.endswith(LARGE):
            host = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's storage is
            self._answer(302, b"", {"Location": f"{host}/cdn/{path}"})
        else:
            self._send_file(path)

    def _send_file(self, path: str) -> None:
        self._note("file", path)
        content = self.hub.contents()[path]
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first, status, headers = 0, 200, {"X-Repo-Commit": COMMIT}
        if (span := self.headers.get("Range")) and not self.hub.ignores_ranges:
            first, status = int(span.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        end = min(self.hub.stops_at.get(path, len(content)), self.hub.cuts.pop(path, len(content)))
        self._answer(status, content[first:end], headers, len(content) - first)

    def _note(self, kind: str, path: str) -> None:
        self.hub.requests.append((kind, path, self.headers.get("Range"), self.headers.get("Authorization")))

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None and len(body) < length:
            self.close_connection = True  # in the middle of the body

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Run it in a thread."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

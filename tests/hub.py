"""A stand-in for the Hugging Face hub on loopback: as much of its protocol as the real client needs to fetch files."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name: a commit's files, by revision. ``asked`` are the paths that were asked for."""

    url: str = ""
    repositories: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Make these the files of a revision; returns its commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        revisions = self.repositories.setdefault(repo, {})
        revisions[revision] = revisions[commit] = commit, files
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for ``/OWNER/REPO/resolve/REVISION/FILE``."""
        owner, name, _, revision, file = unquote(path).lstrip("/").split("/", 4)
        found = self.repositories.get(f"{owner}/{name}")
        if found is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in found:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = found[revision]
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        tag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, files[file]


def files_of(folder: Path, inside: str = "") -> dict[str, bytes]:
    """A folder's files, as they are to lie in a repository."""
    return {f"{inside}{path.name}": path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextlib.contextmanager
def hub_standing_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, home: Path, offline: bool = False) -> dict[str, str]:
    """Where the client finds the hub and keeps what it fetched."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_TOKEN": ""}

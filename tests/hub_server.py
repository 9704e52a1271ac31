"""One repository of the Hub on this machine: its cache's layout, and the few addresses that a download asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


def into_cache(
    source: Path, cache: Path, repository: str, *, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """Lay a folder out as the Hub's cache does: links from the snapshot into blobs that have hashes for names."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "blobs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    for file in (path for path in source.rglob("*") if path.is_file()):
        data = file.read_bytes()
        blob = place / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(place).parts[:-1]), "blobs", blob.name))
    return snapshot


@contextlib.contextmanager
def serve(folder: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a model repository; yields the address, and the files that were downloaded so far."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            api, resolve = f"/api/models/{repository}", f"/{repository}/resolve/{COMMIT}/"
            if path.startswith(f"{api}/tree/"):
                self.json(
                    [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                        for name, file in files.items()
                    ]
                )
            elif path == api or path in {f"{api}/revision/{name}" for name in ("main", "v1", COMMIT)}:
                siblings = [{"rfilename": name} for name in files]
                self.json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                name = path.removeprefix(resolve)
                if self.command == "GET":
                    downloaded.append(name)
                headers = {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": COMMIT}
                self.send(200, files[name].read_bytes(), headers)
            else:
                kind = "RevisionNotFound" if path.startswith(f"{api}/revision/") else "RepoNotFound"
                self.send(404, b"", {"X-Error-Code": kind, "X-Error-Message": kind})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def digest(file: Path) -> str:
    """Return git's name for a file's content."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

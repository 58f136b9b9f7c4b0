"""What huggingface.co answers to uploads and downloads of small files, on loopback."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest


class Hub(http.server.BaseHTTPRequestHandler):
    """Files by their path, `/<repository>/resolve/main/<name>`; `asked` has every path in order."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)
        if self.path == "/api/repos/create":
            said = json.loads(body)
            name = said["name"]
            private = said.get("visibility", "") == "private" or bool(said.get("private"))
            self.server.private.setdefault(f"me/{name}", private)  # one that is there stays as it is
            self.answer({"url": f"{self.server.url}/me/{name}", "id": f"me/{name}"})
        elif "/preupload/" in self.path:
            wanted = [f["path"] for f in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": path, **mode} for path in wanted]})
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = f"/{repository}/resolve/main/{line['value']['path']}"
                    self.server.files[path] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{repository}/commit/{'c' * 40}"
            self.answer({"success": True, "commitOid": "c" * 40, "commitUrl": url})
        else:
            self.answer({"errors": [], "warnings": []})  # of the YAML head

    def do_HEAD(self):
        self.file(False)

    def do_GET(self):
        self.file(True)

    def file(self, body):
        self.server.asked.append(self.path)
        if self.path.startswith("/api/models/"):
            name = self.path.removeprefix("/api/models/")
            return self.answer({"id": name, "private": self.server.private.get(name, False)})
        if match := re.match(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/", self.path):
            prefix = f"/datasets/{match[1]}/resolve/{'c' * 40}/"
            files = {k.removeprefix(prefix): x for k, x in self.server.files.items() if prefix in k}
            if not files:
                return self.answer({"error": "not found"}, 404)
            if match[2] == "tree":
                sizes = [
                    {"type": "file", "path": k, "size": len(x), "oid": "0" * 40}
                    for k, x in files.items()
                ]
                return self.answer(sizes)
            return self.answer(
                {"id": match[1], "sha": "c" * 40, "siblings": [{"rfilename": k} for k in files]}
            )
        data = self.server.files.get(urllib.parse.unquote(self.path))
        if data is None:
            return self.answer({"error": "not found"}, 404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def answer(self, value, code=200):
        data = json.dumps(value).encode()
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def in_place(monkeypatch):
    """The server in the place of huggingface.co, for the library in this process."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serve() as server:
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield server


@contextlib.contextmanager
def serve():
    """The server, with its `url`, its `files`, and the paths that were `asked`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as s:
        s.files, s.asked, s.private, s.url = {}, [], {}, f"http://127.0.0.1:{s.server_port}"
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()

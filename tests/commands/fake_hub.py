"""A hub in this process: the few endpoints that huggingface_hub calls to make a repository and to commit files to it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
TOKEN = "hf_right"
LARGE = (".safetensors", ".gguf")


class FakeHub:
    """repositories: {name: {"private": .., "branches": {branch: {path: bytes}}}}; large: {sha256: bytes} that were uploaded

    refuse: {part of an address: (HTTP status, words)}; requests: "METHOD address" of all that were made; spoil: bytes that a
    file gets in place of its own, as on a damaged disk
    """

    def __init__(self):
        self.repositories, self.large, self.refuse, self.requests, self.commits = {}, {}, {}, [], []
        self.spoil = {}

    def files(self, name, branch="main"):
        return self.repositories[name]["branches"][branch]

    def answer(self, method, path, body, token, address):
        """(status, JSON) of a request."""
        self.requests.append(f"{method} {path}")
        for part, (status, words) in self.refuse.items():
            if part in path:
                return status, {"error": words}
        if path.startswith("/upload/"):
            digest = hashlib.sha256(body).hexdigest()
            assert path == f"/upload/{digest}", "the bytes are not those that were announced"
            self.large[digest] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            data = json.loads(body)
            name = f"{data['organization'] or 'me'}/{data['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{address}/{name}"}
            private = bool(data.get("private") or data.get("visibility") == "private")
            self.repositories[name] = {"private": private, "branches": {"main": {}}}
            return 200, {"url": f"{address}/{name}"}
        if match := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            found = []
            for item in json.loads(body)["objects"]:
                missing = item["oid"] not in self.large
                link = {"actions": {"upload": {"href": f"{address}/upload/{item['oid']}"}}} if missing else {}
                found.append({**item, **link})
            return 200, {"transfer": "basic", "objects": found}
        match = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(\w+)/([\w.-]+))?", path.partition("?")[0])
        name, verb, branch = match.groups()
        return self._repository(name, verb, branch, body, address)

    def _repository(self, name, verb, branch, body, address):
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if verb is None or verb == "revision":
            files = repository["branches"]["main" if verb is None else branch]
            return 200, {
                "id": name,
                "private": repository["private"],
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in files],
            }
        if verb == "branch":
            new = branch not in repository["branches"]
            repository["branches"].setdefault(branch, {})
            return (200 if new else 409), {}
        if verb == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
        if verb == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.commits.append(value["summary"])
                elif line["key"] == "file":
                    repository["branches"][branch][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["branches"][branch][value["path"]] = self.large[value["oid"]]
            repository["branches"][COMMIT] = repository["branches"][branch]
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/{name}/commit/{COMMIT}"}
        assert verb == "tree"
        return 200, [
            self._entry(path, self.spoil.get(path, data)) for path, data in repository["branches"][branch].items()
        ]

    def _entry(self, path, data):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


@contextmanager
def running(hub):
    """The address of the hub while it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = f"http://127.0.0.1:{self.server.server_port}"
            status, data = hub.answer(self.command, self.path, body, self.headers.get("Authorization"), address)
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

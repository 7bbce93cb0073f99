"""The Hugging Face hub on 127.0.0.1: accounts, repositories, uploads and downloads, as huggingface_hub asks for them;
and what goes wrong: a status, or a connection that is cut."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from huggingface_hub import constants, file_download

TOKEN = "hf_SentinelOfTheTests0123456789"
OWNER, COMMIT = "alice", "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`faults`: pattern of "METHOD path" -> statuses or "cut", one for each request, then none."""

    def __init__(self):
        self.files = {}
        """Repository -> name of a file -> its bytes."""
        self.private, self.requests, self.commits, self.faults = {}, [], [], {}
        self.role, self.objects = "write", {}
        hub = self

        class Handler(_Handler):
            here = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repository, **files):
        self.files.setdefault(repository, {}).update({name: bytes(own) for name, own in files.items()})

    def asked(self, pattern):
        return [line for line in self.requests if re.search(pattern, line)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    here: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        hub, line = self.here, f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(line)
        for pattern, faults in hub.faults.items():
            if faults and re.search(pattern, line):
                fault = faults.pop(0)
                if fault == "cut":
                    self.close_connection = True
                    return self.connection.close()
                if fault != "half":
                    return self.answer(fault, {"error": "as the test wants it"})
                return self.download(cut=True)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "/api/" in self.path or self.command in ("POST", "PUT"):
            return self.api(json.loads(body) if body[:1] == b"{" and b"\n{" not in body else body, known)
        return self.download()

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def api(self, body, known):
        hub, path = self.here, self.path.partition("?")[0]
        if path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = body
            return self.answer(200)
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?", path)
        if found and self.command == "GET":
            return self.model_info(found[1], found[2] or "main")
        if not known and path != "/api/validate-yaml":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            account = {"name": OWNER, "type": "user", "orgs": [{"name": "the-group"}]}
            return self.answer(200, account | {"auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = f"{body['organization'] or OWNER}/{body['name']}"
            status = 409 if name in hub.files else 200
            if status == 200:
                hub.files[name], hub.private[name] = {}, body.get("private", False)
            return self.answer(status, {"url": f"{hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            return self.answer(200, {"files": [self.mode(found[1], one) for one in body["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"transfer": "basic", "objects": [self.place(one) for one in body["objects"]]})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
            return self.answer(200, {"commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer(404, {"error": path})

    def mode(self, repository, file):
        is_large = file["path"].endswith((".safetensors", ".png", ".bin"))
        held = self.here.files[repository].get(file["path"])
        oid = held is not None and (hashlib.sha256(held) if is_large else _git_blob(held)).hexdigest()
        more = {"oid": oid} if oid else {}
        return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **more}

    def place(self, wanted):
        href = f"{self.here.url}/objects/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href}}}

    def commit(self, repository, lines):
        hub, names = self.here, []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[repository][value["path"]] = hub.objects[value["oid"]]
            names += [value["path"]] if "path" in value else []
        hub.commits.append((repository, sorted(names)))

    def model_info(self, repository, revision):
        files = self.here.files.get(repository)
        if revision not in ("main", COMMIT):
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name, "size": len(own), "blobId": "0"} for name, own in sorted(files.items())]
        about = {"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": []}
        return self.answer(200, about | {"downloads": 0, "likes": 0, "siblings": siblings})

    def download(self, cut=False):
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", unquote(self.path))
        files = self.here.files.get(found[1]) if found else None
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if found[2] not in ("main", COMMIT):
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if found[3] not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = files[found[3]]
        marks = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        begin, status = 0, 200
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            begin, status = int(span[1]), 206
            self.here.requests.append(f"RANGE {begin}")
            marks["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if not cut:
            return self.answer(status, content[begin:], **marks)
        self.send_response(status)
        for name, value in {"Content-Length": len(content) - begin, **marks}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content[begin : (begin + len(content)) // 2])
        self.close_connection = True
        return self.connection.close()


def _git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content)


@contextmanager
def running_hub():
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def point_at(hub, monkeypatch, cache):
    """From now on this process's hub is that one, with an empty cache and no token of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

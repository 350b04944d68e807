"""A real HTTP server on loopback that speaks the part of the Hub's API which pushing and loading an adapter need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_thisTokenMustNeverBeShown0123456789"


class HubServer:
    """`with HubServer() as hub:` serves on `hub.url`; `hub.files[repo]` is what was committed.

    Args:
        large: File suffixes that must come through the LFS protocol rather than inside the commit.
    """

    def __init__(self, large: tuple[str, ...] = (".safetensors",)) -> None:
        self.large = large
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.branches: dict[str, set[str]] = {}
        self.pulls: list[str] = []
        self.broken: str | None = None  # what stands in the paths that end in an error of the server
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def commit_id(self, repo: str) -> str:
        return hashlib.sha1(json.dumps(sorted(self.files[repo])).encode()).hexdigest()

    # ---- the API: each returns (status, JSON or bytes, headers) ----
    def post(self, path: str, body: bytes, pull: bool = False) -> tuple[int, Any]:
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'user'}/{given['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            self.repos[repo], self.files[repo] = given, {}
            return 200, {"url": f"{self.url}/{repo}", "name": repo}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(self.large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            return (200, {"files": modes}) if found[1] in self.repos else (404, {"error": "no such repository"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            repo = found[1]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[repo][value["path"]] = self.objects[value["oid"]]
            commit = self.commit_id(repo)
            answer = {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit, "hookOutput": ""}
            if pull:
                self.pulls.append(repo)
                answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{len(self.pulls)}"
            return 200, answer
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.branches.setdefault(found[1], set()).add(found[2])
            return 200, {}
        return 404, {"error": f"not here: {path}"}

    def put(self, path: str, body: bytes) -> tuple[int, Any]:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return 422, {"error": "wrong hash"}
        self.objects[oid] = body
        return 200, {}


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status: int, content: Any, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header(
                "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
            )
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def guarded(self, action: Any) -> None:
            path, body = unquote(urlparse(self.path).path), self.body()
            hub.requests.append(f"{self.command} {path}")
            if (
                not path.startswith(("/lfs/", "/api/validate-yaml"))
                and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            ):
                self.reply(401, {"error": "Invalid username or password."})
            else:
                self.reply(*action(path, body))

        def do_POST(self) -> None:
            pull = "create_pr=1" in urlparse(self.path).query
            self.guarded(lambda path, body: hub.post(path, body, pull))

        def do_PUT(self) -> None:
            self.guarded(hub.put)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path == "/api/whoami-v2":
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                self.reply(*((200, {"name": "user", "type": "user"}) if known else (401, {"error": "Unauthorized"})))
                return
            if hub.broken and hub.broken in path:
                self.reply(500, {"error": "broken"})
                return
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                content = hub.files.get(found[1], {}).get(found[2])
                if content is not None:
                    etag = hashlib.sha256(content).hexdigest()
                    self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=hub.commit_id(found[1]))
                    return
                self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                return
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path)
            if found and found[1] in hub.gated:
                self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo")
                return
            if found and found[1] in hub.files:
                if found[2] not in (None, "main", *hub.branches.get(found[1], ())):
                    self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
                    return
                names = [{"rfilename": name} for name in hub.files[found[1]]]
                self.reply(200, {"id": found[1], "sha": hub.commit_id(found[1]), "siblings": names, "private": True})
                return
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/.*)?", path):
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                    for n, c in hub.files[found[1]].items()
                ]
                self.reply(200, tree)
                return
            self.reply(404, {"error": f"not here: {path}"}, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    return Handler

"""A hub of models on loopback, small but writable: enough for `push_to_hub` and `from_pretrained`.

    python hub_server.py FOLDER

prints its address and serves until its standard input closes. A repository is FOLDER/OWNER/NAME, with a folder for
each commit and a file `main` that names the last one. Every file is uploaded inside the commit itself, so there is no
large-file storage. While FOLDER/break is there, a commit's upload breaks off halfway.
"""

import base64
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NO_COMMIT = "0" * 40
OWNER = "somebody"


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub that the client uses for models."""

    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if "commit" in self._path() and (self.root / "break").exists():
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        match self._path():
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, "preupload", _]:
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                self._send_json({"files": modes})
            case ["api", "models", owner, name, "commit", _]:
                commit = self._commit(self.root / owner / name, body)
                url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{commit}"
                self._send_json({"commitUrl": url, "commitOid": commit, "hookOutput": ""})
            case ["api", "validate-yaml"]:
                self._send_json({"errors": [], "warnings": []})
            case _:
                self._send_missing("Entry")

    def do_GET(self):
        match self._path():
            case ["api", "whoami-v2"]:
                self._send_json({"name": OWNER, "type": "user", "orgs": []})
            case ["api", "models", owner, name, "tree", revision, *_]:
                files = self._files(self.root / owner / name, revision)
                self._send_json([{"type": "file", "path": path.name, **_size(path)} for path in files])
            case ["api", "models", owner, name, *rest]:
                repository, revision = self.root / owner / name, rest[1] if rest else "main"
                files = [{"rfilename": path.name} for path in self._files(repository, revision)]
                commit = _commit_of(repository, revision)
                self._send_json({"id": f"{owner}/{name}", "sha": commit, "siblings": files})
            case [owner, name, "resolve", revision, *path]:
                self._send_file(self.root / owner / name, revision, "/".join(path))
            case _:
                self._send_missing("Entry")

    do_HEAD = do_GET

    def _path(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _files(self, repository, revision) -> list[Path]:
        return sorted((repository / _commit_of(repository, revision)).glob("*"))

    def _create(self, request):
        name = f"{request.get('organization') or OWNER}/{request['name']}"
        (self.root / name).mkdir(parents=True, exist_ok=True)
        self._send_json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})

    def _commit(self, repository, body) -> str:
        """Add a folder with the last commit's files and the new ones, and make it the last."""
        last = repository / _commit_of(repository, "main")
        commit = hashlib.sha1(last.name.encode() + body).hexdigest()
        if last.is_dir():
            shutil.copytree(last, repository / commit)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = repository / commit / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                (repository / commit / line["value"]["path"]).unlink()
        (repository / "main").write_text(commit)
        return commit

    def _send_file(self, repository, revision, name):
        commit = _commit_of(repository, revision)
        path = repository / commit / name
        if not path.is_file():
            self._send_missing("Entry" if repository.is_dir() else "Repo", commit)
            return
        content = path.read_bytes()
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _send_json(self, answer):
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_missing(self, what, commit=NO_COMMIT):
        self._send(404, b"", {"X-Error-Code": f"{what}NotFound", "X-Repo-Commit": commit})

    def _send(self, status, content, headers):
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _commit_of(repository: Path, revision: str) -> str:
    """The commit that a revision is."""
    main = repository / "main"
    return main.read_text() if revision == "main" and main.is_file() else revision


def _size(path: Path) -> dict:
    content = path.read_bytes()
    return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def main():
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

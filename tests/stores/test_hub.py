"""Adapters are read from a hub where they lie: huggingface_hub against a server that answers as the hub's API does.

No hub is reached; what the server answers is what huggingface_hub 2.4 asks for (hf_api.py, hf_file_system.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

import lorabridge
from lorabridge.errors import InputError, OutputError
from lorabridge.files import placeholders, stores

EXAMPLE = Path(__file__).parents[2] / "examples" / "token-classifier"
REPO = "founders/token-classifier"


class Hub(BaseHTTPRequestHandler):
    """One public repository of models, whose only revision holds the files of a directory."""

    folder: Path
    ranges: list[str]

    def files(self) -> list[dict[str, object]]:
        found = []
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            name = path.relative_to(self.folder).as_posix()
            found.append({"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
        return found

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if re.fullmatch(rf"/api/models/{REPO}(/revision/main)?", path):
            return self.answer({"id": REPO, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        if found := re.fullmatch(rf"/api/models/{REPO}/tree/main/?(.*)", path):
            inside = f"{found[1]}/" if found[1] else ""
            return self.answer([file for file in self.files() if str(file["path"]).startswith(inside)])
        if found := re.fullmatch(rf"/{REPO}/resolve/main/(.*)", path):
            return self.content(self.folder / found[1])
        return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        self.answer([file for file in self.files() if file["path"] in asked])

    def content(self, path: Path) -> None:
        data = path.read_bytes()
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())  # type: ignore[union-attr]
        self.ranges.append(path.name)
        self.send_response(206)
        part = data[start : end + 1]
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def answer(self, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    held = type("Held", (Hub,), {"folder": EXAMPLE, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), held)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False}
    monkeypatch.setitem(fsspec.config.conf, "hf", told)
    monkeypatch.setattr(placeholders, "_PLACED", placeholders._Placed())
    stores.store.cache_clear()
    yield held
    stores.store.cache_clear()
    server.shutdown()
    server.server_close()


def test_an_adapter_is_converted_from_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    lorabridge.convert(f"hf://{REPO}", tmp_path / "out.ckpt")
    lorabridge.convert(tmp_path / "out.ckpt", tmp_path / "back")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (EXAMPLE / weights).read_bytes()
    assert set(hub.ranges) == {"adapter_config.json", weights}


def test_a_repository_that_is_not_there(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such") as caught:
        lorabridge.convert("hf://founders/absent", tmp_path / "out.ckpt")
    assert caught.value.where == ("hf://founders/absent",)


def test_writing_to_the_hub_is_refused_with_the_tool_that_does_it(hub: type[Hub]) -> None:
    with pytest.raises(OutputError, match="commit") as caught:
        lorabridge.convert(EXAMPLE, f"hf://{REPO}/out/")
    assert "hf upload" in caught.value.hint

"""Hub ids through huggingface_hub with a local hub: real HTTP, a real cache."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories and records the requests."""

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.revisions: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The routes that downloading a snapshot needs."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if len(parts) < 3:  # the library checks that the hub is reachable
            return self.send({}, 404, {}, body)
        self.server.tokens.add(self.headers.get("Authorization"))
        if parts[:2] == ["api", "models"]:
            return self.about("/".join(parts[2:4]), parts[4:])
        name, (verb, _revision, *rest) = "/".join(parts[:2]), parts[2:]
        file = self.server.repositories.get(name, Path("absent")) / "/".join(rest)
        if verb != "resolve" or not file.is_file():
            return self.send({}, 404, {"X-Error-Code": "EntryNotFound"}, body)
        if body:
            self.server.fetched.append(f"{name}/{'/'.join(rest)}")
        etag = f'"{abs(hash(file)):x}"'
        return self.send(file.read_bytes(), 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def about(self, name: str, rest: list[str]) -> None:
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.send({}, 404, {"X-Error-Code": "RepoNotFound"}, True)
        files = sorted(file.name for file in folder.iterdir())
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": COMMIT} for f in files]
            return self.send(tree, 200, {}, True)
        self.server.revisions.add(rest[1] if rest else "main")
        return self.send({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}, 200, {}, True)

    def send(self, content: bytes | object, status: int, headers: dict[str, str], body: bool) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    clip = tiny.write_clip(tmp_path / "clip")
    llava = tiny.write_llava(tmp_path / "llava", mm_vision_tower="someone/clip")
    (llava / "training.log.bin").write_bytes(b"a large file that nobody needs")
    server = Hub({"someone/llava": llava, "someone/clip": clip})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(hub: Hub, cache: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_TOKEN": "hf_secret"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-m", "llava.cli", "ask", "Hello", "--max-new-tokens", "4", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_hub_id_is_fetched_once_with_token_and_revision_and_then_answers_offline(hub: Hub, tmp_path: Path) -> None:
    first = ask(hub, tmp_path / "cache", "--model", "someone/llava", "--revision", "v1")
    assert first.returncode == 0, first.stderr
    assert hub.tokens == {"Bearer hf_secret"}
    assert "v1" in hub.revisions
    assert "someone/llava/pytorch_model.bin.index.json" in hub.fetched
    assert "someone/llava/training.log.bin" not in hub.fetched
    assert len(hub.fetched) == len(set(hub.fetched)), "a file was fetched twice"
    fetched = list(hub.fetched)
    again = ask(hub, tmp_path / "cache", "--model", "someone/llava", "--revision", "v1", offline=True)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert hub.fetched == fetched


def test_an_unknown_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    run = ask(hub, tmp_path / "cache", "--model", "someone/else")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "someone/else" in run.stderr


def test_a_local_folder_with_a_local_tower_asks_no_hub(hub: Hub, tmp_path: Path) -> None:
    folders = hub.repositories
    run = ask(
        *(hub, tmp_path / "cache", "--model", str(folders["someone/llava"])),
        *("--vision-tower", str(folders["someone/clip"])),
    )
    assert run.returncode == 0, run.stderr
    assert not hub.fetched
    assert not hub.revisions


def test_a_recorded_base_in_the_cache_is_used_and_no_base_is_ever_fetched_unasked(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["someone/base"] = tiny.write_llama(tmp_path / "base")
    lora = tiny.write_lora(tmp_path / "lora", clip=hub.repositories["someone/clip"], base="someone/base")
    run = ask(hub, tmp_path / "cache", "--model", str(lora))
    assert run.returncode == 2
    assert f"run: llava ask Hello --max-new-tokens 4 --model {lora} --base someone/base" in run.stderr
    assert not hub.fetched
    given = ask(hub, tmp_path / "cache", "--model", str(lora), "--base", "someone/base")
    assert given.returncode == 0, given.stderr
    found = ask(hub, tmp_path / "cache", "--model", str(lora), offline=True)
    assert (found.returncode, found.stdout) == (0, given.stdout)
    assert found.stderr.count("\n") == 1
    assert "uses the recorded base" in found.stderr
    next((tmp_path / "cache").rglob("snapshots/*/model*.safetensors")).unlink()
    assert ask(hub, tmp_path / "cache", "--model", str(lora), offline=True).returncode == 2


@pytest.mark.parametrize("why", ["absent", "no model", "too narrow", "too narrow on the hub"])
def test_an_unsuitable_base_is_refused_before_the_weights_of_the_delta_are_fetched(
    hub: Hub, tmp_path: Path, why: str
) -> None:
    clip = hub.repositories["someone/clip"]
    hub.repositories["someone/delta"] = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    narrow = tiny.write_llama(tmp_path / "narrow", hidden_size=32, **tiny.LLAMA_1)
    hub.repositories["someone/narrow"] = narrow
    base = {"absent": "/no/such/folder", "no model": str(clip), "too narrow": str(narrow)}.get(why, "someone/narrow")
    run = ask(hub, tmp_path / "cache", "--model", "someone/delta", "--base", base)
    assert run.returncode == 2
    assert base in run.stderr.splitlines()[-1]
    assert not [name for name in hub.fetched if name.endswith((".bin", ".safetensors"))]

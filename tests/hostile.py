"""A real server, what a hostile client does to it, and whether it stays unharmed."""

import base64
import io
import json
import os
import re
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.command import LLAVA

KEY = "a-key-for-tests"
CHAT, COMPLETION, EXPLAIN, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/explain", "/tokenize"
MODEL = "llava-tiny"
TIME_S = 20  # until an answer has to be there
MAX_CHOICES = 256  # at the same time, by default
_STARTED_S = 120
_FOREIGN = re.compile(r"Traceback|pydantic|pillow|PIL\.|llguidance|h11|serde|object at 0x|Error:|codec can't", re.I)


@dataclass(frozen=True)
class Answer:
    """A response. Status 0: the server closed the connection without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of an error. Asserts that the error has OpenAI's form and no words of a library."""
        error = self.json["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert isinstance(error["message"], str)
        assert error["message"]
        assert not _FOREIGN.search(error["message"]), error["message"]
        return str(error["message"])


def refused(answer: Answer, status: int, *mentions: str) -> None:
    """Asserts that a request was refused, in our own words."""
    assert (answer.status, answer.body[:300]) == (status, answer.body[:300])
    for mention in mentions:
        assert mention in answer.message


class Victim:
    """A server in a process of its own."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path):
        self.port, self.process, self.log = port, process, log

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Opens a connection. receive_buffer: its size in bytes; a small one fills up soon if nothing is read."""
        connection = socket.socket()
        connection.settimeout(TIME_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, request: bytes) -> Answer:
        """Sends bytes, and returns the answer. The connection is half closed if the server waits for more."""
        with self.connect() as connection:
            with suppress(ConnectionError):  # it may answer and close before everything has arrived
                connection.sendall(request)
            return read(connection)

    def get(self, path: str, *headers: str) -> Answer:
        """Sends a GET request with the key."""
        return self.send(head("GET", path, f"Authorization: Bearer {KEY}", *headers))

    def post(self, path: str, body: object, *headers: str) -> Answer:
        """Sends a POST request with the key. body: bytes, text, or what becomes JSON."""
        return self.send(post(path, body, *headers))

    def vanish(self, path: str, body: object, *, share: float = 1.0, after_s: float = 0.0) -> None:
        """Sends a share of a request, waits, and resets the connection."""
        request = post(path, body)
        with self.connect() as connection:
            connection.sendall(request[: int(share * len(request))])
            time.sleep(after_s)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        lines = self.get("/metrics").body.decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"llava_{name} ")).split()[1])

    @property
    def running(self) -> float:
        """Choices that the engine has not finished."""
        return self.gauge("num_requests_running") + self.gauge("num_requests_waiting")

    def memory(self, key: str = "VmRSS") -> int:
        """A memory figure of the process in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    def reset_peak(self) -> None:
        """Lets VmHWM start again."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def children(self) -> list[int]:
        """The processes that read pictures."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def honest(self) -> Any:
        """The answer to an honest request, which is the same each time."""
        content = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "What?"}]
        answer = self.post(CHAT, chat(content, temperature=0, max_tokens=6))
        assert answer.status == 200, answer.body
        return answer.json["choices"]

    def assert_unharmed(self) -> None:
        """Asserts that nothing is left of the requests so far: no choice is lost or runs, and no error was logged."""
        assert self.get("/health").status == 200
        assert wait_until(lambda: not self.running)
        full = {"model": MODEL, "prompt": ["a"] * (MAX_CHOICES // 4), "n": 4, "max_tokens": 0}
        assert wait_until(lambda: self.post(COMPLETION, full).status == 200)
        log = self.log.read_text()
        assert "raceback" not in log, log[-4000:]
        assert [line for line in log.splitlines()[1:] if not line.startswith("{")] == []  # the first one is a hint


def wait_until(holds: Callable[[], bool]) -> bool:
    """Waits for a condition. Returns whether it came true in time."""
    end = time.monotonic() + TIME_S
    while not (done := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


@contextmanager
def served(log: Path, *options: str) -> Iterator[Victim]:
    """Serves llava-tiny with a key. log: file for its stderr."""
    environment = os.environ | {"LLAVA_API_KEY": KEY}
    command = [*LLAVA, "serve", "--port", "0", "--device", "cpu", *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
    assert process.stdout
    try:
        line = process.stdout.readline().decode()
        assert line, log.read_text()
        yield Victim(int(line.rsplit(":", 1)[1]), process, log)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def read(connection: socket.socket) -> Answer:
    """Reads one response. Raises TimeoutError if the server neither sends it nor closes the connection."""
    received = bytearray()
    with suppress(ConnectionError):
        while chunk := connection.recv(2**16):
            received += chunk
            if _is_whole(bytes(received)):
                break
    start, _, body = _final(bytes(received)).partition(b"\r\n\r\n")
    if not start:
        return Answer(0, {}, b"")
    first, *lines = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


def _final(received: bytes) -> bytes:
    """Returns a response without the one that says "continue" before it."""
    return received.partition(b"\r\n\r\n")[2] if received.startswith(b"HTTP/1.1 100") else received


def _is_whole(received: bytes) -> bool:
    start, found, body = _final(received).partition(b"\r\n\r\n")
    if length := re.search(rb"\r\ncontent-length: *(\d+)", start.lower()):
        return bool(found) and len(body) >= int(length[1])
    return body.endswith(b"\r\n0\r\n\r\n")


def head(method: str, path: str, *headers: str, host: str = "localhost") -> bytes:
    """Returns the head of a request, after whose answer the connection is closed."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


def post(path: str, body: object, *headers: str) -> bytes:
    """Returns a POST request with the key."""
    if not isinstance(body, bytes | str):
        body = json.dumps(body)
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    own = (f"Authorization: Bearer {KEY}", "Content-Type: application/json", f"Content-Length: {len(raw)}")
    return head("POST", path, *own, *headers) + raw


def chat(content: object = "What?", **options: object) -> dict[str, Any]:
    """Returns the body of a chat."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 2} | options


def completion(prompt: object = "hi", **options: object) -> dict[str, Any]:
    """Returns the body of a completion."""
    return {"model": MODEL, "prompt": prompt, "max_tokens": 2} | options


def picture(kind: str = "PNG", size: tuple[int, int] = (48, 32), mode: str = "RGB", **options: object) -> bytes:
    """Returns the contents of a picture file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, kind, **options)
    return file.getvalue()


def data_url(contents: bytes) -> str:
    """Returns a data URL."""
    return f"data:image/png;base64,{base64.b64encode(contents).decode()}"


def resized_png(contents: bytes, width: int, height: int) -> bytes:
    """Returns a PNG file whose header states another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + contents[24:29]
    return contents[:12] + header + struct.pack(">I", zlib.crc32(header)) + contents[33:]

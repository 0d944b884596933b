"""Runs `llava serve`, asks it over HTTP, and computes what it must answer."""

import base64
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
from PIL import Image, ImageDraw

import llava
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.preprocess.inputs import ModelInput
from tests.command import start, wait_for_output

TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server, and a model in this process that computes what it must answer."""

    url: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    client: openai.OpenAI
    vlm: llava.Assistant
    name: str  # under which the model is served

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Sends a body, with the model's name unless it has one."""
        return self.http.post(path, json={"model": self.name, **body})

    def posted(self, path: str, **body: Any) -> dict[str, Any]:
        """Like `post`, and returns the body of a successful response."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, messages: list[Any], **options: Any) -> Any:
        """Asks with OpenAI's client: the most likely tokens unless `options` say otherwise."""
        options = {"model": self.name, "temperature": 0, **options}
        return self.client.chat.completions.create(messages=messages, **options)

    def complete(self, prompt: Any, **options: Any) -> Any:
        """Completes with OpenAI's client: the most likely tokens unless `options` say otherwise."""
        options = {"model": self.name, "temperature": 0, **options}
        return self.client.completions.create(prompt=prompt, **options)

    def prepared(self, messages: Any, adapter: str | None = None) -> ModelInput:
        """What the model must get for messages in our own form or a raw prompt, whose text is literal."""
        return self.vlm.engine.inputs.variant(adapter).preprocessor.prepare(messages, literal=True)

    def reply(self, input: ModelInput, *, adapter: str | None = None, **options: Any) -> Reply:
        """What the model must answer."""
        stream = self.vlm.engine.stream(input, SamplingParams.from_options(**options), adapter=adapter)
        for _ in stream:
            pass
        return stream.reply()

    def metric(self, name: str) -> float:
        """The value of a metric, or the sum over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        found = [line.rsplit(" ", 1)[1] for line in lines if re.split(r"[{ ]", line)[0] == name]
        assert found, name
        return sum(map(float, found))

    def waits_until(self, name: str, value: float) -> None:
        """Waits until a metric has a value."""
        end = time.monotonic() + TIMEOUT_S
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}"
            time.sleep(0.01)


@contextmanager
def serving(log: Path, vlm: llava.Assistant, name: str, *arguments: object) -> Iterator[Server]:
    """Runs `llava serve ARGUMENTS` on a free port until the block ends, and checks that it then exits well.

    log: file for what the server writes to stderr.
    """
    with log.open("wb") as errors:
        process = start("serve", "--port", "0", *arguments, stderr=errors)
    with process:
        try:
            line = wait_for_output(process, "\n")
            assert re.fullmatch(rf"llava: serving {re.escape(name)} at http://127\.0\.0\.1:\d+\n", line), line
            url = line.split()[-1]
            with (
                httpx.Client(base_url=url, timeout=TIMEOUT_S) as http,
                openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as client,
            ):
                yield Server(url=url, process=process, http=http, client=client, vlm=vlm, name=name)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=TIMEOUT_S)
            assert code == 0, f"exit code {code}"
            assert "Traceback" not in log.read_text()
        except Exception as error:
            raise AssertionError(f"{error}; stderr: {log.read_text()}") from error
        finally:
            process.kill()


def drawn(colour: str = "red", *, mode: str = "RGB", format: str = "PNG", size: tuple[int, int] = (160, 120)) -> bytes:
    """A file with a disc on white."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((40, 20, 110, 90), fill=colour)
    buffer = BytesIO()
    image.convert(mode).save(buffer, format)
    return buffer.getvalue()


def data_url(contents: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def picture(contents: bytes, **more: Any) -> dict[str, Any]:
    """A picture as OpenAI's clients send it."""
    return {"type": "image_url", "image_url": {"url": data_url(contents), **more}}


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}]


def ours(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in our own form."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] == "text":
            return one
        return {"type": "image", "image": base64.b64decode(one["image_url"]["url"].split(",")[1])}

    def message(one: dict[str, Any]) -> dict[str, Any]:
        content = one["content"]
        role = "system" if one["role"] == "developer" else one["role"]
        return {"role": role, "content": content if isinstance(content, str) else [part(each) for each in content]}

    return [message(one) for one in messages]

"""Other clients of OpenAI's API, and a fuzzer of OpenAPI schemas. Skipped where they are not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import Server, user

NPM_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none" });
const request = { model: "llava-tiny", messages: [{ role: "user", content: "Hello" }], temperature: 0, max_tokens: 8 };
const whole = await client.chat.completions.create(request);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...request, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
let status = 0;
try { await client.chat.completions.create({ ...request, model: "none" }); } catch (error) { status = error.status; }
console.log(JSON.stringify([whole.choices[0].message.content, text, status]));
"""


def test_the_npm_client_chats_streams_and_gets_errors(server: Server, tmp_path: Path) -> None:
    """The environment variable NODE_MODULES names a folder `node_modules` with the package openai."""
    modules = os.environ.get("NODE_MODULES")
    if shutil.which("node") is None or modules is None or not Path(modules, "openai").is_dir():
        pytest.skip("needs node, and NODE_MODULES with the npm package openai")
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "client.mjs").write_text(NPM_SCRIPT)
    environment = {**os.environ, "BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(
        ["node", "client.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    expected = server.chat(user("Hello"), max_tokens=8).choices[0].message.content
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected, expected, 404]


def test_langchain_invokes_streams_and_batches(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options = {"model": server.name, "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0}
    model = langchain.ChatOpenAI(**options, max_tokens=8)
    expected = server.chat(user("Hello"), max_tokens=8).choices[0].message.content
    reply = model.invoke("Hello")
    assert (reply.content, reply.usage_metadata["output_tokens"]) == (expected, 8)
    assert "".join(chunk.content for chunk in model.stream("Hello")) == expected
    assert [one.content for one in model.batch(["Hello", "Hello"])] == [expected, expected]


def test_schemathesis_finds_no_fault_of_the_server(server: Server) -> None:
    program = shutil.which("schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("schemathesis is not installed")
    options = ["--checks", "not_a_server_error", "--max-examples", "20", "--seed", "1", "--request-timeout", "60"]
    done = subprocess.run(
        [program, "run", f"{server.url}/openapi.json", *options], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"Selected: (\d+)/\1\s+Tested: \1\s", done.stdout), done.stdout  # all operations

"""Running a server: keys, addresses, logs, what it says while it loads and drains, and what it would need."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import llava
from llava.serve.access import Access
from llava.serve.logs import JsonFormatter
from tests.command import PROJECT, run, run_well, start, wait_for_output
from tests.serve.certificates import certificate
from tests.serving import TIMEOUT_S, Server, serving, user

KEYS = "first-key\n# a comment\n\nsecond-key\n"


@pytest.fixture(scope="module")
def vlm() -> llava.Assistant:
    return llava.load(device="cpu")


def body(**more: Any) -> dict[str, Any]:
    return {"model": "llava-tiny", "messages": user("Hello"), "max_tokens": 3, "temperature": 0} | more


def test_keys_come_from_a_file_and_the_environment_and_separate_caches(
    vlm: llava.Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, log = tmp_path / "keys", tmp_path / "log.jsonl"
    file.write_text(KEYS)
    monkeypatch.setenv("LLAVA_API_KEY", "third-key")
    options = ["--device", "cpu", "--api-key-file", file, "--log-file", log]
    with serving(tmp_path / "log", vlm, "llava-tiny", *options) as server:
        question = body(messages=user("Tell me about this long question " * 6))

        def cached(key: str) -> int:
            answer = server.http.post("/v1/chat/completions", json=question, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached(key) for key in ("first-key", "second-key", "third-key")] == [0, 0, 0]
        assert all(cached(key) > 0 for key in ("first-key", "second-key", "third-key"))
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first-key"},
            {"x-api-key": "first-key"},
        ):
            answer = server.http.post("/v1/chat/completions", json=body(), headers=header)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert server.http.get("/metrics").status_code == 401
        assert [server.http.get(path).status_code for path in ("/health", "/ready", "/version")] == [200] * 3
    logged = (tmp_path / "log").read_text() + log.read_text()
    assert all(json.loads(line)["status"] for line in log.read_text().splitlines())
    assert not any(text in logged for text in ("first-key", "second-key", "third-key", "long question"))


def test_keys_are_compared_in_the_same_time_whatever_they_have_in_common() -> None:
    key = "k" * 2000
    access = Access(host="127.0.0.1", keys=(key,))

    def seconds(given: str) -> float:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            with pytest.raises(llava.LlavaError):
                access.key_of(f"Bearer {given}")
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    nothing, almost = (seconds(given) for given in ("x" * 2000, key[:-1] + "x"))
    assert 0.5 < nothing / almost < 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--host", "0.0.0.0"], "no key is set"),
        (["--host", "::"], "no key is set"),
        (["--port", "70000"], "65535"),
        (["--host", "no-such-host.invalid", "--api-key-file", "keys"], "is no address of this machine"),
        (["--api-key-file", "missing"], "cannot be read"),
        (["--certificate", "missing.pem"], "needs both"),
        (["--certificate", "missing.pem", "--private-key", "missing.key"], "cannot be used"),
        (["--allow-origin", "example.org"], "expected SCHEME://HOST"),
        (["--allow-media-host", "https://example.org/"], "expected a host"),
        (["--log-file", "no/such/folder/log"], "cannot be written"),
        (["--json"], "--json is for --dry-run"),
        (["--dry-run", "--quantize", "int8"], "does not support quantization"),
        (["--model", "no-such-folder/model"], "no-such-folder"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments: list[str], problem: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    port = [] if "--port" in arguments else ["--port", "0"]
    done = run("serve", "--device", "cpu", *arguments, *port, cwd=tmp_path, env={**os.environ, "LLAVA_API_KEY": ""})
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_health_and_ready_tell_the_truth_while_it_loads_and_drains(tmp_path: Path) -> None:
    port = free_port()
    process = start("serve", "--port", str(port), "--device", "cpu", stderr=(tmp_path / "log").open("wb"))
    url, seen = f"http://127.0.0.1:{port}", set[tuple[int, int]]()
    with process, httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        end = time.monotonic() + TIMEOUT_S
        while (200, 200) not in seen and time.monotonic() < end:
            try:
                seen.add((http.get("/health").status_code, http.get("/ready").status_code))
                if (200, 503) in seen and (200, 200) not in seen:
                    answer = http.post("/v1/chat/completions", json=body())
                    assert answer.status_code in (200, 503)
            except httpx.ConnectError:
                time.sleep(0.02)
        assert seen == {(200, 503), (200, 200)}
        wait_for_output(process, "\n")

        answers: list[httpx.Response] = []
        long = body(max_tokens=250, messages=user("Tell me a story."), logit_bias={"2": -100})
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=long, timeout=TIMEOUT_S))
        )
        asking.start()
        while "llava_num_requests_running 1.0" not in http.get("/metrics").text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while (code := http.get("/ready").status_code) == 200:
            time.sleep(0.005)
        assert code == 503
        refused = http.post("/v1/chat/completions", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        asking.join(TIMEOUT_S)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 250
        assert process.wait(TIMEOUT_S) == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_logs_have_prompts_only_if_asked(vlm: llava.Assistant, tmp_path: Path) -> None:
    file, message = tmp_path / "log", 'A secret\n{"level": "error"}'
    with serving(tmp_path / "stderr", vlm, "llava-tiny", "--device", "cpu", "--log-file", file, "--log-prompts") as one:
        headers = {"x-request-id": "my-id"}
        answer = one.http.post("/v1/chat/completions", json=body(messages=user(message)), headers=headers)
        assert answer.headers["x-request-id"] == "my-id"
        bad = one.http.get("/v1/models/none", headers={"x-request-id": "bad id\x7f"})
        assert bad.headers["x-request-id"].startswith("req-")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    prompts, request = [one for one in lines if one.get("request_id") == "my-id"]
    assert (request["method"], request["route"], request["status"]) == ("POST", "/v1/chat/completions", 200)
    assert message in prompts["prompts"][0]


def test_a_log_line_is_one_line_whatever_it_contains() -> None:
    import logging

    record = logging.makeLogRecord({"msg": "a\r\nb %s", "args": ("\x1b[31m\u2028",), "key": {"x": "\n"}})
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\r\nb \x1b[31m\u2028"


def test_a_full_disk_for_logs_stops_nothing(vlm: llava.Assistant, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with serving(tmp_path / "stderr", vlm, "llava-tiny", "--device", "cpu", "--log-file", "/dev/full") as server:
        for _ in range(3):
            assert server.post("/v1/chat/completions", **body()).status_code == 200
    assert (tmp_path / "stderr").read_text().count("\n") <= 1  # that no --model was given


LIMITED = """
import sys
import llava
from llava.serve.access import Access
from llava.serve.limits import Limits
from llava.serve.server import run
from llava.serve.settings import Settings

certificate, key = sys.argv[2:] or (None, None)
limits = Limits(connections=5, head_s=float(sys.argv[1]))
settings = Settings(
    name="tiny", access=Access(host="127.0.0.1"), port=0, limits=limits, certificate=certificate, private_key=key
)
run(lambda: llava.load(device="cpu"), settings)
"""


def test_a_connection_without_a_request_is_closed(tmp_path: Path) -> None:
    """Also one whose request never ends, and those beyond the limit."""
    with subprocess.Popen([sys.executable, "-c", LIMITED, "0.5"], stdout=subprocess.PIPE, cwd=PROJECT) as process:
        url = wait_for_output(process, "\n").split()[-1]
        port = int(url.rsplit(":", 1)[1])

        def closed_after(head: bytes, before: bytes = b"") -> float:
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as one:
                if before:
                    one.sendall(before)
                    assert one.recv(1000).startswith(b"HTTP/1.1 200")
                one.sendall(head)
                started = time.monotonic()
                while one.recv(1000):
                    pass
            return time.monotonic() - started

        try:
            whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert 0.3 < closed_after(b"") < 10
            assert 0.3 < closed_after(whole[:30]) < 10
            assert 0.3 < closed_after(whole[:30], before=whole) < 10
            several = [socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) for _ in range(5)]
            assert closed_after(b"") < 0.3
            for one in several:
                one.close()
            time.sleep(0.1)
            assert httpx.get(f"{url}/health").status_code == 200
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server has closed a connection, and returns whether it sent nothing before."""
    with suppress(ConnectionError):  # it may be reset
        return not connection.recv(1000)
    return True


def test_connections_without_a_tls_handshake_are_limited_and_closed(tmp_path: Path) -> None:
    """Those beyond the limit at once, the others after `head_s`. Others are answered meanwhile, and afterwards."""
    head_s, (file, key) = 3.0, certificate(tmp_path, "localhost")
    arguments = [sys.executable, "-c", LIMITED, str(head_s), str(file), str(key)]
    context = ssl.create_default_context(cafile=str(file))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=PROJECT) as process, ExitStack() as stack:
        url = wait_for_output(process, "\n").split()[-1].replace("127.0.0.1", "localhost")
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))

        def opened(n: int, sent: bytes) -> list[socket.socket]:
            several = [socket.create_connection(address, timeout=TIMEOUT_S) for _ in range(n)]
            for one in several:
                stack.enter_context(one)
                with suppress(ConnectionError):  # it may be closed already
                    one.sendall(sent)
            return several

        try:
            for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):  # nothing, and the first bytes of a handshake
                started = time.monotonic()
                several = opened(4, sent)
                assert httpx.get(f"{url}/health", verify=context).status_code == 200
                time.sleep(0.1)
                several += opened(40, sent)
                assert all(map(is_closed, several[5:]))
                assert time.monotonic() - started < head_s
                assert all(map(is_closed, several[:5]))
                assert head_s - 0.5 < time.monotonic() - started < head_s + 10
            for one in opened(20, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):  # it is no handshake
                is_closed(one)
            with socket.create_connection(address, timeout=TIMEOUT_S) as raw:
                silent = context.wrap_socket(raw, server_hostname="localhost")  # and no request after it
                assert is_closed(silent)
            assert httpx.get(f"{url}/health", verify=context).status_code == 200
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def test_https_is_served_with_a_certificate(vlm: llava.Assistant, tmp_path: Path) -> None:
    file, key = certificate(tmp_path, "localhost")
    process = start("serve", "--port", "0", "--device", "cpu", "--certificate", file, "--private-key", key)
    with process:
        line = wait_for_output(process, "\n")
        url = line.split()[-1].replace("127.0.0.1", "localhost")
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(file))
        assert httpx.get(f"{url}/ready", verify=context).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_a_dry_run_prints_what_is_needed_and_serves_nothing(vlm: llava.Assistant) -> None:
    plan = json.loads(run_well("serve", "--dry-run", "--json", "--device", "cpu").stdout)
    assert plan["weight_bytes"] == sum(one.nbytes for one in vlm.model.parameters())
    assert plan["context"] == vlm.config.decoder.max_seq
    assert plan["cache_tokens"] == vlm.engine.inputs.capacity
    text = run_well("serve", "--dry-run", "--device", "cpu", "--max-batch", "4").stdout
    assert "sequences: 4 at once" in text
    assert text.startswith("llava-tiny, in float32 on cpu")


def test_a_second_server_on_a_port_says_that_it_is_taken(server: Server) -> None:
    done = run("serve", "--port", server.url.rsplit(":", 1)[1], "--device", "cpu")
    assert done.returncode == 2
    assert "in use" in done.stderr


def test_the_load_generator_measures_a_server(server: Server) -> None:
    options = ["--model", "llava-tiny", "--requests", "6", "--max-tokens", "5", "--pictures", "1"]
    found = json.loads(run_well("bench-serve", server.url, *options, "--concurrency", "3", "--json").stdout)
    assert (found["requests"], found["errors"]) == (6, 0)
    assert found["requests_per_s"] == pytest.approx(6 / found["seconds"], rel=0.01)
    assert 0 < found["first_token_ms"]["p50"] <= found["total_ms"]["p95"]
    text = run_well("bench-serve", server.url, *options, "--rate", "50").stdout
    assert "first_token_ms" in text
    done = run("bench-serve", server.url, "--model", "none", "--requests", "2")
    assert done.returncode == 2
    assert "status 404" in done.stderr

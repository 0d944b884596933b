"""Faults of the machine: steps that fail, memory that runs out, logs that cannot be written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import llava
from llava.serve.access import Access
from llava.serve.app import create
from llava.serve.limits import Limits
from llava.serve.settings import Settings
from tests.hostile import COMPLETION, MODEL, completion, served, wait_until


class Faulty:
    """A served model, some of whose steps fail."""

    def __init__(self, vlm: llava.Assistant, client: TestClient):
        self.vlm, self.client = vlm, client
        self._wait, self._left = 0, 0
        self._error: Exception = RuntimeError("a fault")
        vlm.model.decoder.register_forward_pre_hook(lambda *_: self._step())

    def _step(self) -> None:
        if self._wait:
            self._wait -= 1
        elif self._left:
            self._left -= 1
            raise self._error

    def fail(self, error: Exception, *, after: int = 0, times: int = 1) -> None:
        """Lets steps fail, after some that do not."""
        self._wait, self._left, self._error = after, times, error

    def complete(self, prompt: object, **options: object) -> tuple[int, Any]:
        """Returns the status and the choices, or the error."""
        answer = self.client.post(COMPLETION, json=completion(prompt, temperature=0, **options))
        body = answer.json()
        return answer.status_code, body.get("choices", body.get("error"))


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    """llava-tiny, served in this process so that its steps can be made to fail."""
    vlm = llava.load(device="cpu")
    settings = Settings(name=MODEL, access=Access(host="127.0.0.1"), limits=Limits(requests=8))
    with TestClient(create(lambda: vlm, settings), base_url="http://localhost") as client:
        assert wait_until(lambda: client.get("/ready").status_code == 200)
        yield Faulty(vlm, client)


ERRORS = [RuntimeError("secret"), torch.OutOfMemoryError("CUDA out of memory; secret"), MemoryError("secret")]


def test_requests_whose_common_step_fails_are_computed_one_by_one(faulty: Faulty) -> None:
    options = {"max_tokens": 30, "logit_bias": {"2": -100}}
    expected = faulty.complete(["a", "the house"], **options)
    assert expected[0] == 200
    for error in ERRORS:
        faulty.fail(error, after=10)
        assert faulty.complete(["a", "the house"], **options) == expected


def test_a_request_that_fails_alone_is_the_only_one_to_fail_and_tells_no_secrets(faulty: Faulty) -> None:
    expected = faulty.complete("a", max_tokens=30)
    for error in ERRORS:
        faulty.fail(error, times=1)
        status, told = faulty.complete("b", max_tokens=30)
        assert (status, told["message"]) == (500, "the server failed to answer this request")
        assert faulty.client.get("/health").status_code == 200
        assert faulty.complete("a", max_tokens=30) == expected


def test_an_engine_that_stops_ends_all_requests_and_health_says_so(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(faulty.vlm.engine, "step", fail)
    for status, error in (faulty.complete("a"), faulty.complete("b")):
        assert (status, error["message"]) == (503, "the engine has stopped; restart the server")
    assert faulty.client.get("/health").status_code == 503
    assert faulty.client.get("/ready").status_code == 503


def test_a_full_queue_is_429_and_has_room_again(faulty: Faulty) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(faulty.client.post, COMPLETION, json=_long()) for _ in range(4)]
    statuses = sorted(one.result().status_code for one in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    busy = next(one.result() for one in answers if one.result().status_code == 429)
    assert busy.headers["retry-after"] == "1"
    assert busy.json()["error"]["code"] == "queue_full"
    assert faulty.complete(["a"] * 8)[0] == 200


def _long() -> dict[str, Any]:
    return completion(["a"] * 4, max_tokens=100, logit_bias={"2": -100})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_logs_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    with served(tmp_path / "log", "--log-file", "/dev/full") as victim:
        expected = victim.honest()
        for _ in range(20):
            assert victim.post(COMPLETION, {"model": "x"}).status == 400
        assert victim.honest() == expected
        victim.assert_unharmed()

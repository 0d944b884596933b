"""Inputs that threads prepare arrive in order, with the errors of their requests, and never all at once."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava
from llava.engine.prefetch import Prefetch, n_preparing_threads
from llava.errors import ImageError


def slow_square(x: int) -> int:
    time.sleep(0.02 if x % 3 == 0 else 0.001)
    if x == 5:
        raise ImageError("five")
    return x * x


@pytest.mark.parametrize("n_threads", [0, 1, 4])
def test_inputs_arrive_in_order_and_an_error_where_it_belongs(n_threads: int) -> None:
    with Prefetch(slow_square, range(20), n_threads=n_threads, n_ahead=6) as prefetch:
        for x in range(20):
            if x == 5:
                with pytest.raises(ImageError, match="five"):
                    prefetch.take()
            else:
                assert prefetch.take().input == x * x


def test_only_so_many_inputs_are_prepared_ahead() -> None:
    prepared: list[int] = []
    with Prefetch(lambda x: prepared.append(x), range(100), n_threads=2, n_ahead=3) as prefetch:
        time.sleep(0.05)
        assert sorted(prepared) == [0, 1, 2]
        assert prefetch.is_ready
        prefetch.take()
        time.sleep(0.05)
        assert sorted(prepared) == [0, 1, 2, 3]


def test_the_end_of_the_context_stops_the_threads() -> None:
    before = threading.active_count()
    with Prefetch(slow_square, range(1000), n_threads=3, n_ahead=50) as prefetch:
        prefetch.take()
    assert threading.active_count() == before


def test_without_threads_nothing_is_prepared_before_it_is_taken() -> None:
    prepared: list[int] = []
    prefetch = Prefetch(lambda x: prepared.append(x), range(3), n_threads=0, n_ahead=3)
    assert prefetch.is_ready
    assert prepared == []


def test_one_request_is_prepared_without_threads() -> None:
    assert [n_preparing_threads(n) for n in (0, 1)] == [0, 0]


def test_replies_do_not_depend_on_the_threads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = llava.load(checkpoint, device="cpu", dtype="float32")
    requests: list[Any] = []
    for i in range(9):
        Image.new("RGB", (40 + i, 30), (25 * i, 80, 10)).save(tmp_path / f"{i}.png")
        requests.append((f"<image> What is in picture {i}?", [tmp_path / f"{i}.png"]))
    expected = [reply.token_ids for reply in vlm.generate_batch(requests, max_new_tokens=6)]
    original = vlm.engine.inputs.prefetch

    def with_threads(inputs: Any, adapter: Any, *, template: Any = None, n_ahead: int) -> Any:
        prefetch = original(inputs, adapter, template=template, n_ahead=n_ahead)
        return Prefetch(prefetch._prepare, inputs, n_threads=3, n_ahead=n_ahead)

    monkeypatch.setattr(vlm.engine.inputs, "prefetch", with_threads)
    assert [reply.token_ids for reply in vlm.generate_batch(requests, max_new_tokens=6)] == expected
    requests[4] = ("<image>", [tmp_path / "none.png"])
    with pytest.raises(ImageError, match=r"none\.png: no such image file"):
        vlm.generate_batch(requests, max_new_tokens=2)
    assert not vlm.engine.has_requests

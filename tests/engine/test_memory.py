"""The memory of the cache: what `cache_memory` accepts, and what a small cache does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.config import EngineOptions
from llava.engine.memory import free_bytes, n_pages
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, PromptError
from tests.command import assert_one_line_error, run, run_well
from tests.oracles.test_transformers import PICTURE, PROMPT

CPU = torch.device("cpu")
PAGE = 16 * 2 * 2 * 64 * 4  # bytes of 16 tokens in `checkpoint`: keys and values, 2 layers, 64 values of float32


def opened(folder: Path, **engine: Any) -> llava.Assistant:
    return llava.load(folder, dtype="float32", device="cpu", engine=EngineOptions(**engine))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (4096, 4096),
        (2, 2),
        ("4096", 4096),
        ("10B", 10),
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        (" 1.5KiB ", 1536),
        ("2TiB", 2**41),
        (0.9, 900),
        ("0.9", 900),
        (1.0, 1000),
        ("1.0", 1000),
    ],
)
def test_memory_is_a_number_of_bytes_a_size_or_a_fraction_of_what_is_free(
    value: int | float | str | None, expected: int | None
) -> None:
    assert EngineOptions(cache_memory=value).cache_bytes(1000) == expected


@pytest.mark.parametrize(
    "value", [0, 1, -1, 0.0, -0.5, 1.5, float("nan"), True, "0", "1", "-5", "abc", "", "1e9", "8GiBs", "0.0", "1.5"]
)
def test_other_memory_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cache_memory is {value!r}; expected a number of bytes")):
        EngineOptions(cache_memory=value)


def test_engine_options_are_frozen_and_keyword_only() -> None:
    for options in (llava.EngineOptions(max_batch=3), llava.SamplingParams(max_new_tokens=3)):
        with pytest.raises(AttributeError):
            options.temperature = 1  # type: ignore[union-attr]
        with pytest.raises(TypeError):
            type(options)(3)  # type: ignore[call-arg, misc]


def test_pages_and_their_dense_copies_stay_within_the_memory(checkpoint: Path) -> None:
    """On a CPU, decoding rows are copied, except in the batch-invariant mode."""
    config = llava.load(checkpoint, device="cpu").config.decoder
    for invariant, expected in ((False, 4), (True, 8)):
        options = EngineOptions(cache_memory=8 * PAGE + 100, batch_invariant=invariant)
        assert n_pages(config, options, torch.float32, CPU) == expected
    with pytest.raises(ConfigError, match=f"is {2 * PAGE - 1}, less than the {2 * PAGE} bytes of a page"):
        n_pages(config, EngineOptions(cache_memory=2 * PAGE - 1), torch.float32, CPU)
    with pytest.raises(ConfigError, match="GiB are free; lower it"):
        n_pages(config, EngineOptions(cache_memory=free_bytes(CPU) + 2**32), torch.float32, CPU)


def test_requests_end_at_the_end_of_a_small_cache(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    vlm = opened(checkpoint, cache_memory=6 * PAGE)
    assert "the cache holds 48 tokens, fewer than the model's context of 4096" in caplog.text
    expected = opened(checkpoint).generate(PROMPT, max_new_tokens=100).token_ids
    n_prompt = len(vlm.prepare(PROMPT).ids)
    for reply in vlm.generate_batch([PROMPT] * 3, max_new_tokens=100):
        assert (reply.token_ids, reply.finish_reason) == (expected[: 48 - n_prompt], "length")
    with pytest.raises(
        PromptError, match=r"no room for a reply in the cache of 48 tokens; shorten the prompt, or raise"
    ):
        vlm.ask(PICTURE, PROMPT)
    vlm.engine.check()


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--cache-memory", "abc"), "--cache-memory is 'abc'; expected"),
        (("--cache-memory", "0"), "--cache-memory is '0'; expected"),
        (("--cache-memory", "5"), "--cache-memory is '5', less than"),
        (("--cache-memory", "900TiB"), "--cache-memory is '900TiB', but only"),
        (("--max-batch", "0"), "--max-batch is 0; expected"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_wrong_options_of_the_commands_are_refused_in_one_line(
    checkpoint: Path, command: str, arguments: tuple[str, str], mentions: str
) -> None:
    words = ("Hello",) if command == "ask" else ()
    assert_one_line_error(run(command, "--model", checkpoint, *arguments, *words, stdin=b"Hello\n"), mentions)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-invariant", "--max-batch", "1"),
        ("--cache-memory", "64MiB"),
        ("--cache-memory", "0.1"),
        ("--no-graphs",),
    ],
    ids=" ".join,
)
def test_the_commands_take_the_options_of_the_engine(checkpoint: Path, arguments: tuple[str, ...]) -> None:
    options = ("--model", checkpoint, "--max-new-tokens", 5, "--temperature", 0, "--device", "cpu")
    expected = run_well("ask", *options, "Hello").stdout
    assert run_well("ask", *options, *arguments, "Hello").stdout == expected
    assert run_well("chat", *options, *arguments, stdin=b"Hello\n").stdout == expected


def test_a_prompt_that_exceeds_a_small_cache_is_refused_with_the_name_of_the_option(checkpoint: Path) -> None:
    done = run("ask", "--model", checkpoint, "--dtype", "float32", "--cache-memory", 4 * PAGE, "Hello " * 40)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("shorten the prompt, or raise --cache-memory")


def test_dense_copies_of_rows_that_grow_and_end_never_exceed_the_pages(checkpoint: Path) -> None:
    """Rows of many lengths; each length has its own dense tensors, whose memory is only given back when dropped."""
    vlm = opened(checkpoint, cache_memory=2 * 512 * PAGE, max_batch=64, prefix_cache=False)
    engine, lengths = vlm.engine, (3, 90, 10, 200, 30)
    for i in range(60):
        engine.add_request("sea " * lengths[i % 5] + str(i), SamplingParams(max_new_tokens=10 + 7 * (i % 9)))
    used = []
    while engine.has_requests:
        engine.step()
        caches = [cache for dense in engine.runner.dense.values() for cache in dense._by_size.values()]
        used.append(sum(cache.n_touched * cache.k.shape[3] for cache in caches))
    capacity = engine.blocks.n_pages * engine.blocks.page_size
    assert capacity // 4 < max(used) <= capacity

"""Requests of several adapters in one batch get the replies that each adapter gives alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llava
from llava.assistant import Assistant, question_about
from llava.config import EngineOptions
from llava.engine.adapters import join
from llava.engine.engine import Request
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError
from tests import tiny

pytestmark = pytest.mark.usefixtures("overlap")

FLOAT32: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
NAMES = ("cats", "dogs.v1.5", "june", "stage1")
PICTURE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
OTHER = PICTURE.rotate(90, expand=True)
TEXT = "Once upon a time there was a painter who would only ever paint the sea."
TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@pytest.fixture(scope="module")
def folders(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and adapters with different ranks, layers, vocabularies and RoPE, one of them a projector only."""
    root = tmp_path_factory.mktemp("adapters")
    longer = {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    stretched = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 1024}
    cats = tiny.write_lora(root / "cats", clip=clip)
    pairs = torch.load(cats / "adapter_model.bin")  # only the second block, and rank 2 instead of 4
    kept = {name: pair[:2] if "lora_A" in name else pair[:, :2] for name, pair in pairs.items() if "layers.1" in name}
    narrow = tiny.write_lora(root / "narrow", clip=clip, seed=4)
    torch.save(kept, narrow / "adapter_model.bin")
    tiny.edit_json(narrow / "adapter_config.json", r=2)
    return {
        "base": tiny.write_llama(root / "base"),
        "llava": tiny.write_llava(root / "llava", clip=clip),
        "cats": cats,
        "dogs.v1.5": tiny.write_lora(root / "dogs", clip=clip, seed=5, targets=("k_proj", "down_proj")),
        "june": tiny.write_lora(root / "june", clip=clip, seed=6, added=TOKENS, rows=True, **longer),
        "narrow": narrow,
        "stretched": tiny.write_lora(root / "stretched", clip=clip, seed=9, **stretched),
        "stage1": tiny.write_projector(root / "stage1", clip=clip, seed=8, start_end=True),
    }


def on(folders: Mapping[str, Path], *names: str, base: str = "llava", **engine: Any) -> Assistant:
    adapters = {name: folders[name] for name in names}
    return llava.load(folders[base], adapters=adapters, engine=EngineOptions(**engine), **FLOAT32)


def asked(adapters: tuple[str | None, ...]) -> list[tuple[str | None, Request]]:
    """Returns requests of all adapters, in turn."""
    questions: list[Request] = [
        question_about(PICTURE, "What is in the picture?"),
        TEXT,
        (f"<image>\n{TEXT}", [OTHER]),
        question_about(PICTURE, "What is in the picture? Which colours do you see?"),
    ]
    return [(adapter, question) for question in questions for adapter in adapters]


def replies(vlm: Assistant, requests: list[tuple[str | None, Request]], params: SamplingParams) -> list[list[int]]:
    """Runs the requests in one batch. Returns the ids of their replies."""
    engine = vlm.engine
    numbers = [engine.add_request(request, params, adapter=adapter) for adapter, request in requests]
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_requests:
        for output in engine.step():
            assert output.error is None
            ids[output.request] += output.token_ids
    engine.check()
    return [ids[number] for number in numbers]


def alone(
    folders: Mapping[str, Path], requests: list[tuple[str | None, Request]], params: SamplingParams
) -> list[list[int]]:
    """Returns the replies of checkpoints loaded one by one, with their LoRAs merged."""
    found: dict[int, list[int]] = {}
    for adapter in {adapter for adapter, _ in requests}:
        base = folders["llava"]
        vlm = llava.load(folders[adapter], base=base, **FLOAT32) if adapter else llava.load(base, **FLOAT32)
        for i, (name, request) in enumerate(requests):
            if name == adapter:
                found[i] = vlm.engine.generate([request], params)[0].token_ids
    return [found[i] for i in range(len(requests))]


ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunked prefill": {"chunk_tokens": 7, "max_batch": 5, "page_size": 4},
    "no prefix cache": {"prefix_cache": False},
    "small pages": {"page_size": 1, "chunk_tokens": 64},
    "a tight cache": {"page_size": 8, "cache_memory": 400 * 1024},
    "batch-invariant": {"batch_invariant": True, "chunk_tokens": 50},
}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> list[list[int]]:
    return alone(folders, asked((*NAMES, None, "narrow", "stretched")), SamplingParams(max_new_tokens=8))


@pytest.mark.parametrize("case", ENGINES)
def test_adapters_in_one_batch_reply_like_merged_ones_alone(
    folders: dict[str, Path], expected: list[list[int]], case: str
) -> None:
    vlm = on(folders, *NAMES, "narrow", "stretched", **ENGINES[case])
    requests = asked((*NAMES, None, "narrow", "stretched"))
    params = SamplingParams(max_new_tokens=8)
    assert replies(vlm, requests, params) == expected
    assert replies(vlm, requests, params) == expected  # with what is now in the prefix cache and the feature cache


def test_adapters_that_compute_in_another_way_are_in_other_groups(folders: dict[str, Path]) -> None:
    vlm = on(folders, *NAMES, "narrow", "stretched")
    groups = [set(joined.names) for joined in join(vlm.engine.variants)]
    assert {None, "cats", "dogs.v1.5", "june", "narrow", "stage1"} in groups
    assert {"stretched"} in groups


def test_an_adapter_reuses_neither_the_pages_nor_the_features_of_another(folders: dict[str, Path]) -> None:
    vlm = on(folders, "cats", "dogs.v1.5", page_size=4)
    params = SamplingParams(max_new_tokens=2)
    question = question_about(PICTURE, "What is in the picture?")
    for adapter in ("cats", "dogs.v1.5", None):
        replies(vlm, [(adapter, question)], params)
    first = vlm.engine.stats()
    assert (first.prefix_hit_tokens, first.feature_hits) == (0, 0)
    replies(vlm, [("cats", question)], params)
    assert vlm.engine.stats().prefix_hit_tokens > 0


def test_logprobs_are_bit_equal_alone_and_beside_other_adapters(folders: dict[str, Path]) -> None:
    names = ("cats", "dogs.v1.5", "june")
    requests = asked((*names, None))
    params = SamplingParams(max_new_tokens=6, logprobs=3)

    def logprobs(together: bool) -> list[Any]:
        vlm = on(folders, *names, batch_invariant=True, prefix_cache=False, chunk_tokens=40 if together else None)
        streams = []
        for adapter, request in requests:
            streams.append(vlm.engine.stream(request, params, adapter=adapter))
            if not together:
                list(streams[-1])
        for stream in streams:
            list(stream)
        found = [stream.reply() for stream in streams]
        return [(reply.token_ids, reply.logprobs, reply.top_logprobs) for reply in found]

    assert logprobs(together=True) == logprobs(together=False)


def test_an_adapter_is_limited_by_its_own_context(folders: dict[str, Path]) -> None:
    vlm = on(folders, "stretched")
    long = "sea " * 2040
    n_prompt = vlm.engine.inputs.prepare(long).ids.numel()
    params = SamplingParams(max_new_tokens=20)
    assert [len(ids) for ids in replies(vlm, [(None, long), ("stretched", long)], params)] == [20, 2048 - n_prompt]


def test_an_unknown_adapter_is_refused_when_the_request_is_added(folders: dict[str, Path]) -> None:
    vlm = on(folders, "cats")
    with pytest.raises(ConfigError, match="unknown adapter 'birds'; available: cats"):
        vlm.engine.add_request(TEXT, adapter="birds")
    assert not vlm.engine.has_requests


def test_adapters_of_an_mpt_share_a_batch(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "base", clip=clip)
    adapters = {f"seed{seed}": tiny.write_mpt_lora(tmp_path / f"{seed}", base=base, seed=seed) for seed in (3, 4)}
    vlm = llava.load(base, adapters=adapters, engine=EngineOptions(chunk_tokens=40), **FLOAT32)
    requests = asked(("seed3", None, "seed4"))
    params = SamplingParams(max_new_tokens=6)
    expected = alone({**adapters, "llava": base}, requests, params)
    assert len({tuple(ids) for ids in expected[:3]}) == 3
    assert replies(vlm, requests, params) == expected
    assert len(join(vlm.engine.variants)) == 1

"""Beam search returns the ids that transformers' generate returns, for random models whose beams differ."""

import functools
import random
from collections.abc import Collection

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava.engine.beam import BeamSearch
from llava.errors import LlavaError

VOCABULARY = 48


@functools.cache
def model(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=(0.3, 0.6, 1.0)[seed % 3],  # from flat to peaked distributions
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def expected(llama: LlamaForCausalLM, prompt: list[int], k: int, stops: list[int], limit: int) -> list[int]:
    ids = llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=k,
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=stops or None,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


@torch.inference_mode()
def search(llama: LlamaForCausalLM, prompt: list[int], k: int, stops: Collection[int], limit: int) -> BeamSearch:
    """Runs the whole sequence of each live beam in every step, and checks that beams continue their parents."""
    beams = BeamSearch(k, stops, limit)
    while not beams.finished:
        before = beams.live
        logits = llama(torch.tensor([[*prompt, *ids] for ids in before])).logits[:, -1]
        new = beams.advance(logits.float().log_softmax(-1))
        if not beams.finished:
            assert beams.live == [[*before[parent], id] for parent, id in new]
    return beams


def stops_of(kind: str, llama: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """Ids that end a reply: none, some that a greedy reply contains, an arbitrary one, or a quarter of all."""
    greedy = expected(llama, prompt, 1, [], 12)
    likely = list(dict.fromkeys(greedy))
    many = list(range(prompt[0] % 4, VOCABULARY, 4))
    return {"none": [], "likely": likely[-1:], "several": likely[-3:], "first": greedy[:1], "other": [7], "many": many}[
        kind
    ]


@pytest.mark.parametrize("stops", ["none", "likely", "several", "first", "other", "many"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_ids_equal_those_of_transformers(k: int, stops: str) -> None:
    ended = 0
    for seed in range(6):
        chance, llama = random.Random(seed), model(seed)
        for limit in (1, 2, chance.randint(3, 9), chance.randint(10, 20)):
            prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 9))]
            ids = stops_of(stops, llama, prompt)
            reply = search(llama, prompt, k, ids, limit).best()
            assert reply == expected(llama, prompt, k, ids, limit), (seed, prompt, limit)
            ended += reply[-1] in ids
    assert ended or stops in ("none", "other")  # replies do end at a stop id


@pytest.mark.parametrize("vocabulary", [11, 12, 24])
def test_ids_equal_those_of_transformers_for_a_vocabulary_about_as_large_as_the_number_of_candidates(
    vocabulary: int,
) -> None:
    for seed in range(6):
        llama, prompt = model(seed, vocabulary), [seed, 1, 2]
        for k, stops in ((5, [3]), (3, [2, 3, 5]), (2, [0, 1, 2, 3])):
            assert search(llama, prompt, k, stops, 10).best() == expected(llama, prompt, k, stops, 10)


def test_one_beam_is_greedy() -> None:
    for seed in range(6):
        prompt = [seed, 5, 9]
        assert search(model(seed), prompt, 1, [4], 12).best() == expected(model(seed), prompt, 1, [4], 12)


def test_beams_find_a_reply_that_greedy_search_misses() -> None:
    """The likelier first token leads to an even distribution, the other one to a certain token."""
    first = torch.tensor([[0.6, 0.4, 1e-9, 1e-9]]).log()
    second = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1e-9, 1e-9, 1.0, 1e-9]]).log()
    beams = BeamSearch(2, [], 2)
    assert beams.advance(first) == [(0, 0), (0, 1)]
    assert beams.advance(second) == []
    assert beams.finished
    assert beams.best() == [1, 2]


def test_all_beams_stay_live_where_most_of_the_best_candidates_end() -> None:
    beams = BeamSearch(2, [0, 1, 2], 10)
    assert beams.advance(torch.tensor([[-2.0, -3.0, -4.0, -1.0, -5.0, -6.0]])) == [(0, 3), (0, 4)]


def test_only_the_best_candidates_of_a_step_become_hypotheses() -> None:
    """The end token ranks third of all candidates; as a hypothesis of two beams, it would be the best reply so far."""
    beams = BeamSearch(2, [0], 10)
    beams.advance(torch.tensor([[-3.0, -1.0, -2.0, -4.0]]))
    assert beams.best() == [1]
    beams.advance(torch.tensor([[-1.0, -3.0, -2.0, -4.0], [-9.0, -9.0, -9.0, -9.0]]))
    assert beams.best() == [1, 0]


def test_no_tokens_are_generated_when_none_are_wanted() -> None:
    beams = BeamSearch(3, [2], 0)
    assert beams.finished
    assert beams.best() == []


def test_an_unfinished_search_returns_its_best_beam() -> None:
    beams = BeamSearch(2, [0], 10)
    beams.advance(torch.tensor([[-9.0, -3.0, -1.0, -2.0]]))
    assert not beams.finished
    assert beams.best() == [2]


def test_banned_tokens_make_no_beams() -> None:
    ban = -torch.inf
    beams = BeamSearch(3, [0], 10)
    assert beams.advance(torch.tensor([[ban, -1.0, ban, ban, ban]])) == [(0, 1)]
    assert beams.advance(torch.tensor([[ban, ban, -1.0, -2.0, ban]])) == [(0, 2), (0, 3)]
    assert beams.advance(torch.tensor([[-1.0, ban, ban, ban, ban], [ban] * 5])) == []
    assert beams.finished
    assert beams.best() == [1, 2, 0]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (torch.full((1, 6), -torch.inf), "no token is allowed"),
        (torch.tensor([[-1.0, torch.nan, -2.0]]), "the logits contain NaN"),
    ],
)
def test_a_search_that_cannot_go_on_is_an_error(logprobs: Tensor, message: str) -> None:
    with pytest.raises(LlavaError, match=message):
        BeamSearch(2, [0], 5).advance(logprobs)

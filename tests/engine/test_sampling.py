"""The next token: options against transformers' processors, draws against the softmax, batches against single rows."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava.engine.sampling import RowError, gumbel_noise, process, sample, top_logprobs, warp
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError


@dataclass
class Row:
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    n_generated: int = 0
    prompt_ids: Sequence[int] = ()
    reply_ids: Sequence[int] = ()


def row(
    seed: int = 0, n_generated: int = 0, prompt: Sequence[int] = (), reply: Sequence[int] = (), **options: Any
) -> Row:
    return Row(SamplingParams(**options), seed, n_generated, prompt, reply)


def random_logits(seed: int, rows: int, vocabulary: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4


# ------------------------------------------------------------------------------------------------ options


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-4},
    {"temperature": 1e6},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 700},
    {"temperature": 1.0, "top_k": 10**9},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 1e6, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.9, "repetition_penalty": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


def expected_weights(logits: Tensor, ids: list[int], params: SamplingParams) -> Tensor:
    """What transformers samples from: logits [1, V] -> [1, V]."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([ids]), logits)


@pytest.mark.parametrize("vocabulary", [3, 1000, 1021])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_equal_those_of_transformers(options: dict[str, Any], vocabulary: int) -> None:
    chance = random.Random(0)
    rows = [
        row(prompt=chance.choices(range(vocabulary), k=20), reply=chance.choices(range(vocabulary), k=10), **options)
        for _ in range(16)
    ]
    logits = random_logits(1, 16, vocabulary)
    processed = process(logits, rows)
    weights = warp(processed, processed.amax(-1), [r.params for r in rows])
    for i, r in enumerate(rows):
        want = expected_weights(logits[i : i + 1], [*r.prompt_ids, *r.reply_ids], r.params)[0]
        assert torch.equal(weights[i] == -torch.inf, want == -torch.inf)
        torch.testing.assert_close(weights[i].softmax(-1), want.softmax(-1), rtol=2e-5, atol=1e-12)


def test_repetition_penalty_ignores_images_and_ids_beyond_the_vocabulary() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    result = process(logits, [row(prompt=[-200, 0, 0, 4, 99], reply=[1], repetition_penalty=2.0)])
    assert result.tolist() == [[1.0, -4.0, 1.0, 0.5]]


def test_presence_and_frequency_penalties_count_the_tokens_of_the_reply() -> None:
    logits = torch.zeros(1, 5)
    r = row(prompt=[0, 0], reply=[1, 2, 2, 2, 7, -200], presence_penalty=0.5, frequency_penalty=0.25)
    assert process(logits, [r]).tolist() == [[0.0, -0.75, -1.25, 0.0, 0.0]]


def test_bias_is_added_to_logits_and_minus_infinity_bans_a_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    r = row(logit_bias={0: 0.5, 2: -math.inf, 9: 1.0}, reply=[0, 2], presence_penalty=-1.0)
    assert process(logits, [r]).tolist() == [[2.5, 2.0, -math.inf]]
    assert sample(logits, [r]).tolist() == [0]


def test_penalties_come_in_the_documented_order() -> None:
    """Repetition divides the model's own logit; presence and bias are added to the quotient."""
    r = row(prompt=[0], reply=[0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 5.0})
    assert process(torch.tensor([[4.0, 0.0]]), [r]).tolist() == [[6.0, 0.0]]


def test_a_mask_receives_the_reply_and_limits_it() -> None:
    def even_after_odd(ids: Sequence[int]) -> Tensor:
        return torch.arange(10) % 2 != ids[-1] % 2

    logits = torch.arange(10.0).repeat(2, 1)
    rows = [row(reply=[4, 3], logits_mask=even_after_odd), row(reply=[3, 4], logits_mask=even_after_odd)]
    assert sample(logits, rows).tolist() == [8, 9]
    rows = [row(seed, reply=[3], logits_mask=even_after_odd, temperature=1e6) for seed in range(200)]
    assert set(sample(logits[:1].expand(200, -1), rows).tolist()) == {0, 2, 4, 6, 8}


def raises(ids: Sequence[int]) -> Tensor:
    raise KeyError("grammar")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (raises, "logits_mask failed: KeyError: 'grammar'"),
        (lambda ids: [True] * 4, "logits_mask returned list; expected a tensor torch.bool [4]"),
        (lambda ids: torch.ones(4), "logits_mask returned torch.float32 [4]; expected a tensor torch.bool [4]"),
        (
            lambda ids: torch.ones(3, dtype=torch.bool),
            "logits_mask returned torch.bool [3]; expected a tensor torch.bool [4]",
        ),
    ],
)
def test_the_error_of_a_mask_names_its_row(mask: Callable[[Sequence[int]], Tensor], message: str) -> None:
    with pytest.raises(RowError) as error:
        sample(torch.zeros(3, 4), [row(), row(logits_mask=mask), row()])
    assert error.value.row == 1
    assert str(error.value) == message


@pytest.mark.parametrize("temperature", [0, 1e-6, 1.0, 1e38])
def test_a_row_that_has_no_valid_token_is_reported_and_leaves_others_alone(temperature: float) -> None:
    logits = random_logits(3, 6, 50)
    logits[1, 7] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, 3] = torch.inf
    options: dict[str, Any] = {"temperature": temperature, "top_p": 0.5, "top_k": 20, "min_p": 0.1}
    rows = [row(i, logit_bias={}, **options) for i in range(6)]
    rows[5] = row(5, logits_mask=lambda ids: torch.zeros(50, dtype=torch.bool), **options)
    ids = sample(logits, rows).tolist()
    assert ids[1:] == [-1] * 5
    assert ids[:1] == sample(logits[:1], rows[:1]).tolist()


def test_options_with_extreme_values_stay_finite() -> None:
    logits = random_logits(4, 4, 20)
    huge = 3e38
    rows = [
        row(reply=[0, 0, 1], frequency_penalty=-huge, presence_penalty=-huge, temperature=1e38),
        row(reply=[0, 0, 1], frequency_penalty=huge, logit_bias={2: -huge}, temperature=1e-4),
        row(reply=list(range(20)), repetition_penalty=1e-38, temperature=1.0),
        row(reply=list(range(20)), repetition_penalty=huge, temperature=1.0, top_p=0.5),
    ]
    assert min(sample(logits, rows).tolist()) >= 0


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": math.exp(-1)}):
        weights = warp(logits, logits.amax(-1), [SamplingParams(temperature=1.0, **options)])
        assert weights.isfinite().tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str
)
def test_the_narrowest_options_are_greedy(options: dict[str, Any]) -> None:
    logits = random_logits(5, 64, 1000)
    rows = [row(i, **{"temperature": 1.0, **options}) for i in range(64)]
    assert torch.equal(sample(logits, rows), logits.argmax(-1))


def test_logits_are_left_unchanged() -> None:
    logits = random_logits(6, 2, 30)
    before = logits.clone()
    mask = torch.arange(30) < 20
    sample(logits, [row(reply=[1, 2], repetition_penalty=2.0, presence_penalty=1.0, temperature=1.0, top_p=0.5)] * 2)
    sample(logits, [row(logits_mask=lambda ids: mask), row(logit_bias={3: 1.0})])
    assert torch.equal(logits, before)
    assert process(logits, [row(temperature=1.0), row()]) is logits


def test_logprobs_are_those_of_the_unprocessed_logits() -> None:
    logits = random_logits(7, 3, 40)
    chosen, values, ids = top_logprobs(logits, torch.tensor([5, 39, -1]), 4)
    want = torch.log(logits.double().softmax(-1))
    torch.testing.assert_close(chosen[:2], want[[0, 1], [5, 39]].float())
    assert torch.equal(ids, logits.topk(4).indices)
    torch.testing.assert_close(values, want.topk(4).values.float())
    assert top_logprobs(logits[:, :3], torch.tensor([0, 1, 2]), 5)[1].shape == (3, 3)


# ------------------------------------------------------------------------------------------------ batches


def mixed_row(chance: random.Random, vocabulary: int) -> Row:
    """A row with a random subset of all options."""
    allowed = torch.rand(vocabulary, generator=torch.Generator().manual_seed(chance.randrange(10**6))) < 0.5
    choices: dict[str, Any] = {
        "temperature": chance.choice([0.0, 0.4, 1.0, 3.0]),
        "top_k": chance.choice([1, 7, 50, vocabulary]),
        "top_p": chance.choice([0.3, 0.9, 0.999]),
        "min_p": chance.choice([0.01, 0.3]),
        "repetition_penalty": chance.choice([0.9, 1.2]),
        "presence_penalty": chance.choice([-0.5, 0.7]),
        "frequency_penalty": 0.3,
        "logit_bias": {chance.randrange(vocabulary): chance.choice([2.5, -3.0, -math.inf]) for _ in range(5)},
        "logits_mask": lambda ids: allowed,
    }
    options = {name: value for name, value in choices.items() if chance.random() < 0.5}
    ids = [chance.randrange(vocabulary) for _ in range(40)]
    return row(chance.randrange(2**63), chance.randrange(500), [-200, *ids[:20]], ids[20:], **options)


@pytest.mark.parametrize("vocabulary", [5, 33, 1021, 1024, 32003])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_batch_equals_the_row_alone_exactly(vocabulary: int, threads: int) -> None:
    chance, before = random.Random(vocabulary), torch.get_num_threads()
    rows = [mixed_row(chance, vocabulary) for _ in range(32)]
    logits = random_logits(8, 32, vocabulary)
    torch.set_num_threads(threads)
    try:
        processed = process(logits, rows)
        ids = sample(logits, rows)
        drawn = [i for i, r in enumerate(rows) if r.params.temperature]
        weights = warp(processed[drawn], processed[drawn].amax(-1), [rows[i].params for i in drawn])
        for i, r in enumerate(rows):
            alone = process(logits[i : i + 1].clone(), [r])
            assert torch.equal(alone[0], processed[i])
            assert sample(logits[i : i + 1].clone(), [r]).item() == ids[i]
            if i in drawn:
                assert torch.equal(warp(alone, alone.amax(-1), [r.params])[0], weights[drawn.index(i)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocabulary", [1021, 32003])
def test_noise_is_the_same_alone_and_in_a_batch(vocabulary: int) -> None:
    seed, index = torch.randint(2**62, (9,)), torch.randint(500, (9,))
    noise = gumbel_noise(seed, index, vocabulary)
    for i in range(9):
        assert torch.equal(gumbel_noise(seed[i : i + 1], index[i : i + 1], vocabulary)[0], noise[i])
    assert torch.equal(gumbel_noise(seed, index, 100), noise[:, :100])


# ------------------------------------------------------------------------------------------------ draws


def split_mix(state: int, n: int) -> int:
    """SplitMix64 in whole numbers."""
    z = (state + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_noise_is_the_documented_function_of_seed_index_and_vocabulary_row() -> None:
    assert [split_mix(0, n) for n in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # published outputs
    seeds, indices = [0, 1, 12345, 2**63 - 1], [0, 1, 77, 511]
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(indices), 300)
    for i, (seed, index) in enumerate(zip(seeds, indices, strict=True)):
        w = [(split_mix(split_mix(seed, index), v) % 2**63) / 2**63 for v in range(300)]
        want = [-math.log(-math.log1p(-x)) for x in w]
        torch.testing.assert_close(noise[i], torch.tensor(want), rtol=1e-5, atol=2e-5)


def drawn(logits: Tensor, seeds: Sequence[int], indices: Sequence[int], **options: Any) -> Tensor:
    """One draw from logits [V] for each pair of a seed and an index."""
    params = SamplingParams(temperature=options.pop("temperature", 1.0), **options)
    rows = [Row(params, seed, index) for seed, index in zip(seeds, indices, strict=True)]
    return sample(logits.expand(len(rows), -1), rows)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic of these counts lies above its mean."""
    want = probabilities.double() * counts.sum()
    assert want.min() > 5
    degrees = len(counts) - 1
    return float((((counts - want) ** 2 / want).sum() - degrees) / math.sqrt(2 * degrees))


DRAWS = 100_000


@pytest.mark.parametrize("vary", ["seed", "index"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_draws_have_the_probabilities_of_the_softmax(vary: str, temperature: float) -> None:
    logits = torch.linspace(-2, 1.5, 24)
    seeds, indices = (range(DRAWS), [3] * DRAWS) if vary == "seed" else ([3] * DRAWS, range(DRAWS))
    ids = drawn(logits, seeds, indices, temperature=temperature)
    probabilities = (logits.double() / temperature).softmax(-1)
    assert abs(chi_square(ids.bincount(minlength=24), probabilities)) < 4


def test_filtered_draws_have_the_renormalised_probabilities() -> None:
    logits = torch.linspace(-2, 1.5, 24)
    ids = drawn(logits, range(DRAWS), [0] * DRAWS, top_k=6)
    counts = ids.bincount(minlength=24)
    assert not counts[:18].any()
    assert abs(chi_square(counts[18:], logits[18:].double().softmax(-1))) < 4


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """64 tokens of probability 1e-5 each."""
    logits = torch.full((65,), math.log(1e-5))
    logits[0] = math.log(1 - 64e-5)
    rare = int((drawn(logits, range(DRAWS), [1] * DRAWS) > 0).sum())
    assert abs(rare - 64) < 4 * 8  # a Poisson variable of mean 64


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (256, 0)], ids=str)
def test_draws_of_neighbouring_seeds_and_indices_are_independent(step: tuple[int, int]) -> None:
    seeds, indices = torch.arange(300).repeat_interleave(300) + 1, torch.arange(300).repeat(300) + 1
    logits = torch.zeros(8)
    one = drawn(logits, seeds.tolist(), indices.tolist())
    other = drawn(logits, (seeds + step[0]).tolist(), (indices + step[1]).tolist())
    assert abs(chi_square((one * 8 + other).bincount(minlength=64), torch.full((64,), 1 / 64))) < 4


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)], ids=str)
def test_noise_of_neighbouring_seeds_indices_and_tokens_is_uncorrelated(step: tuple[int, int, int]) -> None:
    seeds, indices = torch.arange(30).repeat_interleave(30) + 1, torch.arange(30).repeat(30) + 1
    one = gumbel_noise(seeds, indices, 1001)
    other = gumbel_noise(seeds + step[0], indices + step[1], 1001).roll(-step[2], -1)
    correlation = torch.corrcoef(torch.stack([one[:, 1:-1].flatten(), other[:, 1:-1].flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(900 * 999)


def test_noise_has_the_gumbel_distribution_and_is_finite() -> None:
    noise = gumbel_noise(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 1000).flatten().double()
    assert noise.isfinite().all()
    uniform = (-(-noise).exp()).exp().sort().values
    distance = (uniform - (torch.arange(len(uniform)) + 0.5) / len(uniform)).abs().max()
    assert float(distance) < 2 / math.sqrt(len(uniform))  # Kolmogorov-Smirnov, p = 7e-4


def seed_for(bits: int) -> int:
    """The seed whose noise at index 0, vocabulary row 0 is made from these bits: SplitMix64 backwards, twice."""
    z = bits
    for _ in range(2):
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            z = z ^ (z >> shift) ^ (z >> 2 * shift)
            z = z * pow(factor, -1, 2**64) % 2**64
        z = (z - 0x9E3779B97F4A7C15) % 2**64
    return z


@pytest.mark.parametrize(("w", "noise"), [(0, -43.668), (2**63 - 1, 2.8113), (2**63 - 2**38, 2.8113)])
def test_noise_is_finite_at_the_limits(w: int, noise: float) -> None:
    seed = seed_for(w)
    assert split_mix(split_mix(seed, 0), 0) == w
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    found = gumbel_noise(signed, torch.tensor([0]), 1)
    assert found.item() == pytest.approx(-noise, abs=1e-3)


def test_a_seed_gives_the_same_draws_again_and_another_one_different_draws() -> None:
    logits = torch.zeros(1000)
    first, again, other = (drawn(logits, [seed] * 50, range(50)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) > 40
    assert int((first == other).sum()) <= 2


# ------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: math.nan}, f"{name} is nan; expected") for name in ("temperature", "top_p", "min_p")),
        *(({f"{kind}_penalty": math.nan}, "is nan; expected") for kind in ("repetition", "presence", "frequency")),
        *(({f"{kind}_penalty": math.inf}, "is inf; expected") for kind in ("repetition", "presence", "frequency")),
        *(({name: True}, f"{name} is True; expected") for name in ("temperature", "top_k", "seed", "num_beams")),
        *(({name: None}, f"{name} is None; expected") for name in ("max_new_tokens", "temperature", "num_beams")),
        *(({name: "1"}, f"{name} is '1'; expected") for name in ("top_p", "num_beams", "prompt_logprobs")),
        ({"temperature": math.inf}, "temperature is inf; expected a finite number, 0 or more"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"presence_penalty": -(10**400)}, "presence_penalty is -1000"),
        ({"num_beams": 0}, "num_beams is 0; expected 1 or more"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; expected 0 or more"),
        (
            {"num_beams": 2, "temperature": 0.5},
            "temperature is 0.5; expected 0, as num_beams= (--num-beams) is above 1",
        ),
        ({"num_beams": 2, "logprobs": 3}, "logprobs is 3; expected 0, as num_beams is above 1"),
        ({"logit_bias": [1]}, "logit_bias is [1]; expected a mapping of token ids to numbers"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias has the key '5'; expected token ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has the key -1; expected token ids"),
        ({"logit_bias": {True: 1.0}}, "logit_bias has the key True; expected token ids"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan; expected a finite number or -inf"),
        ({"logit_bias": {5: math.inf}}, "logit_bias of token 5 is inf; expected a finite number or -inf"),
        ({"logit_bias": {5: False}}, "logit_bias of token 5 is False; expected a finite number or -inf"),
        ({"logits_mask": torch.ones(3)}, "expected a function of the reply's ids"),
        ({"stop": "###"}, "stop is '###'; expected a tuple of strings"),
        ({"stop": 5}, "stop is 5; expected a tuple of strings"),
        ({"stop": ("a", "")}, "expected non-empty strings"),
    ],
    ids=str,
)
def test_an_invalid_option_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options", [{"stop": 5}, {"stop": [3]}, {"top_q": 1}, {"num_beams": 2, "temperature": 1}], ids=str
)
def test_invalid_options_by_name_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams.from_options(**options)


def test_parameters_keep_their_own_copies() -> None:
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[1], stop[0] = 9.0, "b"
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("a",)
    assert dataclasses.replace(params, seed=1).logit_bias == {1: 2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}, stop=("a",)))

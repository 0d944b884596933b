"""The contract of attention contexts: all of them give the same result for the same tokens.

A new one needs one entry in MEMBERS.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.config import DecoderConfig
from llava.model.attention import AttentionContext, CacheContext, CausalContext, Segments, VarlenContext, decode_mask
from llava.model.decoder import Decoder
from llava.model.kv_cache import KVCache

LENGTHS = (3, 7, 1, 5)  # of the sequences in a batch
SIZES: dict[str, Any] = {"kind": "llama", "n_layers": 2, "dim": 48, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12}
SIZES |= {"mlp_dim": 96, "vocab_size": 40, "max_seq": 64, "eps": 1e-5}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped heads": {"n_kv_heads": 2},
    "sliding window": {"sliding_window": 3},
    "mpt": {"kind": "mpt", "rope_theta": None, "alibi_bias_max": 8.0},
}

Forward = Callable[[Tensor, AttentionContext], Tensor]  # x [B, S, D] -> [B, S, D]
Sequences = list[Tensor]  # [n, D] each


class Member(NamedTuple):
    """One way to run sequences through a decoder."""

    run: Callable[[DecoderConfig, Forward, Sequences], Sequences]
    prompts: Callable[[DecoderConfig, Sequences], tuple[Tensor, AttentionContext]]  # for `last_token_only`


def padded(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """x [B, S, D] and the index of each row's last token, [B, 1]."""
    return pad_sequence(sequences, batch_first=True), torch.tensor([[len(one) - 1] for one in sequences])


def causal_prompts(config: DecoderConfig, sequences: Sequences) -> tuple[Tensor, AttentionContext]:
    x, last = padded(sequences)
    return x, CausalContext(positions=torch.arange(x.shape[1]), seq_len=x.shape[1], last=last)


def causal(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    y = forward(*causal_prompts(config, sequences))
    return [row[: len(one)] for row, one in zip(y, sequences, strict=True)]


def varlen_prompts(config: DecoderConfig, sequences: Sequences) -> tuple[Tensor, AttentionContext]:
    lengths = tuple(map(len, sequences))
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = Segments(cu_seqlens, lengths, max(lengths))
    return torch.cat(sequences)[None], VarlenContext(positions=positions, seq_len=max(lengths), segments=segments)


def varlen(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    y = forward(*varlen_prompts(config, sequences))
    return list(y[0].split(list(map(len, sequences))))


def cache_prompts(config: DecoderConfig, sequences: Sequences) -> tuple[Tensor, AttentionContext]:
    x, last = padded(sequences)
    n = x.shape[1]
    cache = KVCache(config, len(x), 16, dtype=x.dtype, device=x.device)
    return x, CacheContext(positions=torch.arange(n), seq_len=n, last=last, cache=cache, window=n)


def prefill(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    y = forward(*cache_prompts(config, sequences))
    return [row[: len(one)] for row, one in zip(y, sequences, strict=True)]


def decode_alone(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    """Decodes token by token, one sequence at a time, without a mask."""
    results = []
    for one in sequences:
        cache = KVCache(config, 1, len(one), dtype=one.dtype, device=one.device)
        steps = []
        for i, token in enumerate(one):
            context = CacheContext(positions=torch.tensor([i]), seq_len=i + 1, cache=cache, window=i + 1)
            steps.append(forward(token[None, None], context)[0])
        results.append(torch.cat(steps))
    return results


def decode_together(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    """Prefills all but the last token of each row, which leaves padding in the cache, then decodes one step."""
    prompts, newest = [one[:-1] for one in sequences], torch.stack([one[-1:] for one in sequences])
    x = pad_sequence(prompts, batch_first=True)
    n = x.shape[1]
    cache = KVCache(config, len(x), 16, dtype=x.dtype, device=x.device)
    first = forward(x, CacheContext(positions=torch.arange(n), seq_len=n, cache=cache, window=n))
    positions = torch.tensor([[len(prompt)] for prompt in prompts])
    mask = decode_mask(positions, 16)
    last = forward(newest, CacheContext(positions=positions, seq_len=n + 1, mask=mask, cache=cache, window=16))
    return [torch.cat([a[: len(prompt)], b]) for a, b, prompt in zip(first, last, prompts, strict=True)]


MEMBERS = {
    "causal": Member(causal, causal_prompts),
    "varlen": Member(varlen, varlen_prompts),
    "cache, prefill": Member(prefill, cache_prompts),
    "cache, one row": Member(decode_alone, cache_prompts),
    "cache, many rows": Member(decode_together, cache_prompts),
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    parameters = request.node.callspec.params
    if parameters.get("compiled") and parameters["decoder"] == "llama":
        pytest.skip("compiling takes seconds, and grouped heads run the same code")
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(**SIZES | DECODERS[request.param]))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


@pytest.fixture
def config(decoder: Decoder, request: pytest.FixtureRequest) -> DecoderConfig:
    return DecoderConfig(**SIZES | DECODERS[request.node.callspec.params["decoder"]])


@pytest.fixture
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, SIZES["dim"], generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("member", MEMBERS)
def test_every_context_gives_what_a_sequence_alone_and_uncached_gives(
    member: str, compiled: bool, decoder: Decoder, config: DecoderConfig, sequences: Sequences
) -> None:
    torch._dynamo.reset()
    forward = torch.compile(decoder.forward, backend="aot_eager", dynamic=True) if compiled else decoder.forward
    with torch.inference_mode():
        results = MEMBERS[member].run(config, forward, sequences)
        for result, one in zip(results, sequences, strict=True):
            torch.testing.assert_close(result, decoder(one[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("member", ["causal", "varlen", "cache, prefill"])
def test_last_token_only_gives_each_sequences_last_state(
    member: str, compiled: bool, decoder: Decoder, config: DecoderConfig, sequences: Sequences
) -> None:
    torch._dynamo.reset()
    run = decoder.last_token_only
    if compiled:
        run = torch.compile(run, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        results = run(*MEMBERS[member].prompts(config, sequences))
        expected = torch.stack([decoder(one[None])[0, -1] for one in sequences])
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("member", ["causal", "varlen"])
def test_gradients_are_those_of_each_sequence_alone(
    member: str, decoder: Decoder, config: DecoderConfig, sequences: Sequences
) -> None:
    def gradients(states: Sequences) -> list[Tensor]:
        parameters = [p for name, p in decoder.named_parameters() if name not in ("embed.weight", "head.weight")]
        return list(torch.autograd.grad(sum(state.square().sum() for state in states), parameters))

    decoder.requires_grad_(True)
    together = gradients(MEMBERS[member].run(config, decoder.forward, sequences))
    alone = gradients([decoder(one[None])[0] for one in sequences])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_the_cache_continues_with_the_rows_that_are_selected(decoder: Decoder, config: DecoderConfig) -> None:
    x = torch.randn(3, 6, SIZES["dim"], generator=torch.Generator().manual_seed(2))
    cache = KVCache(config, 3, 6, dtype=x.dtype, device=x.device)
    decoder(x[:, :5], CacheContext(positions=torch.arange(5), seq_len=5, cache=cache, window=5))
    rows = torch.tensor([2, 0])
    cache.select(rows)
    positions = torch.tensor([[5], [5]])
    mask = decode_mask(positions, 6)
    context = CacheContext(positions=positions, seq_len=6, mask=mask, cache=cache, window=6)
    step = decoder(x[rows, 5:], context)
    torch.testing.assert_close(step[:, 0], decoder(x[rows])[:, -1], rtol=1e-4, atol=1e-4)

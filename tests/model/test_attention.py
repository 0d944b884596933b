"""The contract of attention contexts: all of them give the same result for the same tokens.

A new one needs one entry in MEMBERS.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.config import DecoderConfig
from llava.model.attention import AttentionContext, CausalContext, Segments, VarlenContext
from llava.model.decoder import Decoder
from llava.model.paged import Chunk, PagedCache, PagedContext, Row, paged_rows

PAGE = 2  # tokens of a page
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
    prompts: Callable[[DecoderConfig, Sequences], tuple[Tensor, AttentionContext]]  # x [B, S, D] and its context


def causal_prompts(config: DecoderConfig, sequences: Sequences) -> tuple[Tensor, AttentionContext]:
    x = pad_sequence(sequences, batch_first=True)
    return x, CausalContext.of(x)


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


def new_cache(config: DecoderConfig) -> PagedCache:
    return PagedCache(config, 64, PAGE, dtype=torch.float32, device=torch.device("cpu"))


def pages_of(i: int) -> list[int]:
    """The pages of sequence i, which alternate with those of the others."""
    return list(range(i, 64, len(LENGTHS)))[:8]


def paged(cache: PagedCache, new: Mapping[int, range], *, decoding: bool = False) -> PagedContext:
    """The context of new positions by sequence: chunks of prompts or, for one token each, decoding rows."""
    slots = [pages_of(i)[at // PAGE] * PAGE + at % PAGE for i, at_all in new.items() for at in at_all]
    rows = [Row(i, pages_of(i), at_all.start) for i, at_all in new.items()]
    starts = accumulate(map(len, new.values()), initial=0)
    chunks = [
        Chunk(start=start, n=len(at), position=at.start, pages=torch.tensor(pages_of(i)))
        for start, (i, at) in zip(starts, new.items(), strict=False)
    ]
    return PagedContext(
        cache=cache,
        positions=torch.tensor([at for at_all in new.values() for at in at_all])[None],
        seq_len=max(at.stop for at in new.values()),
        slots=torch.tensor(slots),
        rows=[paged_rows(cache, rows, range(len(rows)))] if decoding else [],
        chunks=[] if decoding else chunks,
    )


def paged_prompts(config: DecoderConfig, sequences: Sequences) -> tuple[Tensor, AttentionContext]:
    new = {i: range(len(one)) for i, one in enumerate(sequences)}
    return torch.cat(sequences)[None], paged(new_cache(config), new)


def prefill(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    y = forward(*paged_prompts(config, sequences))
    return list(y[0].split(list(map(len, sequences))))


def in_chunks(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    """Prefills two tokens of each sequence at a time."""
    cache = new_cache(config)
    results: list[Sequences] = [[] for _ in sequences]
    for start in range(0, max(LENGTHS), 2):
        new = {i: range(start, min(start + 2, len(one))) for i, one in enumerate(sequences) if start < len(one)}
        x = torch.cat([sequences[i][at.start : at.stop] for i, at in new.items()])
        y = forward(x[None], paged(cache, new))[0].split([len(at) for at in new.values()])
        for i, part in zip(new, y, strict=True):
            results[i].append(part)
    return [torch.cat(parts) for parts in results]


def decode_alone(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    """Decodes token by token, one sequence at a time."""
    results = []
    for i, one in enumerate(sequences):
        cache = new_cache(config)
        steps = [paged(cache, {i: range(at, at + 1)}, decoding=at > 0) for at in range(len(one))]
        results.append(torch.cat([forward(one[None, at : at + 1], step)[0] for at, step in enumerate(steps)]))
    return results


def decode_together(config: DecoderConfig, forward: Forward, sequences: Sequences) -> Sequences:
    """Prefills all but the last token of each sequence, then decodes one step."""
    cache, last = new_cache(config), {i: range(len(one) - 1, len(one)) for i, one in enumerate(sequences)}
    before = {i: range(at.start) for i, at in last.items() if at.start}
    first = forward(torch.cat([one[:-1] for one in sequences])[None], paged(cache, before))[0]
    newest = forward(torch.cat([one[-1:] for one in sequences])[None], paged(cache, last, decoding=True))[0]
    prompts = first.split([at.start for at in last.values()])
    return [torch.cat([prompt, y[None]]) for prompt, y in zip(prompts, newest, strict=True)]


MEMBERS = {
    "causal": Member(causal, causal_prompts),
    "varlen": Member(varlen, varlen_prompts),
    "paged, prefill": Member(prefill, paged_prompts),
    "paged, chunks": Member(in_chunks, paged_prompts),
    "paged, one row": Member(decode_alone, paged_prompts),
    "paged, many rows": Member(decode_together, paged_prompts),
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


@pytest.mark.parametrize(("member", "compiled"), [*((name, False) for name in MEMBERS), ("causal", True)])
def test_every_context_gives_what_a_sequence_alone_and_uncached_gives(
    member: str, compiled: bool, decoder: Decoder, config: DecoderConfig, sequences: Sequences
) -> None:
    torch._dynamo.reset()
    forward = torch.compile(decoder.forward, backend="aot_eager", dynamic=True) if compiled else decoder.forward
    with torch.inference_mode():
        results = MEMBERS[member].run(config, forward, sequences)
        for result, one in zip(results, sequences, strict=True):
            torch.testing.assert_close(result, decoder(one[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("member", ["causal", "varlen", "paged, prefill"])
def test_select_gives_the_states_of_these_tokens_only(
    member: str, decoder: Decoder, config: DecoderConfig, sequences: Sequences
) -> None:
    with torch.inference_mode():
        x, context = MEMBERS[member].prompts(config, sequences)
        select = torch.tensor([x.shape[0] * x.shape[1] - 1, 2, 2, 0])
        found = decoder(x, context, select)
        expected = decoder(*MEMBERS[member].prompts(config, sequences)).flatten(0, 1)[select]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


def test_gradients_of_selected_tokens_are_those_of_picking_them_afterwards(decoder: Decoder) -> None:
    decoder.requires_grad_(True)
    x, select = torch.randn(2, 5, SIZES["dim"], generator=torch.Generator().manual_seed(2)), torch.tensor([4, 7])
    parameters = list(decoder.blocks.parameters())
    found = torch.autograd.grad(decoder(x, select=select).square().sum(), parameters)
    wanted = torch.autograd.grad(decoder(x).flatten(0, 1)[select].square().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None, slopes: Tensor | None) -> Tensor:
    """Attention of one sequence, query by query: q [n, H, E], k and v [n, K, E] -> [n, H, E]"""
    n, heads, width = q.shape
    y = torch.zeros_like(q)
    for i in range(n):
        first = 0 if window is None else max(0, i + 1 - window)
        for head in range(heads):
            kv = head * k.shape[1] // heads
            scores = k[first : i + 1, kv] @ q[i, head] / width**0.5
            if slopes is not None:
                scores = scores - slopes[head] * (i - torch.arange(first, i + 1))
            y[i, head] = scores.softmax(0) @ v[first : i + 1, kv]
    return y


def test_the_mask_of_a_packed_row_is_causal_within_each_sample() -> None:
    segments = Segments(torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32), (2, 0, 3, 1), 3)
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in (2, 3, 1))).bool()
    assert torch.equal(segments.mask(6)[0, 0], expected)


@pytest.mark.parametrize("alibi", [False, True], ids=["no biases", "ALiBi"])
@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("member", MEMBERS)
def test_scores_follow_window_and_slopes_in_every_context(member: str, window: int | None, alibi: bool) -> None:
    """The decoder is only attention here: a token's vector contains its query, key and value."""
    config = DecoderConfig(**SIZES | {"n_kv_heads": 2})
    sizes = [48, 24, 24]  # 4 heads of queries, 2 of keys, 2 of values, 12 wide each
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randn(n, sum(sizes), generator=generator) for n in LENGTHS]
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]) if alibi else None

    def forward(x: Tensor, context: AttentionContext) -> Tensor:
        scored = context.with_scores(sliding_window=window, alibi_slopes=slopes, dtype=x.dtype)
        q, k, v = (part.unflatten(-1, (-1, 12)) for part in x.split(sizes, dim=-1))
        return scored.attend(0, q, k, v).flatten(-2)

    for found, one in zip(MEMBERS[member].run(config, forward, sequences), sequences, strict=True):
        q, k, v = (part.unflatten(-1, (-1, 12)) for part in one.split(sizes, dim=-1))
        torch.testing.assert_close(found, by_hand(q, k, v, window, slopes).flatten(-2), rtol=1e-4, atol=1e-5)

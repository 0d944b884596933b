"""The fused decoder computes what `Decoder.forward` computes. On a CPU, the twins of its kernels run."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.config import DecoderConfig, RopeScaling
from llava.kernels.paged_attention import Scratch
from llava.model.attention import CausalContext
from llava.model.decoder import Decoder
from llava.model.fused import FusedDecoder, PackedAttention, RowAttention, why_not, with_biases
from llava.model.lora import Adapter, LoraLinear
from llava.model.paged import Chunk, PagedCache, PagedContext, Row, paged_rows

SIZES: dict[str, Any] = {"n_layers": 2, "dim": 48, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "mlp_dim": 80}
SIZES |= {"vocab_size": 37, "max_seq": 64, "eps": 1e-5}
LLAMA = SIZES | {"kind": "llama", "rope_theta": 1000.0}
MPT = SIZES | {"kind": "mpt", "rope_theta": None, "alibi_bias_max": 8.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "linear": LLAMA | {"rope_scaling": RopeScaling(kind="linear", factor=2.0, original_max_seq=32)},
    "llama3": LLAMA | {"rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_max_seq=16)},
    "grouped": LLAMA | {"n_kv_heads": 2},
    "window": LLAMA | {"sliding_window": 6, "n_kv_heads": 1},
    "mpt": MPT,
    "mpt, clipped": MPT | {"clip_qkv": 0.4},
    "tied": LLAMA | {"tied": True},
}
LENGTHS = (9, 5, 12)  # tokens of the sequences
PAGE = 4
TABLES = [[2, 7, 4], [1, 9], [8, 0, 5]]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return DecoderConfig(**request.param)


def decoder_of(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config)
    for name, weight in decoder.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    return decoder


class Batch:
    """Sequences of random embeddings, of which `computed` tokens are in the cache."""

    def __init__(self, config: DecoderConfig, computed: Sequence[int] = (0, 0, 0)):
        self.config, self.computed = config, computed
        self.decoder = decoder_of(config)
        self.fused = FusedDecoder(self.decoder, config)
        self.caches = [PagedCache(config, 10, PAGE, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2)]
        self.whole = [torch.randn(n, config.dim) for n in LENGTHS]
        for cache in self.caches:
            if any(computed):
                past = Step(self, [0] * 3, computed, n_rows=0)
                self.decoder(past.x[None], past.context(cache))

    def expected(self) -> Tensor:
        """The logits [3, V] after the last tokens, by the plain decoder without a cache."""
        states = [self.decoder(x[None], CausalContext.of(x[None]))[0, -1] for x in self.whole]
        return self.decoder.logits(torch.stack(states))


class Step:
    """The new tokens of a batch: positions `first` to `end` of each sequence, decoding rows first."""

    def __init__(self, batch: Batch, first: Sequence[int], end: Sequence[int], *, n_rows: int):
        self.batch, self.n_rows, self.first = batch, n_rows, first
        self.x = torch.cat([x[a:b] for x, a, b in zip(batch.whole, first, end, strict=True)])
        sizes = [b - a for a, b in zip(first, end, strict=True)]
        self.starts = [0, *accumulate(sizes)]
        self.last = torch.tensor(self.starts[1:]) - 1
        spans = zip(first, end, TABLES, strict=True)
        at = [(i, table) for a, b, table in spans for i in range(a, b)]
        self.positions = torch.tensor([i for i, _ in at])
        self.slots = torch.tensor([table[i // PAGE] * PAGE + i % PAGE for i, table in at])
        self.sizes = sizes

    def chunks(self, offset: int) -> list[Chunk]:
        return [
            Chunk(start=self.starts[i] - offset, n=self.sizes[i], position=self.first[i], pages=torch.tensor(TABLES[i]))
            for i in range(self.n_rows, 3)
        ]

    def context(self, cache: PagedCache) -> PagedContext:
        """For the plain decoder."""
        rows = [Row(i, TABLES[i], self.first[i]) for i in range(3)]
        return PagedContext(
            cache=cache,
            positions=self.positions[None],
            seq_len=max(LENGTHS),
            slots=self.slots,
            rows=[paged_rows(cache, rows, range(self.n_rows))] if self.n_rows else [],
            chunks=self.chunks(0),
        )

    def rows(self, cache: PagedCache) -> RowAttention:
        """For the fused decoder; tables are padded with any page."""
        config = self.batch.config
        tables = [[*table, 3, 3][:4] for table in TABLES[: self.n_rows]]
        return RowAttention(
            decoder=self.batch.fused,
            cache=cache,
            tables=torch.tensor(tables, dtype=torch.int32),
            positions=torch.tensor(self.first[: self.n_rows], dtype=torch.int32),
            max_tokens=config.max_seq,
            scratch=Scratch(self.n_rows, config.n_heads, config.n_kv_heads, config.head_dim, 2, torch.device("cpu")),
        )

    def packed(self, cache: PagedCache) -> PackedAttention:
        n = self.n_rows
        return PackedAttention(
            decoder=self.batch.fused,
            cache=cache,
            slots=self.slots[n:],
            positions=self.positions[n:],
            chunks=with_biases(self.batch.fused, self.chunks(n), torch.float32),
            n_rows=n,
            rows=self.rows(cache) if n else None,
        )


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def check(step: Step) -> None:
    """Compares logits and caches of the fused and the plain decoder."""
    batch, (cache, other) = step.batch, step.batch.caches
    plain = batch.decoder.logits(batch.decoder(step.x[None], step.context(other), step.last))
    attend = step.rows(cache) if step.n_rows == 3 else step.packed(cache)
    found = batch.fused.logits(batch.fused(step.x, attend, step.last))
    close(found, plain)
    close(found, batch.expected())
    close(cache.k, other.k)
    close(cache.v, other.v)


def test_whole_prompts_get_the_logits_of_the_plain_decoder(config: DecoderConfig) -> None:
    check(Step(Batch(config), (0, 0, 0), LENGTHS, n_rows=0))


def test_later_chunks_of_prompts_get_the_logits_of_the_plain_decoder(config: DecoderConfig) -> None:
    computed = (4, 1, 11)
    check(Step(Batch(config, computed), computed, LENGTHS, n_rows=0))


def test_decoding_rows_get_the_logits_of_the_plain_decoder(config: DecoderConfig) -> None:
    computed = [n - 1 for n in LENGTHS]
    check(Step(Batch(config, computed), computed, LENGTHS, n_rows=3))


def test_decoding_rows_beside_a_chunk_get_the_logits_of_the_plain_decoder(config: DecoderConfig) -> None:
    computed = (LENGTHS[0] - 1, LENGTHS[1] - 1, 3)
    check(Step(Batch(config, computed), computed, LENGTHS, n_rows=2))


def test_without_selected_tokens_the_states_of_all_are_returned(config: DecoderConfig) -> None:
    batch = Batch(config)
    step = Step(batch, (0, 0, 0), LENGTHS, n_rows=0)
    states = batch.fused(step.x, step.packed(batch.caches[0]))
    close(batch.fused.logits(states[step.last]), batch.expected())


def test_every_plain_decoder_can_be_fused(config: DecoderConfig) -> None:
    assert why_not(decoder_of(config), config) is None


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.down"])
def test_adapters_are_in_the_way(name: str) -> None:
    config = DecoderConfig(**LLAMA)
    decoder = decoder_of(config)
    module, _, leaf = name.partition(".")
    parent = getattr(decoder.blocks[1], module)
    base = getattr(parent, leaf)
    setattr(parent, leaf, LoraLinear(base, {"weight": Adapter(base.in_features, base.out_features, 2, 1.0)}))
    assert "adapters" in (why_not(decoder, config) or "")


def test_dynamic_rotation_is_in_the_way() -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_seq=16)
    config = DecoderConfig(**LLAMA, rope_scaling=scaling)
    assert "length of the sequence" in (why_not(decoder_of(config), config) or "")

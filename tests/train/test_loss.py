"""The chunked cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llava.train.loss
import llava.train.start
from llava.model.decoder import Decoder
from llava.train.loss import cross_entropy


@pytest.fixture
def decoder() -> Decoder:
    from llava.config import DecoderConfig

    sizes = {"n_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "mlp_dim": 8, "vocab_size": 97}
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(kind="llama", max_seq=64, eps=1e-5, tied=False, rope_theta=1e4, **sizes))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_chunked_cross_entropy_equals_that_of_full_logits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava.train.loss, "_CHUNK_VALUES", 97 * 7)
    x, targets = torch.randn(50, 16, requires_grad=True), torch.randint(0, 97, (50,))
    inputs = (x, decoder.head.weight)
    whole = F.cross_entropy(decoder.logits(x), targets, reduction="sum")
    wanted = torch.autograd.grad(whole, inputs)
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    made: list[int] = []
    monkeypatch.setattr(decoder, "logits", lambda x, own=decoder.logits: made.append(len(x)) or own(x))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = cross_entropy(decoder, x, targets)
        found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, wanted)
    assert max(made) == 7  # rows of logits per chunk
    assert len(made) == 2 * 8  # each chunk once in the forward and once in the backward pass
    assert max(held) <= decoder.head.weight.numel()
    assert cross_entropy(decoder, x[:0], targets[:0]) == 0

"""The two functions that run the model during generation. `Engine` can compile them with `torch.compile`.

B batch   S length of the longest prompt   D dim   V vocabulary size
"""

from torch import Tensor

from llava.model.attention import AttentionContext
from llava.model.llava import Llava


def prefill(model: Llava, x: Tensor, context: AttentionContext) -> Tensor:
    """Runs right-padded prompts: x [B, S, D] -> logits [B, V] float32 for the token after each prompt.

    Padding needs no mask: attention is causal, so no prompt token attends to the padding after it.
    """
    return model.decoder.logits(model.decoder.last_token_only(x, context))


def decode_step(model: Llava, ids: Tensor, context: AttentionContext) -> Tensor:
    """Runs one step: ids [B], the newest token of each row -> logits [B, V] float32 for the next token."""
    x = model.decoder.lookup(ids)[:, None]
    return model.decoder.logits(model.decoder(x, context)[:, -1])

"""How much arithmetic a token costs in training, and how much a GPU can do."""

import torch

from llava.model.llava import Llava
from llava.train.recipe import Recipe

_PEAKS = {  # dense bfloat16 FLOP/s, from the makers' data sheets; names as torch reports them hold these words
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "A10": 125e12,
}


def flops_of(model: Llava, recipe: Recipe) -> float:
    """A token's share of the decoder's products: 2 a weight forward, 2 back to the inputs, 2 to weights that learn.

    Attention, tower, projector and what is computed again are not counted, so that MFU is what the run is for.
    """
    blocks = sum(p.numel() for name, p in model.decoder.blocks.named_parameters() if ".adapters." not in name)
    blocks += sum(b.numel() * 2 for name, b in model.decoder.blocks.named_buffers() if name.endswith("codes"))
    learns = "decoder" in recipe.train and not recipe.lora_rank
    return float(blocks) * (6 if learns else 4)


def peak_flops(device: torch.device) -> float:
    """Of one GPU; 0: not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAKS.items() if word in name), 0.0)

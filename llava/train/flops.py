"""Training FLOPs per token, and the peak FLOP/s of a GPU."""

import torch

from llava.model.llava import Llava
from llava.train.recipe import Recipe

_PEAKS = {  # substring of the torch device name -> dense bfloat16 FLOP/s (data sheet); the first match is used
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "A10": 125e12,
}


def flops_per_token(model: Llava, recipe: Recipe) -> float:
    """Returns the FLOPs per token for the matrix products with the weights of the decoder blocks.

    Each weight takes 2 FLOPs in the forward pass, 2 for the input gradient and, if trained, 2 for the weight
    gradient. Attention scores, adapters, the head, the vision tower, the projector and recomputed activations are not
    counted.
    """
    blocks = sum(p.numel() for name, p in model.decoder.blocks.named_parameters() if ".adapters." not in name)
    blocks += sum(b.numel() * 2 for name, b in model.decoder.blocks.named_buffers() if name.endswith("codes"))
    trained = "decoder" in recipe.train and not recipe.lora_rank
    return float(blocks) * (6 if trained else 4)


def peak_flops(device: torch.device) -> float:
    """Returns the peak FLOP/s of a device, or 0 for a CPU or a GPU that is not listed in `_PEAKS`."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAKS.items() if word in name), 0.0)

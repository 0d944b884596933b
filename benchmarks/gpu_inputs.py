"""The prompts, pixels and JPEG files of the cases of `gpu.py`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_setup import Skipped
from PIL import Image

from llava.assistant import LLAVA_TINY
from llava.checkpoint.open import open_checkpoint
from llava.config import IMAGE, ImageConfig, LlavaConfig
from llava.preprocess.inputs import ModelInput
from llava.preprocess.tokenizer import Token

HIDE = "GPU_BENCHMARK_WITHOUT_SIMPLEJPEG"  # set in the process of `first-token-jpeg-pillow`


class EndlessTokenizer:
    """The tokenizer of llava-tiny, in which no id ends a reply, and every id of the model's vocabulary is a token."""

    bos_id = eos_id = pad = None
    special: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int):
        self.real, self.size = open_checkpoint(LLAVA_TINY).tokenizer, vocab_size

    def encode_tokens(self, text: str) -> list[Token]:
        return [token._replace(id=token.id % self.size) for token in self.real.encode_tokens(text)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.real.decode([id % self.real.size for id in ids], skip_special)

    def id_of(self, text: str) -> int | None:
        return None


def random_ids(n: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Token ids [n]. The last id of the vocabulary is left out: the peers use it as the image token."""
    return torch.randint(3, vocab_size - 1, (n,), generator=torch.Generator().manual_seed(seed))


def random_pixels(views: int, side: int, seed: int) -> torch.Tensor:
    """Preprocessed pixels [views, 3, side, side]."""
    return torch.randn(views, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_picture_input(config: LlavaConfig, n_text: int, seed: int) -> ModelInput:
    """A picture of random pixels among random text tokens."""
    assert config.vision
    pixels = random_pixels(1, config.vision.image_size, seed)
    return picture_input(random_ids(n_text, config.decoder.vocab_size, seed), pixels, config.vision.n_features)


def text_input(config: LlavaConfig, n: int, seed: int) -> ModelInput:
    ids = random_ids(n, config.decoder.vocab_size, seed)
    return ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)


def picture_input(text_ids: torch.Tensor, pixels: torch.Tensor, n_features: int) -> ModelInput:
    """A prompt with a picture from its fifth position on."""
    ids = torch.cat([text_ids[:4], torch.full((n_features,), IMAGE), text_ids[4:]])
    token_ids = [*text_ids[:4].tolist(), IMAGE, *text_ids[4:].tolist()]
    return ModelInput(prompt="", token_ids=token_ids, ids=ids, labels=ids, pixels=pixels, views=[1], grids=[None])


def jpegs(n: int, size: tuple[int, int]) -> list[bytes]:
    """Files of quality 90 with smooth gradients, noise and shapes, each with a rectangle of its own."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    grain = generator.normal(0, 4, (size[1], size[0], 1))
    picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
    found = []
    for _ in range(n):
        x, y = (int(generator.integers(0, side // 2)) for side in size)
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        picture.paste(colour, (x, y, x + size[0] // 5, y + size[1] // 4))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def values_unlike_pillow(pixels: torch.Tensor, config: ImageConfig, jpeg: bytes) -> int:
    """How many 8-bit values of a prepared picture differ from those of Pillow, which decodes, pads and resizes it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    ours = ((pixels[0].float().cpu() * std + mean) * 255).round().to(torch.uint8)
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    side = max(picture.size)
    r, g, b = (int(255 * channel) for channel in config.mean)
    canvas = Image.new("RGB", (side, side), (r, g, b))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    resized = np.array(canvas.resize((config.size, config.size), Image.Resampling.BICUBIC))
    return int((ours != torch.from_numpy(resized).permute(2, 0, 1)).sum())


def jpeg_decoder() -> str:
    """The library that decodes JPEG files: simplejpeg if it can be imported."""
    try:
        import simplejpeg  # type: ignore[import-not-found]
    except ImportError as error:
        if os.environ.get(HIDE):
            return "Pillow"
        raise Skipped("simplejpeg is not installed") from error
    return f"simplejpeg {getattr(simplejpeg, '__version__', '')}".strip()


def hide_simplejpeg(folder: Path) -> None:
    """Writes a module that fails when it is imported. `folder` comes before simplejpeg in a process's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simplejpeg.py").write_text("raise ImportError('hidden by the benchmark')\n")

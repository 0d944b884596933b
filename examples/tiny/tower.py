"""Trains a small CLIP-style vision tower from scratch on drawn scenes: `python -m examples.tiny.tower`.

B scenes   K maximum objects   N positions (class token first)   P patches   D dim   E embedding size
C classes: all glyphs, all printed words, and the background

The objective is contrastive as in CLIP, but with a text per patch: each patch is compared with the names of all
classes. The class token is compared with the captions of the batch. LLaVA uses the hidden state before the last block.
That state therefore has its own head, which also predicts the patch's colour and the edges of the object on it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from examples.tiny.compose import BACKGROUND, UNCLEAR, Composer, Scenes
from examples.tiny.glyphs import Glyphs
from examples.tiny.pretrain import (
    Budget,
    Compile,
    Decay,
    Device,
    Minutes,
    Out,
    Rate,
    Seed,
    Size,
    Steps,
    autocast,
    fit,
    initialise,
    logger,
    save,
)
from examples.tiny.sprites import Sprites, load_sprites
from examples.tiny.world import WORDS
from llava.checkpoint.load import resolve_device
from llava.config import VisionConfig
from llava.errors import ConfigError, LlavaError
from llava.formats.clip import MEAN, STD
from llava.formats.clip import RULES as CLIP
from llava.model.vision import Block, Vision
from llava.tensors.atomic import new_folder
from llava.tensors.keymap import Rule
from llava.tensors.writer import write_json

LLAVA_TINY = VisionConfig(dim=192, n_layers=9, n_heads=3, mlp_dim=768, image_size=160, patch_size=16)
HIGHEST_SCALE = 50.0  # limit of the logit scale, the inverse of the temperature
CLIP_AND_NORM = (
    Rule("vision_model.post_layernorm.weight", "post_norm.weight"),
    Rule("vision_model.post_layernorm.bias", "post_norm.bias"),
    *CLIP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run."""

    glyphs: Path
    out: Path
    minutes: float | None = 5.0
    steps: int | None = None  # instead of minutes
    batch: int = 1024
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    entries: int | None = None  # number of glyphs used; None: all
    styles: tuple[str, ...] = ()  # styles to train on; (): all in the pack. Other styles are only evaluated
    words: int | None = None  # number of WORDS used; None: all
    max_objects: int = 6
    augment: bool = True  # False: glyphs in their original form, enough if no other style is needed
    seed: int = 0
    device: str = "auto"
    compiled: bool = True  # only on a GPU
    config: VisionConfig = LLAVA_TINY


class TextEncoder(nn.Module):
    """Embeds names: an MLP on the mean of word vectors plus a vector for the whole name."""

    def __init__(self, names: Sequence[str], topics: Sequence[str], width: int):
        super().__init__()
        bags = [tokens(name, topic) for name, topic in zip(names, topics, strict=True)]
        place = {word: i for i, word in enumerate(sorted({word for bag in bags for word in bag}))}
        matrix = torch.zeros(len(bags), len(place))
        for row, bag in zip(matrix, bags, strict=True):
            row[[place[word] for word in bag]] = 1 / len(bag)
        self.bags = nn.Buffer(matrix)
        self.words = nn.Parameter(torch.randn(len(place), width))
        self.own = nn.Parameter(torch.randn(len(bags), width))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self) -> Tensor:
        """The embeddings of all names, [C, E], normalized."""
        x = self.bags @ self.words + 0.5 * self.own
        return F.normalize(x + self.down(F.gelu(self.up(x))), dim=-1)


def tokens(name: str, topic: str) -> list[str]:
    """The tokens of a name. For a printed word, also each letter with its index."""
    printed = name.removeprefix("the word ") if name.startswith("the word ") else ""
    return [*re.findall(r"\w+", f"{name} {topic}"), *(f"{letter} at {i}" for i, letter in enumerate(printed))]


class Tower(nn.Module):
    """The vision tower with the heads it is trained with."""

    def __init__(self, config: VisionConfig, names: Sequence[str], topics: Sequence[str], width: int = 256):
        super().__init__()
        self.config = replace(config, select_layer=-2, select_feature="cls_patch")
        self.vision = Vision(self.config)  # without the last block, as LLaVA runs it
        self.last = Block(self.config)
        self.read_norm, self.post_norm = (nn.LayerNorm(config.dim, config.eps) for _ in range(2))
        self.read_head, self.last_head, self.image_head = (nn.Linear(config.dim, width) for _ in range(3))
        self.guide = nn.Linear(config.dim, 3 + 4)  # colour; left, top, right, bottom
        self.text = TextEncoder([*names, "background"], [*topics, "nothing"], width)
        self.caption = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.log_scale = nn.Parameter(torch.empty(3))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        vision, words = self.vision, (self.text.words.clone(), self.text.own.clone())
        initialise(self, self.config.n_layers)
        nn.init.trunc_normal_(vision.cls, std=0.02)
        vision.pos[1:] = 0.1 * waves(self.config.grid, self.config.dim)
        self.text.words.copy_(words[0])
        self.text.own.copy_(words[1])
        self.log_scale.fill_(2.5)

    def states(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state that LLaVA uses and the last one, normalized: [B, 3, S, S] -> [B, N, D] each."""
        read = self.vision(images)
        return self.read_norm(read), self.post_norm(self.last(read))

    def logits(self, read: Tensor, last: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the patches for all names, text [C, E], from both states: [B, P, C] each."""
        scale = self.log_scale.exp().clamp(max=HIGHEST_SCALE)
        one = scale[0] * F.normalize(self.read_head(read[:, 1:]), dim=-1)
        two = scale[1] * F.normalize(self.last_head(last[:, 1:]), dim=-1)
        return one @ text.T, two @ text.T

    def forward(self, images: Tensor, labels: Tensor, owners: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
        """The loss of a batch. Arguments as in `Scenes`."""
        read, last = self.states(images)
        text = self.text()
        one, two = self.logits(read, last, text)
        dense = named(one, labels, owners) + 0.5 * named(two, labels, owners)
        guide = self.guide(read[:, 1:]).float()
        color = F.l1_loss(guide[..., :3], F.avg_pool2d(images, self.config.patch_size).flatten(2).transpose(1, 2))
        edges = (guide[..., 3:] - self.edges(boxes, owners)).abs().mean(-1)
        sides = (edges * (owners >= 0)).sum() / (owners >= 0).sum().clamp(min=1)
        return dense + 0.1 * self.captions(last[:, 0], classes, text) + 0.3 * color + sides

    def edges(self, boxes: Tensor, owners: Tensor) -> Tensor:
        """The edges of each patch's object relative to the patch, in units of the image side, [B, P, 4]."""
        g, size = self.config.grid, self.config.image_size
        middle = (torch.arange(g, device=boxes.device) + 0.5) * self.config.patch_size
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        own = boxes.gather(1, owners.clamp(min=0)[..., None].expand(-1, -1, 4))
        return (own - torch.stack([x, y, x, y], dim=-1).flatten(0, 1)) / size

    def captions(self, token: Tensor, classes: Tensor, text: Tensor) -> Tensor:
        """Symmetric InfoNCE between class tokens [B, D] and captions (the mean embedding of the names in a scene)."""
        present = (classes >= 0).float()[..., None]
        mean = (text[classes.clamp(min=0)] * present).sum(1) / present.sum(1)
        scale = self.log_scale[2].exp().clamp(max=HIGHEST_SCALE)
        image = F.normalize(self.image_head(token), dim=-1)
        similar = (scale * image @ F.normalize(self.caption(mean), dim=-1).T).float()
        own = torch.arange(len(similar), device=similar.device)
        return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


def waves(grid: int, dim: int) -> Tensor:
    """Sines and cosines of row and column, [P, D], as initial position embeddings. arXiv:2205.01580."""
    rate = 1.0 / 100 ** (torch.arange(dim // 4) / max(1, dim // 4 - 1))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * rate for place in (x, y)]
    found = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(found, (0, dim - found.shape[1]))


def named(logits: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
    """Cross-entropy of the patches, logits [B, P, C].

    The weight of an object grows with its area, but more slowly. The whole background has a third of the weight of all
    objects.
    """
    target = torch.where(labels == BACKGROUND, logits.shape[-1] - 1, labels)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=UNCLEAR, reduction="none")
    loss = loss.view(labels.shape)
    size = (owners[:, :, None] == owners[:, None, :]).sum(-1)  # number of patches of the same object, [B, P]
    weight = (owners >= 0) / size.float().sqrt()
    bare = (labels == BACKGROUND).float()
    return (loss * weight).sum() / weight.sum().clamp(min=1) + 0.3 * (loss * bare).sum() / bare.sum().clamp(min=1)


@torch.no_grad()
def accuracy(tower: Tower, scenes: Scenes) -> dict[str, float]:
    """Fractions of patches and objects named correctly. An object is named by the sum of its patches' logits."""
    with autocast(scenes.images.device):
        read, last = tower.logits(*tower.states(scenes.images), tower.text())
    seen = scenes.owners >= 0
    own = F.one_hot(scenes.owners.clamp(min=0), scenes.classes.shape[1]) * seen[..., None]  # [B, P, K]
    objects = (own.transpose(1, 2).to(read.dtype) @ read)[..., :-1].argmax(-1)  # [B, K]
    shown = own.any(1)
    right = ((objects == scenes.classes) & shown).sum() / shown.sum().clamp(min=1)
    patches = [((x.argmax(-1) == scenes.labels) & seen).sum() / seen.sum().clamp(min=1) for x in (read, last)]
    return {"objects": float(right), "patches": float(patches[0]), "patches_last": float(patches[1])}


def train(options: Options) -> dict[str, float]:
    """Trains a tower, writes its folder, and returns the final metrics. Raises LlavaError."""
    device = resolve_device(options.device)
    budget = Budget(None if options.steps else options.minutes, options.steps)
    with new_folder(options.out, 64_000_000) as folder:
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        glyphs = Glyphs.load(options.glyphs).first(options.entries)
        if unknown := set(options.styles) - set(glyphs.styles):
            raise ConfigError(
                f"{options.glyphs}: has no style {', '.join(unknown)}; available styles: {', '.join(glyphs.styles)}"
            )
        sprites = load_sprites(
            glyphs, options.styles or glyphs.styles, WORDS[: options.words], device, plain=not options.augment
        )
        tower = Tower(options.config, sprites.names, sprites.topics).to(device)
        last = _run(options, budget, tower, sprites, glyphs)
        write(folder, tower)
    return last


def _run(options: Options, budget: Budget, tower: Tower, sprites: Sprites, glyphs: Glyphs) -> dict[str, float]:
    device, config, last = sprites.pixels.device, options.config, dict[str, float]()
    compiled = options.compiled and device.type == "cuda"
    sizes: dict[str, Any] = {
        "size": config.image_size, "patch": config.patch_size, "max_objects": options.max_objects
    }  # fmt: skip
    scenes = Composer(sprites, **sizes, seed=options.seed, augment=options.augment, compiled=compiled)
    fresh = {"": Composer(sprites, **sizes, seed=options.seed + 1, augment=False)}
    for style in set(glyphs.styles) - set(
        sprites.styles
    ):  # the words keep their class indices, but none are drawn here
        unseen = load_sprites(glyphs, [style], (), device, plain=True)
        fresh[f"{style}_"] = Composer(unseen, **sizes, seed=options.seed + 1, augment=False)
    loss = torch.compile(tower, dynamic=False) if compiled else tower

    def forward() -> Tensor:
        batch = scenes.draw(options.batch)
        with autocast(device):
            return loss(batch.images, batch.labels, batch.owners, batch.classes, batch.boxes)

    def report() -> dict[str, float]:
        last.clear()
        for name, composer in fresh.items():
            measured = accuracy(tower, composer.draw(256))
            last.update({f"{name}{key}": round(value, 4) for key, value in measured.items()})
        return last

    log = logger(options.out.with_name(f"{options.out.name}.jsonl"))
    rates: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, "samples": options.batch}
    fit(forward, tower.parameters(), budget, report, log, **rates)
    return last


def write(folder: Path, tower: Tower) -> None:
    """Writes a CLIP folder in Hugging Face format, with all blocks, in float16."""
    config = tower.config
    ours = {f"vision.{name}": tensor for name, tensor in tower.vision.state_dict().items()}
    ours |= {f"vision.blocks.{config.n_layers - 1}.{name}": t for name, t in tower.last.state_dict().items()}
    ours |= {f"post_norm.{name}": tensor for name, tensor in tower.post_norm.state_dict().items()}
    values = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.mlp_dim,
        "projection_dim": config.dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "attention_dropout": 0.0,
        "torch_dtype": "float16",
    }
    save(folder, ours, CLIP_AND_NORM, values)
    side = {"height": config.image_size, "width": config.image_size}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }
    write_json(folder / "preprocessor_config.json", processor)


def main(
    out: Out,
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    minutes: Minutes = 5.0,
    steps: Steps = None,
    batch: Annotated[int, typer.Option(help="scenes per step")] = 1024,
    lr: Rate = Options.lr,
    weight_decay: Decay = Options.weight_decay,
    entries: Annotated[int | None, typer.Option(help="use only this many glyphs of the pack")] = None,
    styles: Annotated[list[str], typer.Option(help="style to train on, repeatable; the others are evaluated")] = [],  # noqa: B006
    words: Annotated[int | None, typer.Option(help="use only this many printed words")] = None,
    objects: Annotated[int, typer.Option(help="maximum objects per scene, 1 to 6")] = 6,
    augment: Annotated[bool, typer.Option(help="vary the styles and colours of glyphs")] = True,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = True,
    dim: Size = LLAVA_TINY.dim,
    layers: Size = LLAVA_TINY.n_layers,
    heads: Size = LLAVA_TINY.n_heads,
    mlp: Size = LLAVA_TINY.mlp_dim,
    image_size: Annotated[int, typer.Option(help="in pixels")] = LLAVA_TINY.image_size,
    patch_size: Annotated[int, typer.Option(help="in pixels")] = LLAVA_TINY.patch_size,
) -> None:
    """Train a vision tower on drawn scenes, and write it as a CLIP folder."""
    try:
        config = VisionConfig(
            dim=dim, n_layers=layers, n_heads=heads, mlp_dim=mlp, image_size=image_size, patch_size=patch_size
        )
        options = Options(
            glyphs=glyphs, out=out, minutes=minutes, steps=steps, batch=batch, lr=lr, weight_decay=weight_decay,
            entries=entries, styles=tuple(styles), words=words, max_objects=objects, augment=augment, seed=seed,
            device=device, compiled=compile, config=config,
        )  # fmt: skip
        train(options)
    except LlavaError as error:
        typer.echo(f"tower: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)

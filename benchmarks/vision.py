"""How many pictures a second does the vision tower encode? Beside transformers' CLIP.

Pixels to the patch features of the layer that LLaVA reads, the one before the last. transformers runs that last layer
too: its interface has no way round it.

    python benchmarks/vision.py --size tiny
"""

from statistics import median
from typing import Annotated, Any

import bench
import torch
import typer
from bench import OURS, PEER, Place

from llava.config import VisionConfig
from llava.model.vision import Vision


def build(config: VisionConfig, place: Place) -> tuple[Vision, Any]:
    """Both towers, on the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        empty = Vision(config)
    ours = bench.filled(empty, place)
    tensors = bench.hub_tensors({f"vision.{name}": t for name, t in ours.state_dict().items()}, config.n_layers)
    return ours, bench.peer(CLIPVisionModel, CLIPVisionConfig(**bench.clip_settings(config)), tensors, place)


def vision(
    device: bench.Device = "auto",
    dtype: bench.DType = "bfloat16",
    layers: bench.Layers = None,
    size: bench.Size = "7b",
    runs: bench.Runs = 5,
    threads: bench.Threads = None,
    batch: Annotated[int, typer.Option("--batch", help="pictures at a time", min=1)] = 1,
    repeat: Annotated[int | None, typer.Option("--repeat", help="batches a run; default 1, on a GPU 20")] = None,
    out: bench.Out = None,
    save: bench.Save = False,
    commit: bench.Commit = None,
) -> None:
    """Pictures a second through CLIP, beside transformers."""
    place = Place.chosen(device, dtype, threads)
    repeats = repeat or (20 if place.on_gpu else 1)
    config = bench.clip_config(size, layers)
    model, theirs = build(config, place)
    shape = (batch, 3, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(place.device, place.dtype)

    def features() -> torch.Tensor:
        return model(pixels)

    def peer_features() -> torch.Tensor:
        return theirs(pixels, output_hidden_states=True).hidden_states[config.select_layer][:, 1:]

    with torch.inference_mode():
        error = bench.agree(features(), peer_features(), place)
        ceilings = bench.matmul_ceilings(place, size)
        contestants = {
            OURS: lambda: place.seconds(lambda: [features() for _ in range(repeats)]),
            PEER: lambda: place.seconds(lambda: [peer_features() for _ in range(repeats)]),
        }
        seconds = bench.alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    pictures = batch * repeats
    work = bench.tower_flops(config) * pictures
    ceiling = bench.best(ceilings, seconds)
    amounts = {OURS: work, PEER: work, **{c.name: c.amount for c in ceilings}}
    rates = {name: amount / median(seconds[name]) for name, amount in amounts.items()}
    bench.Result(
        benchmark=bench.tag("vision", layers=layers, size=size, extra=f"batch-{batch}" if batch > 1 else ""),
        question="How many pictures a second does the vision tower encode?",
        device=place.device.type,
        dtype=place.dtype_name,
        settings={
            "size": size, "layers": config.n_layers, "layers_needed": config.n_blocks, "batch": batch,
            "batches_a_run": repeats, "runs": runs, "peer_attention": theirs.config._attn_implementation,
        },
        seconds=seconds,
        unit="images/s",
        scale=lambda name, s: pictures / s if name in contestants else 1 / s,
        more={name: {"TFLOP/s": rate / 1e12, "of the ceiling": rate / ceiling} for name, rate in rates.items()},
        figures={"relative_difference": error, "TFLOP_an_image": bench.tower_flops(config) / 1e12},
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(vision)

"""How many pictures per second does the vision tower encode? Compared with transformers' CLIP.

From pixels to the patch features of the second-to-last layer, which LLaVA reads. transformers also runs the last
layer, which its interface cannot skip.

    python benchmarks/vision.py --size tiny
"""

from typing import Annotated, Any

import torch
import typer
from ceilings import best, matmul_ceilings, rates, tower_flops
from peers import check_agreement, clip_settings, hub_tensors, peer
from result import OURS, PEER, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, clip_config, with_random_weights
from timing import Device, DType, Runs, Target, Threads, alternate

from llava.config import VisionConfig
from llava.model.vision import Vision


def build(config: VisionConfig, target: Target) -> tuple[Vision, Any]:
    """Our tower and transformers', with the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        empty = Vision(config)
    ours = with_random_weights(empty, target)
    tensors = hub_tensors({f"vision.{name}": t for name, t in ours.state_dict().items()}, config.n_layers)
    return ours, peer(CLIPVisionModel, CLIPVisionConfig(**clip_settings(config)), tensors, target)


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Runs = 5,
    threads: Threads = None,
    batch: Annotated[int, typer.Option("--batch", help="pictures per batch", min=1)] = 1,
    repeat: Annotated[int | None, typer.Option("--repeat", help="batches per run; default: 1 (on a GPU: 20)")] = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Pictures per second through CLIP, compared with transformers."""
    target = Target.from_options(device, dtype, threads)
    repeats = repeat or (20 if target.on_gpu else 1)
    config = clip_config(size, layers)
    model, theirs = build(config, target)
    shape = (batch, 3, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(target.device, target.dtype)

    def features() -> torch.Tensor:
        return model(pixels)

    def peer_features() -> torch.Tensor:
        return theirs(pixels, output_hidden_states=True).hidden_states[config.select_layer][:, 1:]

    with torch.inference_mode():
        error = check_agreement(features(), peer_features(), target)
        ceilings = matmul_ceilings(target, size)
        contestants = {
            OURS: lambda: target.seconds(lambda: [features() for _ in range(repeats)]),
            PEER: lambda: target.seconds(lambda: [peer_features() for _ in range(repeats)]),
        }
        seconds = alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    pictures = batch * repeats
    work = tower_flops(config) * pictures
    ceiling = best(ceilings, seconds)
    speeds = rates(work, contestants, ceilings, seconds)
    Result(
        benchmark=benchmark_name("vision", layers=layers, size=size, extra=f"batch-{batch}" if batch > 1 else ""),
        question="How many pictures per second does the vision tower encode?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": config.n_layers, "layers_needed": config.n_blocks, "batch": batch,
            "batches_a_run": repeats, "runs": runs, "peer_attention": theirs.config._attn_implementation,
        },
        seconds=seconds,
        unit="images/s",
        scale=lambda name, s: pictures / s if name in contestants else 1 / s,
        more={name: {"TFLOP/s": rate / 1e12, "of the ceiling": rate / ceiling} for name, rate in speeds.items()},
        figures={"relative_difference": error, "TFLOP_an_image": tower_flops(config) / 1e12},
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

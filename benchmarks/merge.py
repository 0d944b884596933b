"""How fast are apply-delta, merge-lora and convert, and how much memory do they need?

Writes a random base, a delta and a LoRA with the real shapes in float16 and runs each job in a separate process.
`peak_anon_gb` is the most private memory that the process held (RssAnon, sampled, including torch's import). "copy" is
the minimum work of a merge: it reads base and delta through one buffer and writes as many bytes as one of them has.
"original" is the original's procedure: transformers loads base and delta, one is added to the other, the sum is saved.
MB/s refers to the bytes written. llava's commands are timed from the start of the process, the other two from after
their imports.

    python benchmarks/merge.py --size tiny
    python benchmarks/merge.py --size 13b --layers 4
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from processes import LLAVA, Folder, Series, Task, job, run_watched, scratch_folder, weight_files
from random_checkpoint import write_clip
from result import OURS, ROOT, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Noise, Size, clip_config, llava_config
from timing import Target

from llava.formats.llava import RULES
from llava.model.llava import shapes
from llava.tensors import keymap
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import OutputTensor, write_json, write_shards
from tests import tiny

NEW_TOKENS, RANK, ALPHA = 3, 128, 256
TARGET = Target(device=torch.device("cpu"), dtype=torch.float16)


def random_items(shape_of: dict[str, tuple[int, ...]], noise: Noise, norms: float) -> list[OutputTensor]:
    """Random tensors by their names on disk. `norms`: the value of all norm weights, 0 in a delta."""

    def item(name: str, shape: tuple[int, ...]) -> OutputTensor:
        def values() -> Iterator[torch.Tensor]:
            tensor = torch.full(shape, norms, dtype=torch.float16)
            if "norm" not in name:
                noise.fill(tensor)
            yield tensor

        return OutputTensor(name=name, dtype=torch.float16, shape=shape, chunks=values, where=name)

    return [item(name, shape) for name, shape in shape_of.items()]


def on_disk(size: str, layers: int | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the language model's tensors by their names on disk."""
    found = {}
    for ours, shape in shapes(llava_config(size, layers, vision=False)).items():
        names = keymap.disk_names(ours, RULES)
        found |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    return found


def projector(size: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the projector's tensors by their names on disk."""
    config = llava_config(size, 1, vision=True)
    named = {name: shape for name, shape in shapes(config).items() if name.startswith("projector.")}
    return {name.replace("projector.", "model.mm_projector."): shape for name, shape in named.items()}


def settings(size: str, layers: int | None, clip: Path | None, **more: Any) -> dict[str, Any]:
    """The config.json of a LLaVA or, without `clip`, of a plain Llama."""
    sizes = llava_config(size, layers, vision=False).decoder
    own = {
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.mlp_dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "vocab_size": sizes.vocab_size,
        **tiny.LLAMA_1,
        **more,
    }
    if clip is None:
        return tiny.llama_config(**own)
    return tiny.llava_config(**own, mm_hidden_size=clip_config(size).dim, mm_vision_tower=str(clip))


def write_folders(folder: Path, size: str, layers: int | None) -> None:
    """Writes base, delta, lora and clip."""
    noise = Noise(TARGET)
    for name in ("base", "delta", "lora", "clip"):
        (folder / name).mkdir()
    clip, lora = folder / "clip", folder / "lora"
    write_clip(clip, size, noise)
    model = on_disk(size, layers)
    write_shards(folder / "base", random_items(model, noise, norms=1.0))
    write_json(folder / "base" / "config.json", settings(size, layers, None))
    tiny.write_tokenizer(folder / "base")
    longer = {
        name: (shape[0] + NEW_TOKENS * name.endswith(("embed_tokens.weight", "lm_head.weight")), *shape[1:])
        for name, shape in model.items()
    }
    write_shards(folder / "delta", random_items(longer | projector(size), noise, norms=0.0))
    rows = model["lm_head.weight"][0] + NEW_TOKENS
    write_json(folder / "delta" / "config.json", settings(size, layers, clip, vocab_size=rows))
    tiny.write_tokenizer(folder / "delta")
    pairs: dict[str, tuple[int, ...]] = {}
    for name, shape in model.items():
        if "_proj" in name:
            module = "base_model.model." + name.removesuffix(".weight")
            pairs |= {f"{module}.lora_A.weight": (RANK, shape[1]), f"{module}.lora_B.weight": (shape[0], RANK)}
    write_torch(lora / "adapter_model.bin", random_items(pairs, noise, norms=0.0), lambda n: None)
    beside = {f"base_model.model.{name}": shape for name, shape in projector(size).items()}
    write_torch(lora / "non_lora_trainables.bin", random_items(beside, noise, norms=0.0), lambda n: None)
    write_json(lora / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA})
    write_json(lora / "config.json", settings(size, layers, clip))


def measure(folder: Path, series: Series, runs: int, with_original: bool) -> int:
    """Runs all jobs and returns the number of bytes that each of them writes."""
    base, delta, lora = (folder / name for name in ("base", "delta", "lora"))
    merged, native = folder / "merged", folder / "native"
    apply = [*LLAVA, "apply-delta", "--base", str(base), "--delta", str(delta), "--target", str(merged)]
    merge = [*LLAVA, "merge-lora", "--base", str(base), "--lora", str(lora), "--target", str(merged)]
    both = [base, delta]
    tasks = [
        job("copy", "copy-delta", folder, TARGET, reads=both, makes=folder / "copied"),
        Task(f"{OURS} apply-delta", apply, both, False, merged),
        Task(f"{OURS} merge-lora", merge, [base], False, merged),
    ]
    if with_original:
        tasks.append(job("original's way", "add-delta", folder, TARGET, reads=both, makes=folder / "summed"))
    series.run(tasks, runs)
    n_bytes = sum(file.stat().st_size for file in weight_files(delta))
    shutil.rmtree(lora)
    run_watched(apply)
    shutil.rmtree(base)
    shutil.rmtree(delta)
    convert = [*LLAVA, "convert", str(merged), str(native)]
    tasks = [
        Task(f"{OURS} convert", [*convert, "--no-check"], [merged], False, native),
        Task(f"{OURS} convert, logits compared", convert, [merged], False, native),
    ]
    series.run(tasks, runs)
    return n_bytes


def main(
    layers: Layers = None,
    size: Size = "7b",
    runs: Annotated[int, typer.Option("--runs", help="runs of each job", min=1)] = 1,
    with_original: Annotated[bool, typer.Option("--original/--no-original", help="also time the original")] = True,
    folder: Folder = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Time and memory of merging and converting."""
    n_bytes = 2 * sum(torch.Size(shape).numel() for shape in on_disk(size, layers).values())
    os.environ["PYTHONPATH"] = str(ROOT)
    series = Series()
    with scratch_folder(folder, 3.4 * n_bytes) as scratch:
        write_folders(scratch, size, layers)
        written = measure(scratch, series, runs, with_original)
    seconds = series.seconds
    ours = [name for name in seconds if name.startswith(OURS)]
    pairs = [(f"{OURS} apply-delta", "copy"), (f"{OURS} apply-delta", "original's way")]
    Result(
        benchmark=benchmark_name("merge", layers=layers, size=size),
        question="How fast are apply-delta, merge-lora and convert, and how much memory do they need?",
        device="cpu",
        dtype="float16",
        settings={
            "size": size, "layers": layers or llava_config(size, None, vision=False).decoder.n_layers,
            "gb_on_disk": n_bytes / 1e9, "runs": runs, "page_cache": "warm as far as it reaches",
            "lora": f"rank {RANK} of every matrix",
        },
        seconds=seconds,
        more=series.memory(),
        figures={f"{name}, MB/s": written / 1e6 / median(seconds[name]) for name in ("copy", *ours)},
        pairs=tuple(pair for pair in pairs if pair[1] in seconds),
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

"""How fast are apply-delta, merge-lora and convert, and how much memory do they need? Beside the original's way.

Writes a random base, a delta and a LoRA of the real shapes in float16 and runs each job in a process of its own.
`peak_anon_gb` is the most private memory that process held (RssAnon, sampled; torch's own import included). "copy" is
what a merge must at least do: read base and delta through one buffer and write as many bytes as one of them has.
"original" is the original's procedure: transformers opens base and delta whole, adds one to the other, and saves.
MB/s are of what is written. Seconds
of llava's commands begin with the process, those of the two others when it has its imports.

    python benchmarks/merge.py --size tiny
    python benchmarks/merge.py --size 13b --layers 4
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import bench
import torch
import typer
from bench import OURS, Place
from load import Bench, Task, read_files, weight_files, write_clip

from llava.checkpoint import keymap
from llava.checkpoint.write import Item, write_json, write_shards
from llava.convert.torchzip import write_torch
from llava.model.llava import shapes
from tests import tiny

NEW_TOKENS, RANK, ALPHA = 3, 128, 256
ORIGINAL = "original"  # run as a job of this file
PLACE = Place(device=torch.device("cpu"), dtype=torch.float16)
DECODER = "decoder."


# ----------------------------------------------------------------------------------------------------- the folders


def random_items(shape_of: dict[str, tuple[int, ...]], noise: bench.Noise, norms: float) -> list[Item]:
    """Tensors by their names on disk; `norms`: the value of final and other scales, 0 in a difference."""

    def item(name: str, shape: tuple[int, ...]) -> Item:
        def values() -> Iterator[torch.Tensor]:
            tensor = torch.full(shape, norms, dtype=torch.float16)
            if "norm" not in name:
                noise.into(tensor)
            yield tensor

        return Item(name=name, dtype=torch.float16, shape=shape, parts=values, where=name)

    return [item(name, shape) for name, shape in shape_of.items()]


def on_disk(size: str, layers: int | None) -> dict[str, tuple[int, ...]]:
    """The language model's tensors under the hub's names."""
    found = {}
    for ours, shape in shapes(bench.config(size, layers, vision=False)).items():
        names = keymap.disk_names(ours, keymap.LLAVA)
        found |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    return found


def projector(size: str) -> dict[str, tuple[int, ...]]:
    config = bench.config(size, 1, vision=True)
    named = {name: shape for name, shape in shapes(config).items() if name.startswith("projector.")}
    return {name.replace("projector.", "model.mm_projector."): shape for name, shape in named.items()}


def settings(size: str, layers: int | None, clip: Path | None, **more: Any) -> dict[str, Any]:
    sizes = bench.config(size, layers, vision=False).decoder
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
    return tiny.llava_config(**own, mm_hidden_size=bench.clip_config(size).dim, mm_vision_tower=str(clip))


def write_folders(folder: Path, size: str, layers: int | None) -> None:
    """base, delta, lora and clip."""
    noise = bench.Noise(PLACE)
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


# ------------------------------------------------------------------------------------------------------ the peers


def copy(folder: Path) -> None:
    """Reads base and delta, writes as much as one of them."""
    (folder / "copied").mkdir()
    buffer = memoryview(bytearray(16 * 2**20))
    for file in weight_files(folder / "delta"):
        with file.open("rb", buffering=0) as source, (folder / "copied" / file.name).open("wb", buffering=0) as out:
            while n := source.readinto(buffer):
                out.write(buffer[:n])
    read_files(weight_files(folder / "base"))


def original(folder: Path) -> None:
    """`apply_delta` of the original: two models in memory, one is added to the other, the sum is saved."""
    from transformers import LlamaForCausalLM

    base, delta = (
        LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float16, low_cpu_mem_usage=True)
        for name in ("base", "delta")
    )
    added = base.state_dict()
    for name, value in delta.state_dict().items():
        rows = added[name]
        if value.shape == rows.shape:
            value += rows
        else:
            value[: rows.shape[0], : rows.shape[1]] += rows
    delta.save_pretrained(folder / "summed")


JOBS = {"copy": copy, ORIGINAL: original}


# ------------------------------------------------------------------------------------------------------ measuring


def measure(folder: Path, found: Bench, runs: int, with_original: bool) -> dict[str, int]:
    """All jobs; returns the bytes that each writes."""
    base, delta, lora = (folder / name for name in ("base", "delta", "lora"))
    merged, native = folder / "merged", folder / "native"
    llava = [sys.executable, "-m", "llava.cli"]
    job = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--job"]
    apply = [*llava, "apply-delta", "--base", str(base), "--delta", str(delta), "--target", str(merged)]
    merge = [*llava, "merge-lora", "--base", str(base), "--lora", str(lora), "--target", str(merged)]
    tasks = [
        Task("copy", [*job, "copy"], [base, delta], makes=folder / "copied"),
        Task(f"{OURS} apply-delta", apply, [base, delta], False, merged),
        Task(f"{OURS} merge-lora", merge, [base], False, merged),
    ]
    if with_original:
        tasks.append(Task("original's way", [*job, ORIGINAL], [base, delta], makes=folder / "summed"))
    found.series(tasks, runs)
    size = sum(file.stat().st_size for file in weight_files(delta))
    shutil.rmtree(lora)
    found.series([Task("for convert", apply, [base, delta], False)], 1)
    del found.measured["for convert"]
    shutil.rmtree(base)
    shutil.rmtree(delta)
    convert = [*llava, "convert", str(merged), str(native)]
    found.series(
        [
            Task(f"{OURS} convert", [*convert, "--no-check"], [merged], False, native),
            Task(f"{OURS} convert, logits compared", convert, [merged], False, native),
        ],
        runs,
    )
    return dict.fromkeys(found.measured, size)


def merge(
    layers: bench.Layers = None,
    size: bench.Size = "7b",
    runs: Annotated[int, typer.Option("--runs", help="of each", min=1)] = 1,
    with_original: Annotated[bool, typer.Option("--original/--no-original", help="the original's way too")] = True,
    folder: Annotated[Path | None, typer.Option("--folder", help="where there is room; default: the temporary")] = None,
    out: bench.Out = None,
    save: bench.Save = False,
    commit: bench.Commit = None,
    job: Annotated[str | None, typer.Option("--job", hidden=True)] = None,
) -> None:
    """Seconds and memory of putting together and converting."""
    if job:
        assert folder is not None
        started = time.perf_counter()
        JOBS[job](folder)
        print(json.dumps({"seconds": time.perf_counter() - started}))
        return
    n_bytes = 2 * sum(torch.Size(shape).numel() for shape in on_disk(size, layers).values())
    where = Path(folder or tempfile.gettempdir()).resolve()
    need, free = 3.4 * n_bytes, shutil.disk_usage(where).free
    print(f"needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; all is removed at the end")
    if free < need:
        raise SystemExit("too little: name a folder with more room with --folder")
    os.environ["PYTHONPATH"] = str(bench.ROOT)
    with tempfile.TemporaryDirectory(prefix="llava-merge-", dir=where) as name:
        write_folders(Path(name), size, layers)
        found = Bench(PLACE, None)
        written = measure(Path(name), found, runs, with_original)
    seconds = {name: one.seconds for name, one in found.measured.items()}
    ours = [name for name in seconds if name.startswith(OURS)]
    pairs = [(f"{OURS} apply-delta", "copy"), (f"{OURS} apply-delta", "original's way")]
    bench.Result(
        benchmark=bench.tag("merge", layers=layers, size=size),
        question="How fast are apply-delta, merge-lora and convert, and how much memory do they need?",
        device="cpu",
        dtype="float16",
        settings={
            "size": size, "layers": layers or bench.config(size, None, vision=False).decoder.n_layers,
            "gb_on_disk": n_bytes / 1e9, "runs": runs, "page_cache": "warm as far as it reaches",
            "lora": f"rank {RANK} of every matrix",
        },
        seconds=seconds,
        more=found.more(),
        figures={f"{name}, MB/s": written[name] / 1e6 / median(seconds[name]) for name in ("copy", *ours)},
        pairs=tuple(pair for pair in pairs if pair[1] in seconds),
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(merge)

"""How long does it take to load, convert and start a LLaVA-1.5-7B from disk, and how much memory? Beside transformers.

Writes a random checkpoint of the real shapes in bfloat16 (about 14 GB; 30 GB of disk in all, removed at the end) and
runs each job in a process of its own. `peak_anon_gb` is the most private memory the process held (RssAnon, sampled;
torch's own import included), `peak_file_gb` the most of mapped files (RssFile). Files are read once before each timed
job ("warm": from the page cache as far as it holds them; `cached` says how far). --cold adds runs with an empty cache.

Seconds of `read`, `copy` and the loads begin when python and its imports are there; those of the conversions and of
`llava ask` begin with the process.

    python benchmarks/load.py --size tiny
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import bench
import torch
import typer
from bench import OURS, PEER, ROOT, Place

from llava.checkpoint import keymap
from llava.checkpoint.write import Item, write_json, write_shards
from llava.model.llava import shapes
from tests import tiny

CHUNK = 16 * 2**20  # bytes a read
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PICTURE, QUESTION = 336, "What is in the picture?"  # pixels a side
NAMED_IDS = range(300, 500)  # pieces that are text: the random head lets no other be the likeliest


# ------------------------------------------------------------------------------------------------------ the checkpoint


def write_checkpoint(folder: Path, size: str, layers: int | None) -> Path:
    """A merged LLaVA-1.5 in bfloat16 and its CLIP, tensor by tensor. Returns the LLaVA's folder."""
    config = bench.config(size, layers, vision=True)
    assert config.vision is not None
    noise = bench.Noise(Place(device=torch.device("cpu"), dtype=torch.bfloat16))
    llava, clip = folder / "llava", folder / "clip"
    llava.mkdir()
    clip.mkdir()
    tensors = {name: shape for name, shape in shapes(config).items() if not name.startswith("vision.")}
    write_shards(llava, [item for name, shape in tensors.items() for item in items(name, shape, keymap.LLAVA, noise)])
    sizes = config.decoder
    settings = tiny.llava_config(
        hidden_size=sizes.dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        vocab_size=sizes.vocab_size,
        mm_hidden_size=config.vision.dim,
        mm_vision_tower=str(clip),
        torch_dtype="bfloat16",
    )
    write_json(llava / "config.json", settings)
    tiny.write_tokenizer(llava)
    write_clip(clip, size, noise)
    return llava


def write_clip(folder: Path, size: str, noise: bench.Noise) -> None:
    """The whole tower, the block behind the layer that is read included."""
    tower = bench.clip_config(size)
    written: list[Item] = []
    names: dict[str, tuple[int, ...]] = {}
    for i in range(tower.n_layers):
        names |= {f"vision.blocks.{i}.{name}": shape for name, shape in block_shapes(tower.dim, tower.mlp_dim).items()}
    names |= {
        "vision.cls": (tower.dim,),
        "vision.patch.weight": (tower.dim, 3, tower.patch_size, tower.patch_size),
        "vision.pos": (tower.grid**2 + 1, tower.dim),
        "vision.pre_norm.weight": (tower.dim,),
        "vision.pre_norm.bias": (tower.dim,),
    }
    for name, shape in names.items():
        written += items(name, shape, keymap.CLIP, noise)
    write_shards(folder, written)
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": bench.clip_settings(tower)})
    pixels = {"height": tower.image_size, "width": tower.image_size}
    processor = {"size": {"shortest_edge": tower.image_size}, "crop_size": pixels, "resample": 3}
    write_json(folder / "preprocessor_config.json", {**processor, "image_mean": tiny.MEAN, "image_std": tiny.STD})


def block_shapes(d: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """One block of the tower, under our names."""
    layers = {"attn.qkv": (3 * d, d), "attn.out": (d, d), "mlp.up": (mlp, d), "mlp.down": (d, mlp)}
    found: dict[str, tuple[int, ...]] = {f"{norm}.{kind}": (d,) for norm in ("attn_norm", "mlp_norm")
                                         for kind in ("weight", "bias")}  # fmt: skip
    for name, shape in layers.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def items(ours: str, shape: Sequence[int], rules: Sequence[keymap.Rule], noise: bench.Noise) -> Iterator[Item]:
    """One of our tensors as the hub has it: random values, scales of norms 1; what we stack, in its parts."""
    if ours.startswith("projector."):  # the table also knows a projector of one layer, which comes first
        names = [f"model.mm_projector.{ours.removeprefix('projector.')}"]
    else:
        names = keymap.disk_names(ours, rules)
    part = (shape[0] // len(names), *shape[1:])

    def values() -> Iterator[torch.Tensor]:
        tensor = torch.ones(part, dtype=torch.bfloat16)
        if not ours.endswith("norm.weight"):
            noise.into(tensor)
        if ours == "decoder.head.weight":
            tensor[: NAMED_IDS.start] = 0
            tensor[NAMED_IDS.stop :] = 0
        yield tensor

    for name in names:
        yield Item(name=name, dtype=torch.bfloat16, shape=part, parts=values, where=name)


# ---------------------------------------------------------------------------------------- processes and their memory


@dataclass
class Measured:
    """Runs of one job."""

    seconds: list[float] = field(default_factory=list)
    anon: list[int] = field(default_factory=list)  # bytes
    file: list[int] = field(default_factory=list)  # bytes
    cached: list[float] = field(default_factory=list)  # share of the files in the page cache before the run


def watched(argv: Sequence[str]) -> tuple[float, int, int, str]:
    """Runs a process to its end: seconds, the most of RssAnon and of RssFile, stdout."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=ROOT)
        status = Path(f"/proc/{process.pid}/status")
        anon = file = 0
        while process.poll() is None:
            held = resident(status)
            anon, file = max(anon, held[0]), max(file, held[1])
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(argv)} failed:\n{err.read()}")
        return seconds, anon, file, out.read()


def resident(status: Path) -> tuple[int, int]:
    """RssAnon and RssFile in bytes; 0 once the process is gone."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    except OSError:
        return 0, 0
    anon, file = (int(lines[name].split()[0]) * 1024 if name in lines else 0 for name in ("RssAnon", "RssFile"))
    return anon, file


def weight_files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]


def read_files(files: Sequence[Path]) -> int:
    """One after the other, through one buffer."""
    buffer, total = bytearray(CHUNK), 0
    for file in files:
        with file.open("rb", buffering=0) as source:
            while n := source.readinto(buffer):
                total += n
    return total


def cached_share(files: Sequence[Path]) -> float | None:
    """How much of the files the page cache holds; None where the `fincore` command is not there."""
    if not shutil.which("fincore"):
        return None
    done = subprocess.run(["fincore", "-bnro", "RES", *map(str, files)], capture_output=True, text=True, check=False)
    total = sum(file.stat().st_size for file in files)
    held = sum(map(int, done.stdout.split())) if done.returncode == 0 else 0
    return min(1.0, held / total) if held and total else None


def drop_caches() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


# ----------------------------------------------------------------------------------------------- jobs inside a process


HELD: list[object] = []  # what was loaded: freeing it is not part of the time


def job_read(folder: Path, place: Place) -> None:
    read_files(weight_files(folder))


def job_ours(folder: Path, place: Place) -> None:
    import llava

    HELD.append(llava.load(folder, dtype=place.dtype, device=place.device))


def job_ours_text(folder: Path, place: Place) -> None:
    import llava

    HELD.append(llava.load(folder, dtype=place.dtype, device=place.device, vision=False))


def job_peer(folder: Path, place: Place) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=place.dtype)
    HELD.append(model.to(place.device))


def job_peer_save(folder: Path, place: Place) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder.parent / "saved")
    HELD.append(model)


def job_copy(folder: Path, place: Place) -> None:
    """What a conversion must at least do: read all, write all."""
    target = folder.parent / "copied"
    target.mkdir()
    buffer = memoryview(bytearray(CHUNK))
    for file in weight_files(folder):
        with file.open("rb", buffering=0) as source, (target / file.name).open("wb", buffering=0) as out:
            while n := source.readinto(buffer):
                out.write(buffer[:n])


JOBS: dict[str, tuple[Callable[[Path, Place], None], str]] = {  # what runs, and what is imported before the clock
    "read": (job_read, "torch"),
    "ours": (job_ours, "llava.assistant"),
    "ours-text": (job_ours_text, "llava.assistant"),
    "peer": (job_peer, "transformers.models.llama.modeling_llama"),
    "peer-save": (job_peer_save, "transformers.models.llama.modeling_llama"),
    "copy": (job_copy, "torch"),
}


def run_job(name: str, folder: Path, place: Place) -> None:
    """In the child: seconds on stdout."""
    import importlib

    job, needed = JOBS[name]
    importlib.import_module(needed)
    if place.on_gpu:
        torch.zeros(1, device=place.device)
    print(json.dumps({"seconds": place.seconds(lambda: job(folder, place))}))


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Task:
    """A job to be run several times."""

    name: str
    argv: list[str]
    reads: list[Path]  # folders whose weights are read
    inside: bool = True  # the process tells its own seconds, imports excluded
    makes: Path | None = None  # removed after each run


class Bench:
    """Runs tasks and keeps what was measured."""

    def __init__(self, place: Place, threads: int | None):
        self.place, self.threads = place, threads
        self.measured: dict[str, Measured] = {}

    def job(self, name: str, job: str, folder: Path, **more: Any) -> Task:
        """One of JOBS on a folder, in a fresh process."""
        options = ["--device", str(self.place.device), "--dtype", self.place.dtype_name]
        options += ["--threads", str(self.threads)] if self.threads else []
        argv = [sys.executable, str(Path(__file__).resolve()), "--job", job, "--folder", str(folder), *options]
        return Task(name, argv, [folder, *more.pop("also", [])], **more)

    def series(self, tasks: Sequence[Task], runs: int, *, cold: bool = False) -> None:
        """All tasks once a round, the order turned round every time."""
        for i in range(runs):
            for task in tasks if i % 2 == 0 else list(reversed(tasks)):
                self._once(task, cold)

    def _once(self, task: Task, cold: bool) -> None:
        files = weight_files(*task.reads)
        os.sync()  # what an earlier job wrote is on disk
        if cold:
            drop_caches()
        else:
            read_files(files)
        name = task.name + (", cold" if cold else "")
        measured = self.measured.setdefault(name, Measured())
        if (share := cached_share(files) if files else None) is not None:
            measured.cached.append(share)
        seconds, anon, file, out = watched(task.argv)
        measured.seconds.append(json.loads(out.splitlines()[-1])["seconds"] if task.inside else seconds)
        measured.anon.append(anon)
        measured.file.append(file)
        if task.makes:
            shutil.rmtree(task.makes) if task.makes.is_dir() else task.makes.unlink()
        print(f"{name}: {measured.seconds[-1]:.2f} s, {anon / 1e9:.2f} GB private", flush=True)

    def first_byte(self, name: str, argv: Sequence[str], reads: Sequence[Path], runs: int) -> None:
        """From the start of a process to the first byte on its stdout."""
        measured = self.measured.setdefault(name, Measured())
        for _ in range(runs):
            read_files(weight_files(*reads))
            with tempfile.TemporaryFile("w+") as err:
                started = time.perf_counter()
                process = subprocess.Popen(
                    argv, stdout=subprocess.PIPE, stderr=err, stdin=subprocess.DEVNULL, cwd=ROOT, bufsize=0
                )
                assert process.stdout is not None
                first = process.stdout.read(1)
                measured.seconds.append(time.perf_counter() - started)
                answer = (first + process.stdout.read()).decode(errors="replace").strip()
                if process.wait() or not answer:
                    err.seek(0)
                    raise SystemExit(
                        f"{' '.join(argv)} gave {answer!r} and exit code {process.returncode}\n{err.read()}"
                    )
            print(f"{name}: {measured.seconds[-1]:.2f} s", flush=True)

    def more(self) -> dict[str, dict[str, float]]:
        """Figures beside the seconds."""
        told: dict[str, dict[str, float]] = {}
        for name, one in self.measured.items():
            told[name] = {"peak_anon_gb": max(one.anon) / 1e9, "peak_file_gb": max(one.file) / 1e9} if one.anon else {}
            if one.cached:
                told[name]["cached"] = min(one.cached)
        return told


def load(
    device: bench.Device = "cpu",
    dtype: bench.DType = "bfloat16",
    layers: bench.Layers = None,
    size: bench.Size = "7b",
    runs: Annotated[int | None, typer.Option("--runs", help="of each; default 5, tiny 1", min=1)] = None,
    threads: bench.Threads = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="where there is room; default: the temporary")] = None,
    convert_runs: Annotated[int | None, typer.Option("--convert-runs", help="default 3, tiny 1", min=1)] = None,
    picture_runs: Annotated[int, typer.Option("--picture-runs", help="timed runs of `llava ask` with a picture")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="also with an empty page cache; needs root")] = False,
    out: bench.Out = None,
    save: bench.Save = False,
    commit: bench.Commit = None,
    job: Annotated[str | None, typer.Option("--job", hidden=True)] = None,
) -> None:
    """Seconds and memory of loading, converting and starting."""
    place = Place.chosen(device, dtype, threads)
    if job:
        assert folder is not None
        return run_job(job, folder, place)
    runs, convert_runs = runs or (5 if size == "7b" else 1), convert_runs or (3 if size == "7b" else 1)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if cold and not os.access(DROP_CACHES, os.W_OK):
        raise typer.BadParameter("--cold: the page cache cannot be emptied here (needs root)")
    n_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes(bench.config(size, layers, vision=True)).values())
    where = Path(folder or tempfile.gettempdir()).resolve()
    need, free = 2.2 * n_bytes, shutil.disk_usage(where).free
    print(f"needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; all is removed at the end")
    if free < need:
        raise SystemExit("too little: name a folder with more room with --folder")
    with tempfile.TemporaryDirectory(prefix="llava-load-", dir=where) as name:
        measured = measure(Path(name), Bench(place, threads), size, layers, (runs, convert_runs, picture_runs), cold)
    seconds = {name: one.seconds for name, one in measured.measured.items()}
    bench.Result(
        benchmark=bench.tag("load", layers=layers, size=size),
        question="How long do loading, converting and starting take, and how much memory?",
        device=place.device.type,
        dtype=place.dtype_name,
        settings={
            "size": size, "layers": layers or bench.config(size, None, vision=False).decoder.n_layers,
            "page_cache": "warm: read once before each run", "cold_too": cold, "gb_on_disk": n_bytes / 1e9,
            "runs": runs, "convert_runs": convert_runs, "picture_runs": picture_runs,
        },
        seconds=seconds,
        more=measured.more(),
        figures={f"{name}, GB/s": n_bytes / 1e9 / median(seconds[name]) for name in ("read LLaVA", "llava load LLaVA")},
        pairs=pairs(seconds),
        commit=commit,
    ).report(out, save)  # fmt: skip


def pairs(seconds: dict[str, list[float]]) -> tuple[tuple[str, str], ...]:
    """What is held against what."""
    wanted = (
        (f"{OURS} load LLaVA", "read LLaVA"),
        (f"{OURS} load Llama", "read Llama"),
        (f"{OURS} load Llama", f"{PEER} load Llama"),
        (f"{OURS} convert to native", "copy LLaVA"),
        (f"{OURS} convert to llama", "copy LLaVA"),
        ("model.pth", "copy LLaVA"),
    )
    both = ((a + end, b + end) for a, b in wanted for end in ("", ", cold"))
    return tuple(pair for pair in both if pair[0] in seconds and len(seconds[pair[0]]) == len(seconds.get(pair[1], [])))


def measure(folder: Path, found: Bench, size: str, layers: int | None, runs: tuple[int, int, int], cold: bool) -> Bench:
    """All jobs, one kind after the other; what is no longer needed goes, for room on the disk."""
    n, n_convert, n_picture = runs
    started = time.perf_counter()
    source = write_checkpoint(folder, size, layers)
    print(f"random checkpoint written in {time.perf_counter() - started:.0f} s", flush=True)
    clip, native, llama = folder / "clip", folder / "native", folder / "plain"
    convert = [sys.executable, "-m", "llava.cli", "convert", str(source)]
    both = [source, clip]
    loads = [
        found.job("read LLaVA", "read", source, also=[clip]),
        found.job(f"{OURS} load LLaVA", "ours", source, also=[clip]),
    ]
    found.series([Task("python starts, import torch", [sys.executable, "-c", "import torch"], [], inside=False)], n)
    found.series(loads, n)
    if cold:
        found.series(loads, n, cold=True)
    pth = [sys.executable, str(ROOT / "scripts" / "convert_hf_checkpoint.py"), "--checkpoint_dir", str(source)]
    to_llama = Task(f"{OURS} convert to llama", [*convert, str(llama), "--to", "llama"], [source], False, llama)
    found.series(
        [
            found.job("copy LLaVA", "copy", source, makes=folder / "copied"),
            Task("model.pth", pth, [source], False, source / "model.pth"),
            to_llama,
            Task(f"{OURS} convert to native", [*convert, str(native)], both, False, native),
        ],
        n_convert,
    )
    ask(found, folder, [*convert, str(native)], native, n, n_picture)
    watched(to_llama.argv)
    shutil.rmtree(source)
    texts = [
        found.job("read Llama", "read", llama),
        found.job(f"{OURS} load Llama", "ours-text", llama),
        found.job(f"{PEER} load Llama", "peer", llama),
    ]
    found.series(texts, n)
    if cold:
        found.series(texts, n, cold=True)
    found.series([found.job(f"{PEER} load and save Llama", "peer-save", llama, makes=folder / "saved")], n_convert)
    return found


def ask(found: Bench, folder: Path, convert: Sequence[str], native: Path, runs: int, picture_runs: int) -> None:
    """`llava ask` on the native folder, without and with a picture."""
    from PIL import Image

    watched(convert)
    command = [sys.executable, "-m", "llava.cli", "ask"]
    options = ["--model", str(native), "--max-new-tokens", "4", "--dtype", found.place.dtype_name]
    options += ["--device", str(found.place.device)]
    text = [*command, QUESTION, *options]
    found.first_byte(f"{OURS} ask to first byte, text", text, [native], runs)
    picture = folder / "picture.png"
    Image.effect_noise((PICTURE, PICTURE), 80).convert("RGB").save(picture)
    if picture_runs:
        seen = [*command, str(picture), QUESTION, *options]
        found.first_byte(f"{OURS} ask to first byte, picture", seen, [native], picture_runs)
    shutil.rmtree(native)


if __name__ == "__main__":
    typer.run(load)

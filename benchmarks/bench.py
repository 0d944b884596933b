"""What all benchmarks share: the machine's description, models on shared memory, runs in turns, and the report.

A benchmark runs its contestants in turns within one process run, so that a machine that slows down slows all of them.
Ours and transformers' hold the very same weights (ours; theirs are views), and must agree before a clock is started.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a clone that is not installed

from llava.checkpoint import keymap
from llava.config import DecoderConfig, ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava.model.llava import Llava, meta_model

ROOT = Path(__file__).resolve().parent.parent
OURS, PEER = "llava", "transformers"
M = TypeVar("M", bound=nn.Module)

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")]
Layers = Annotated[int | None, typer.Option("--layers", help="blocks; default: the model's full depth")]
Size = Annotated[str, typer.Option("--size", help="7b or 13b: LLaVA-1.5's shapes; tiny: a self-test in seconds")]
Runs = Annotated[int, typer.Option("--runs", help="timed runs of each contestant", min=1)]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: torch's own choice")]
Out = Annotated[Path | None, typer.Option("--out", help="file for the result")]
Save = Annotated[bool, typer.Option("--save", help="write the result to benchmarks/results/")]
Commit = Annotated[str | None, typer.Option("--commit", help="commit to name where the tree is a copy without git")]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a benchmark runs."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def chosen(cls, device: str, dtype: str, threads: int | None) -> "Place":
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise typer.BadParameter(f"--dtype {dtype}: expected float32, bfloat16 or float16")
        return cls(device=torch.device(device), dtype=getattr(torch, dtype))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, to the end of its last kernel."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------- the two models


def config(size: str, layers: int | None, *, vision: bool) -> LlavaConfig:
    """LLaVA-1.5-7B's or -13B's shapes, or small ones."""
    sizes = {  # layers, dim, heads, mlp_dim
        "7b": (32, 4096, 32, 11008),
        "13b": (40, 5120, 40, 13824),
        "tiny": (2, 64, 4, 172),
    }
    if size not in sizes:
        raise typer.BadParameter(f"--size {size}: expected {', '.join(sizes)}")
    depth, dim, heads, mlp_dim = sizes[size]
    decoder = DecoderConfig(
        kind="llama",
        n_layers=layers or depth,
        dim=dim,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=dim // heads,
        mlp_dim=mlp_dim,
        vocab_size=512 if size == "tiny" else 32000,
        max_seq=4096,
        eps=1e-5,
    )
    if not vision:
        return LlavaConfig(decoder=decoder)
    tower = clip_config(size)
    return LlavaConfig(
        decoder=decoder,
        vision=tower,
        projector=ProjectorConfig(in_dim=tower.dim, out_dim=decoder.dim, depth=2),
        image=ImageConfig(size=tower.image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), aspect="pad"),
    )


def clip_config(size: str, layers: int | None = None) -> VisionConfig:
    """CLIP ViT-L/14 at 336 pixels, or a small one; the layer before the last is read."""
    sizes: dict[str, Any]
    if size != "tiny":
        sizes = {"dim": 1024, "n_layers": 24, "n_heads": 16, "mlp_dim": 4096, "image_size": 336}
    else:
        sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "mlp_dim": 128, "image_size": 56}
    return VisionConfig(**sizes | ({"n_layers": layers} if layers else {}), patch_size=14)


class Noise:
    """Random values by the block: one block is drawn, and copied from another offset for each tensor."""

    def __init__(self, place: Place, *, std: float = 0.02, values: int = 2**22 + 15):
        generator = torch.Generator(place.device).manual_seed(0)
        block = torch.randn(values, generator=generator, device=place.device) * std
        self.block = block.to(place.dtype)
        self.offset = 0

    def into(self, tensor: Tensor) -> None:
        """Overwrites a contiguous tensor."""
        flat, n = tensor.view(-1), len(self.block)
        done = 0
        while done < len(flat):
            part = self.block[self.offset : self.offset + len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            self.offset = (self.offset + len(part)) % n
        self.offset = (self.offset + 7919) % n  # no two tensors begin alike


def filled(module: M, place: Place) -> M:
    """A module from the meta device gets memory and random values; scales of norms are 1."""
    noise = Noise(place)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = torch.empty(tensor.shape, dtype=place.dtype, device=place.device)
        if re.search(r"norm\.weight$", name):
            state[name].fill_(1)
        else:
            noise.into(state[name])
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def build(config: LlavaConfig, place: Place) -> Llava:
    """Our model with random weights."""
    return filled(meta_model(config), place)


_PROJECTOR = tuple(
    keymap.Rule(f"multi_modal_projector.linear_{i + 1}.{kind}", f"projector.{2 * i}.{kind}")
    for i in range(2)
    for kind in ("weight", "bias")
)


def hub_tensors(ours: Mapping[str, Tensor], n_blocks: int = 0) -> dict[str, Tensor]:
    """The hub's names, without prefixes of a whole model, for views of our tensors.

    Blocks of the tower that we do not build, up to `n_blocks`, are views of our last one: transformers runs them.
    """
    found: dict[str, Tensor] = {}
    rules = (*_PROJECTOR, *keymap.HF_LLAMA, *keymap.CLIP)
    for name, tensor in ours.items():
        names = keymap.disk_names(name, rules)
        found |= {_bare(hub): part for hub, part in zip(names, tensor.chunk(len(names)), strict=True)}
    blocks = [int(match[1]) for name in found if (match := re.match(r"encoder\.layers\.(\d+)\.", name))]
    for i in range(max(blocks, default=0) + 1, n_blocks):
        last = f"encoder.layers.{max(blocks)}."
        found |= {name.replace(last, f"encoder.layers.{i}."): t for name, t in found.items() if name.startswith(last)}
    if blocks:
        found |= {f"post_layernorm.{kind}": found[f"pre_layrnorm.{kind}"] for kind in ("weight", "bias")}
    return found


def _bare(name: str) -> str:
    """A name without what stands in front of it in one release or class and not in the other."""
    return re.sub(r"^(model\.)?(language_model\.|vision_tower\.)?(model\.)?(vision_model\.)?", "", name)


def peer_configs(config: LlavaConfig) -> tuple[Any, Any]:
    """transformers' LlamaConfig and CLIPVisionConfig (None without a tower)."""
    from transformers import CLIPVisionConfig, LlamaConfig

    sizes = config.decoder
    llama = LlamaConfig(
        hidden_size=sizes.dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_seq,
        rms_norm_eps=sizes.eps,
        tie_word_embeddings=False,
    )
    return llama, CLIPVisionConfig(**clip_settings(config.vision)) if config.vision else None


def clip_settings(tower: VisionConfig) -> dict[str, Any]:
    """Sizes of a tower in the hub's words."""
    return {
        "hidden_size": tower.dim,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.n_layers,
        "num_attention_heads": tower.n_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.eps,
    }


def peer(cls: Any, settings: Any, tensors: Mapping[str, Tensor], place: Place) -> Any:
    """transformers' model on the memory of `tensors`, with its default attention."""
    with torch.device("meta"):
        model = cls(settings)
    state = {name: tensors[_bare(name)] for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config).to(place.device))
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=place.device)[None]
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"without memory: {left}"
    return model.requires_grad_(False).eval()


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def agree(ours: Tensor, theirs: Tensor, place: Place) -> float:
    """The relative difference |ours - theirs| / |theirs|; without agreement nothing is timed."""
    a, b = ours.float(), theirs.float()
    assert a.shape == b.shape, f"{OURS} gives {list(a.shape)}, {PEER} {list(b.shape)}"
    error = float((a - b).norm() / b.norm())
    limit = TOLERANCES[place.dtype]
    print(f"relative difference of {OURS} and {PEER}: {error:.2e} (limit {limit:.0e})")
    if not error <= limit:
        raise SystemExit("they disagree: nothing is timed")
    return error


# ------------------------------------------------------------------------------------------------- runs and ceilings


def alternate(contestants: Mapping[str, Callable[[], float]], runs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Each contestant once a round, the order turned round every time; a contestant tells its own seconds."""
    names = list(contestants)
    for _ in range(warm_up):
        for name in names:
            contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(runs):
        for name in names if i % 2 == 0 else reversed(names):
            seconds[name].append(contestants[name]())
    return seconds


@dataclass(frozen=True)
class Ceiling:
    """Something simple that the hardware does, to hold a figure against."""

    name: str
    amount: float  # bytes or operations a run
    run: Callable[[], float]


def memory_ceilings(place: Place, size: str) -> list[Ceiling]:
    """Reading 1 GB (4 GB on a GPU): for the largest value, and in matrix-vector products, on a CPU in float32 too."""
    n_bytes = (2**32 if place.on_gpu else 2**30) if size == "7b" else 2**24
    values = torch.empty(n_bytes // place.dtype.itemsize, dtype=place.dtype, device=place.device)
    Noise(place).into(values)
    kinds = [place.dtype] + ([torch.float32] if place.dtype != torch.float32 and not place.on_gpu else [])

    def product(dtype: torch.dtype) -> Ceiling:
        table, x = values.view(dtype).view(-1, 4096), torch.ones(4096, dtype=dtype, device=place.device)
        name = f"matrix x vector, {str(dtype).removeprefix('torch.')}"
        return Ceiling(name, n_bytes, lambda: place.seconds(lambda: table @ x))

    return [Ceiling("read (max)", n_bytes, lambda: place.seconds(values.max)), *map(product, kinds)]


def matmul_ceilings(place: Place, size: str) -> list[Ceiling]:
    """Square products in the dtype; on a CPU in float32 too, which can be the faster one."""
    n = (8192 if place.on_gpu else 2048) if size == "7b" else 256

    def ceiling(dtype: torch.dtype) -> Ceiling:
        a, b = (torch.randn(n, n, device=place.device).to(dtype) for _ in "ab")
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        return Ceiling(name, 2 * n**3, lambda: place.seconds(lambda: a @ b))

    kinds = [place.dtype] + ([torch.float32] if place.dtype != torch.float32 and not place.on_gpu else [])
    return [ceiling(dtype) for dtype in kinds]


def best(ceilings: Sequence[Ceiling], seconds: Mapping[str, Sequence[float]]) -> float:
    """The highest of the ceilings, bytes or operations a second."""
    return max(ceiling.amount / median(seconds[ceiling.name]) for ceiling in ceilings)


def decoder_flops(sizes: DecoderConfig, tokens: int) -> float:
    """Of a prompt, with the logits of its last token; causal attention counted half."""
    values = sizes.n_heads * sizes.head_dim
    block = sizes.dim * (2 * values + 2 * sizes.n_kv_heads * sizes.head_dim + 3 * sizes.mlp_dim)
    attention = 2 * tokens**2 * values
    return sizes.n_layers * (2.0 * tokens * block + attention) + 2.0 * sizes.dim * sizes.vocab_size


def tower_flops(tower: VisionConfig) -> float:
    """Of one view, up to the layer that is read: what has to be done, whoever does more."""
    n, d = tower.grid**2 + 1, tower.dim
    block = 2.0 * n * (4 * d * d + 2 * d * tower.mlp_dim) + 4.0 * n * n * d
    return 2.0 * tower.grid**2 * 3 * tower.patch_size**2 * d + tower.n_blocks * block


# ------------------------------------------------------------------------------------------------------- the report


@dataclass(kw_only=True)
class Result:
    """A benchmark's outcome: what goes to people, to the last line and to the file."""

    benchmark: str  # for the file's name
    question: str
    device: str  # cpu or cuda
    dtype: str
    settings: dict[str, Any]
    seconds: dict[str, list[float]]  # contestant -> every timed run
    unit: str = "s"  # of what `scale` turns seconds into
    scale: Callable[[str, float], float] = field(default=lambda name, seconds: seconds)
    more: dict[str, dict[str, float]] = field(default_factory=dict)  # contestant -> further figures
    figures: dict[str, Any] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ((OURS, PEER),)  # whose speeds are divided
    commit: str | None = None

    def runs(self) -> dict[str, dict[str, Any]]:
        """By contestant: each run in seconds, and the spread in the unit."""
        told = {}
        for name, seconds in self.seconds.items():
            values = [self.scale(name, s) for s in seconds]
            spread = {"median": median(values), "min": min(values), "max": max(values)}
            told[name] = {"seconds": seconds, self.unit: spread, **self.more.get(name, {})}
        return told

    def ratios(self) -> dict[str, dict[str, float]]:
        """How many times as fast one is as the other: of the medians, and the spread of the rounds' own."""
        told = {}
        for one, other in self.pairs:
            a, b = self.seconds.get(one), self.seconds.get(other)
            if a and b:
                each = [y / x for x, y in zip(a, b, strict=True)]
                told[f"{one} to {other}"] = {"median": median(b) / median(a), "min": min(each), "max": max(each)}
        return told

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "question": self.question,
            "date": datetime.date.today().isoformat(),
            "command": command(),
            "commit": commit(self.commit),
            "machine": machine(self.device),
            "versions": versions(),
            "settings": {"device": self.device, "dtype": self.dtype, **self.settings},
            "runs": self.runs(),
            "ratios": self.ratios(),
            "figures": self.figures,
        }

    def report(self, out: Path | None, save: bool) -> None:
        """Table, file, last line."""
        found = self.to_dict()
        self._show(found)
        if save and not out:
            name = f"{found['date']}-{self.benchmark}-{self.device}-{self.dtype}.json"
            out = ROOT / "benchmarks" / "results" / name
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found), flush=True)

    def _show(self, found: dict[str, Any]) -> None:
        extra = list(dict.fromkeys(key for figures in self.more.values() for key in figures))
        table = Table(title=self.question, title_justify="left")
        for i, title in enumerate(["", f"median {self.unit}", "min", "max", *extra]):
            table.add_column(title, justify="right" if i else "left")
        for name, run in found["runs"].items():
            spread = run[self.unit]
            shown = [_short(spread[key]) for key in ("median", "min", "max")]
            table.add_row(name, *shown, *(_short(run[key]) if key in run else "" for key in extra))
        console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
        console.print(table)
        for pair, ratio in found["ratios"].items():
            console.print(f"{pair}: {ratio['median']:.3f} times as fast ({ratio['min']:.3f} to {ratio['max']:.3f})")
        for name, figure in self.figures.items():
            console.print(f"{name}: {_short(figure) if isinstance(figure, float) else figure}")
        gear = found["machine"].get("gpu") or f"{found['machine']['cpu']}, {found['machine']['threads']} threads"
        told = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        console.print(f"{self.device} {self.dtype}: {gear}; {told}; commit {found['commit']}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine(device: str) -> dict[str, Any]:
    """What figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    flags = set((re.search(r"flags\s*: (.*)", info) or ["", ""])[1].split())
    told: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(torch.device(device))
        told |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return told


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "transformers")}}


def commit(given: str | None = None) -> str:
    """The tree's commit, `-dirty` if files differ from it (results do not count)."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        tracked = [*git, "status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results"]
        changes = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return given or "unknown"
    return head[:12] + ("-dirty" if changes else "")


def command() -> str:
    """The command line as given; of a path outside the project, the last part alone."""
    words = ["python", str(Path("benchmarks") / Path(sys.argv[0]).name)]
    return " ".join(words + [re.sub(r"(^|=)[/~]\S*?([^/]*)/*$", r"\1…/\2", word) for word in sys.argv[1:]])


def tag(name: str, *, layers: int | None, size: str, extra: str = "") -> str:
    """A result's name: what is not the ordinary case is part of it."""
    parts = [name, extra, f"{layers}-layers" if layers else "", "" if size == "7b" else size]
    return "-".join(part for part in parts if part)

"""The result of a benchmark: a readable table, a JSON file, and the same JSON as the last line of stdout."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OURS, PEER = "llava", "transformers"

sys.path.insert(0, str(ROOT))  # lets benchmarks import llava from a clone that is not installed

Out = Annotated[Path | None, typer.Option("--out", help="file for the result")]
Save = Annotated[bool, typer.Option("--save", help="write the result to benchmarks/results/")]
Commit = Annotated[str | None, typer.Option("--commit", help="commit to record when the tree is a copy without git")]


@dataclass(kw_only=True)
class Result:
    """Timed runs of several contestants, with everything needed to reproduce them."""

    benchmark: str  # part of the file name
    question: str
    device: str  # cpu or cuda
    dtype: str
    settings: dict[str, Any]
    seconds: dict[str, list[float]]  # contestant -> every timed run
    unit: str = "s"  # unit of the values that `scale` returns
    scale: Callable[[str, float], float] = field(default=lambda name, seconds: seconds)
    more: dict[str, dict[str, float]] = field(default_factory=dict)  # contestant -> further figures
    figures: dict[str, Any] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ((OURS, PEER),)  # contestants whose speeds are compared
    commit: str | None = None

    def runs(self) -> dict[str, dict[str, Any]]:
        """For each contestant, the seconds of every run and their median and spread in `unit`."""
        runs = {}
        for name, seconds in self.seconds.items():
            values = [self.scale(name, s) for s in seconds]
            spread = {"median": median(values), "min": min(values), "max": max(values)}
            runs[name] = {"seconds": seconds, self.unit: spread, **self.more.get(name, {})}
        return runs

    def ratios(self) -> dict[str, dict[str, float]]:
        """For each pair, how many times as fast the first is: ratio of the medians, and range over rounds."""
        ratios = {}
        for one, other in self.pairs:
            a, b = self.seconds.get(one), self.seconds.get(other)
            if a and b:
                rounds = [y / x for x, y in zip(a, b, strict=True)]
                ratios[f"{one} to {other}"] = {
                    "median": median(b) / median(a),
                    "min": min(rounds),
                    "max": max(rounds),
                }
        return ratios

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
        """Prints the table, writes the file if asked to, and prints the JSON as the last line."""
        found = self.to_dict()
        self._print_table(found)
        if save and not out:
            name = f"{found['date']}-{self.benchmark}-{self.device}-{self.dtype}.json"
            out = ROOT / "benchmarks" / "results" / name
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found), flush=True)

    def _print_table(self, found: dict[str, Any]) -> None:
        extra = list(dict.fromkeys(key for figures in self.more.values() for key in figures))
        table = Table(title=self.question, title_justify="left")
        for i, title in enumerate(["", f"median {self.unit}", "min", "max", *extra]):
            table.add_column(title, justify="right" if i else "left")
        for name, run in found["runs"].items():
            spread = run[self.unit]
            cells = [_short(spread[key]) for key in ("median", "min", "max")]
            table.add_row(name, *cells, *(_short(run[key]) if key in run else "" for key in extra))
        console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
        console.print(table)
        for pair, ratio in found["ratios"].items():
            console.print(f"{pair}: {ratio['median']:.3f} times as fast ({ratio['min']:.3f} to {ratio['max']:.3f})")
        for name, figure in self.figures.items():
            console.print(f"{name}: {_short(figure) if isinstance(figure, float) else figure}")
        hardware = found["machine"].get("gpu") or f"{found['machine']['cpu']}, {found['machine']['threads']} threads"
        packages = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        console.print(f"{self.device} {self.dtype}: {hardware}; {packages}; commit {found['commit']}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def benchmark_name(name: str, *, layers: int | None, size: str, extra: str = "") -> str:
    """The name of a result. It lists every setting that is not the default."""
    parts = [name, extra, f"{layers}-layers" if layers else "", "" if size == "7b" else size]
    return "-".join(part for part in parts if part)


def machine(device: str) -> dict[str, Any]:
    """The hardware properties that the results depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    flags = set((re.search(r"flags\s*: (.*)", info) or ["", ""])[1].split())
    found: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(torch.device(device))
        found |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "transformers")}}


def commit(given: str | None = None) -> str:
    """The commit of the working tree, with `-dirty` if files differ from it; changes to results do not count."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        tracked = [*git, "status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results"]
        changes = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return given or "unknown"
    return head[:12] + ("-dirty" if changes else "")


def command() -> str:
    """The command line. Absolute paths are shortened to their last part."""
    words = ["python", str(Path("benchmarks") / Path(sys.argv[0]).name)]
    return " ".join(words + [re.sub(r"(^|=)[/~]\S*?([^/]*)/*$", r"\1…/\2", word) for word in sys.argv[1:]])

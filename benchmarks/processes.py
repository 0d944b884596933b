"""Runs jobs in separate processes and measures their time and memory."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from result import ROOT
from timing import Target

CHUNK_BYTES = 16 * 2**20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LLAVA = [sys.executable, "-m", "llava.cli"]

Folder = Annotated[Path | None, typer.Option("--folder", help="folder with enough space; default: the temporary one")]


@dataclass(frozen=True)
class Task:
    """A command that is run several times."""

    name: str
    argv: list[str]
    reads: list[Path]  # folders whose weights it reads
    prints_seconds: bool = True  # the process measures its own seconds, imports excluded
    makes: Path | None = None  # removed after each run


@dataclass
class Measured:
    """The runs of one task."""

    seconds: list[float] = field(default_factory=list)
    anon: list[int] = field(default_factory=list)  # bytes
    file: list[int] = field(default_factory=list)  # bytes
    cached: list[float] = field(default_factory=list)  # fraction of the files in the page cache before the run


def job(
    name: str,
    entry: str,
    folder: Path,
    target: Target,
    threads: int | None = None,
    *,
    reads: Sequence[Path] = (),
    makes: Path | None = None,
) -> Task:
    """A task that runs an entry of `jobs.JOBS` on a folder. `reads`: the folders with the weights, if not `folder`."""
    argv = [sys.executable, str(ROOT / "benchmarks" / "jobs.py"), entry, str(folder)]
    argv += ["--device", str(target.device), "--dtype", target.dtype_name]
    argv += ["--threads", str(threads)] if threads else []
    return Task(name, argv, list(reads or [folder]), makes=makes)


class Series:
    """Runs tasks and collects their measurements by name."""

    def __init__(self) -> None:
        self.measured: dict[str, Measured] = {}

    @property
    def seconds(self) -> dict[str, list[float]]:
        return {name: one.seconds for name, one in self.measured.items()}

    def run(self, tasks: Sequence[Task], runs: int, *, cold: bool = False) -> None:
        """Runs every task once per round, in reverse order every other round. `cold`: with an empty page cache."""
        for i in range(runs):
            for task in tasks if i % 2 == 0 else reversed(tasks):
                self._run_once(task, cold)

    def _run_once(self, task: Task, cold: bool) -> None:
        files = weight_files(*task.reads)
        os.sync()  # finish the writes of earlier tasks
        if cold:
            drop_caches()
        else:
            read_files(files)
        name = task.name + (", cold" if cold else "")
        measured = self.measured.setdefault(name, Measured())
        if (share := cached_share(files) if files else None) is not None:
            measured.cached.append(share)
        seconds, anon, file, out = run_watched(task.argv)
        measured.seconds.append(json.loads(out.splitlines()[-1])["seconds"] if task.prints_seconds else seconds)
        measured.anon.append(anon)
        measured.file.append(file)
        if task.makes:
            shutil.rmtree(task.makes) if task.makes.is_dir() else task.makes.unlink()
        print(f"{name}: {measured.seconds[-1]:.2f} s, {anon / 1e9:.2f} GB private", flush=True)

    def memory(self) -> dict[str, dict[str, float]]:
        """The peak private and mapped memory of each task in GB, and its smallest cached fraction."""
        found: dict[str, dict[str, float]] = {}
        for name, one in self.measured.items():
            found[name] = {"peak_anon_gb": max(one.anon) / 1e9, "peak_file_gb": max(one.file) / 1e9} if one.anon else {}
            if one.cached:
                found[name]["cached"] = min(one.cached)
        return found


def run_watched(argv: Sequence[str]) -> tuple[float, int, int, str]:
    """Runs a process to its end and returns seconds, the largest RssAnon and RssFile in bytes, and stdout."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=ROOT)
        status = Path(f"/proc/{process.pid}/status")
        anon = file = 0
        while process.poll() is None:
            now = resident(status)
            anon, file = max(anon, now[0]), max(file, now[1])
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(argv)} failed:\n{err.read()}")
        return seconds, anon, file, out.read()


def resident(status: Path) -> tuple[int, int]:
    """RssAnon and RssFile in bytes; 0 after the process has ended."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    except OSError:
        return 0, 0
    anon, file = (int(lines[name].split()[0]) * 1024 if name in lines else 0 for name in ("RssAnon", "RssFile"))
    return anon, file


def weight_files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]


def read_files(files: Sequence[Path]) -> None:
    """Reads files one after the other through one buffer."""
    buffer = bytearray(CHUNK_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copies files into a new folder through one buffer, the minimum work of a conversion."""
    folder.mkdir()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as source, (folder / file.name).open("wb", buffering=0) as out:
            while n := source.readinto(buffer):
                out.write(buffer[:n])


def cached_share(files: Sequence[Path]) -> float | None:
    """The fraction of the files that the page cache holds; None without the `fincore` command."""
    if not shutil.which("fincore"):
        return None
    done = subprocess.run(["fincore", "-bnro", "RES", *map(str, files)], capture_output=True, text=True, check=False)
    total = sum(file.stat().st_size for file in files)
    held = sum(map(int, done.stdout.split())) if done.returncode == 0 else 0
    return min(1.0, held / total) if held and total else None


def drop_caches() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


@contextmanager
def scratch_folder(folder: Path | None, need_bytes: float) -> Iterator[Path]:
    """A temporary folder. Ends the program if the disk has less than `need_bytes` free."""
    where = Path(folder or tempfile.gettempdir()).resolve()
    free = shutil.disk_usage(where).free
    print(f"needs {need_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; all files are removed at the end")
    if free < need_bytes:
        raise SystemExit("not enough disk space; give a folder with more room with --folder")
    with tempfile.TemporaryDirectory(prefix="llava-benchmark-", dir=where) as name:
        yield Path(name)

"""How many worker processes a job may start: no more than the CPUs that this process can use."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """Returns the number of CPUs that this process may use, according to its affinity and its container's quota.

    cgroup: folder with cpu.max (version 2) or cpu/cpu.cfs_quota_us (version 1).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Returns the container's quota in CPUs, or None if there is none."""
    try:
        if (file := cgroup / "cpu.max").is_file():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
            quota, period = ((cgroup / name).read_text(encoding="ascii").strip() for name in names)
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # ValueError: "max" stands for no quota
        return None


def default_workers(most: int, n_processes: int) -> int:
    """Returns the number of workers to start in each of `n_processes` on this machine if the user asks for none."""
    return min(most, max(1, available_cpus() // n_processes))


def capped_workers(asked: int, option: str, n_processes: int = 1) -> int:
    """Returns the number of workers to start in each of `n_processes` on this machine. Warns if it is less than asked.

    More workers than CPUs only compete for them. option: what the user sets the number with, such as --workers.
    """
    cpus = available_cpus()
    most = max(1, cpus // n_processes)
    if asked <= most:
        return asked
    share = f" for {n_processes} processes" if n_processes > 1 else ""
    available = f"{cpus} CPU{'s' * (cpus != 1)}{share}"
    log.warning("%s is %d, but this process may use only %s; starts %d", option, asked, available, most)
    return most

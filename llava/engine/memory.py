"""How much memory the cache of keys and values gets."""

import os
from pathlib import Path

import torch

from llava.config import DecoderConfig, EngineOptions
from llava.errors import ConfigError
from llava.model.paged import cache_bytes_per_token


def n_pages(
    config: DecoderConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device, *, reserved_bytes: int = 0
) -> int:
    """Returns the number of pages of the cache. reserved_bytes: free memory that is needed for something else.

    Raises ConfigError if `cache_memory` is less than one page or more than the free memory.

    On a CPU, half of the memory is for the dense copies of the decoding rows, which take up at most as much as the
    pages; see `model/row_cache.py`.
    """
    n_copies = 2 if has_dense_copies(options, device) else 1
    page_bytes = n_copies * options.page_size * cache_bytes_per_token(config, dtype)
    pages_per_request = -(-config.max_seq // options.page_size)
    free = max(0, free_bytes(device) - reserved_bytes)
    n_bytes = options.cache_bytes(free)
    if n_bytes is None:
        return max(1, min(options.max_batch * pages_per_request, free // 2 // page_bytes))
    if n_bytes < page_bytes:
        raise ConfigError(
            f"cache_memory= (--cache-memory) is {options.cache_memory!r}, less than the {page_bytes} bytes of a page "
            f"of {options.page_size} tokens; raise it"
        )
    if n_bytes > free:
        raise ConfigError(
            f"cache_memory= (--cache-memory) is {options.cache_memory!r}, but only {free / 2**30:.1f} GiB are free; "
            "lower it"
        )
    return n_bytes // page_bytes


def has_dense_copies(options: EngineOptions, device: torch.device) -> bool:
    """Returns whether decoding rows are copied from the pages to dense tensors."""
    return device.type == "cpu" and not options.batch_invariant


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device: for a CPU, what the system can provide without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Allocates the pages of the key/value cache: reference counts, and a prefix cache of pages that are already computed.

A page holds the keys and values of `page_size` consecutive tokens. Full pages are registered under a hash of all
tokens and pictures up to their end, so a request that starts with the same tokens and pictures reuses them. The hash
is the end of a SHA-256 chain; what has been hashed is stored and compared on every hit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PageKey(NamedTuple):
    """Identifies a full page by everything that its keys and values depend on."""

    hash: bytes  # SHA-256 of `content`
    content: bytes  # hash of the previous page (or the salt's hash), token ids, and each picture with its offset

    @classmethod
    def of(cls, previous: bytes, token_ids: bytes, pictures: Iterable[tuple[bytes, int]]) -> "PageKey":
        """previous: hash of the page before; pictures: (digest, start relative to the page) of each that overlaps."""
        content = b"".join(
            [previous, token_ids, *(digest + start.to_bytes(8, "little", signed=True) for digest, start in pictures)]
        )
        return cls(hashlib.sha256(content).digest(), content)


class BlockManager:
    """Owns the pages 0 to n_pages - 1. A page is in use, cached (registered and evictable) or unused."""

    def __init__(self, n_pages: int, page_size: int, *, prefix_cache: bool = True):
        self.n_pages, self.page_size, self.prefix_cache = n_pages, page_size, prefix_cache
        self.reset()

    def reset(self) -> None:
        """Forgets all contents and references."""
        self._n_references = [0] * self.n_pages
        self._key: list[PageKey | None] = [None] * self.n_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = (
            OrderedDict()
        )  # registered, without references; least recently used first
        self._unused = list(reversed(range(self.n_pages)))  # a stack: recently used memory is used again first

    @property
    def n_free(self) -> int:
        """Number of pages that `allocate` can return: unused and cached ones."""
        return len(self._unused) + len(self._cached)

    @property
    def n_used(self) -> int:
        """Number of pages that are referenced by block tables."""
        return self.n_pages - self.n_free

    def allocate(self) -> int:
        """Returns a page with one reference, evicting the least recently used cached page if necessary."""
        if self._unused:
            page = self._unused.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unregister(page)
        self._n_references[page] = 1
        return page

    def match(self, keys: Sequence[PageKey]) -> list[int]:
        """Returns the pages that hold the longest computed prefix of `keys`, without taking references."""
        pages: list[int] = []
        for key in keys if self.prefix_cache else ():
            page = self._page_of.get(key.hash)
            if page is None or self._key[page] != key:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Takes a reference to each of the pages, which are in use or cached."""
        for page in pages:
            self._n_references[page] += 1
            self._cached.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page. The last pages of a prefix are evicted before the first."""
        for page in reversed(pages):
            self._n_references[page] -= 1
            if self._n_references[page] == 0:
                if self._key[page] is None:
                    self._unused.append(page)
                else:
                    self._cached[page] = None

    def in_use(self, page: int) -> bool:
        """Whether a block table contains the page."""
        return self._n_references[page] > 0

    def is_shared(self, page: int) -> bool:
        """Whether several block tables contain the page, so that it must be copied before it is written."""
        return self._n_references[page] > 1

    def register(self, page: int, key: PageKey) -> None:
        """Records the content of a full, computed page, unless another page already has the same content."""
        if self.prefix_cache and self._key[page] is None and key.hash not in self._page_of:
            self._key[page] = key
            self._page_of[key.hash] = page

    def forget(self, pages: Iterable[int]) -> None:
        """Removes pages from the prefix cache. Block tables that contain them keep them."""
        for page in pages:
            if self._key[page] is not None:
                self._unregister(page)
                if page in self._cached:
                    del self._cached[page]
                    self._unused.append(page)

    def _unregister(self, page: int) -> None:
        key = self._key[page]
        assert key is not None
        del self._page_of[key.hash]
        self._key[page] = None

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError if the references are not those of `block_tables`, or a page is lost or in two states."""
        counts = [0] * self.n_pages
        for table in block_tables:
            for page in table:
                counts[page] += 1
        if counts != self._n_references:
            wrong = [page for page in range(self.n_pages) if counts[page] != self._n_references[page]]
            raise RuntimeError(f"pages {wrong[:10]} have wrong reference counts")
        free = sorted([*self._unused, *self._cached])
        if free != [page for page in range(self.n_pages) if not counts[page]]:
            raise RuntimeError("the unused and cached pages are not those without references")
        registered = {page for page in range(self.n_pages) if self._key[page] is not None}
        if registered != set(self._page_of.values()) or not set(self._cached) <= registered:
            raise RuntimeError("the registered pages are not those in the prefix cache")

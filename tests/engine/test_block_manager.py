"""Pages: references, the prefix cache and its hash chain, and the integrity check."""

import random

import pytest

from llava.engine.block_manager import BlockManager, PageKey


def chain(*pages: tuple[bytes, list[tuple[bytes, int]]], salt: bytes = b"salt") -> list[PageKey]:
    """The keys of consecutive pages with these token ids and (digest, start) of pictures."""
    keys: list[PageKey] = []
    for ids, pictures in pages:
        keys.append(PageKey.of(keys[-1].hash if keys else salt, ids, pictures))
    return keys


A, B = (b"a" * 128, []), (b"b" * 128, [])


def computed(blocks: BlockManager, keys: list[PageKey]) -> list[int]:
    """Pages in use that hold these contents."""
    pages = [blocks.allocate() for _ in keys]
    for page, key in zip(pages, keys, strict=True):
        blocks.register(page, key)
    return pages


def test_a_prefix_is_found_up_to_the_first_page_that_differs() -> None:
    blocks = BlockManager(8, 16)
    pages = computed(blocks, chain(A, B, A))
    assert blocks.match(chain(A, B, A)) == pages
    assert blocks.match(chain(A, B, B)) == pages[:2]
    assert blocks.match(chain(B, B)) == []
    blocks.release(pages)
    assert blocks.match(chain(A, B, A)) == pages  # cached until the pages are needed
    assert blocks.n_free == 8


@pytest.mark.parametrize(
    "other",
    [
        chain((b"x" * 128, [(b"1" * 32, 3)]), salt=b"another adapter"),
        chain((b"x" * 128, [(b"2" * 32, 3)])),
        chain((b"x" * 128, [(b"1" * 32, 4)])),
        chain((b"x" * 128, [(b"1" * 32, -3)])),
        chain((b"x" * 128, [])),
        chain((b"x" * 128, [(b"1" * 32, 3), (b"2" * 32, 9)])),
    ],
    ids=["adapter", "picture", "offset", "negative offset", "no picture", "another picture"],
)
def test_a_page_is_not_reused_for_anything_else_than_its_content(other: list[PageKey]) -> None:
    blocks = BlockManager(4, 16)
    page = computed(blocks, chain((b"x" * 128, [(b"1" * 32, 3)])))
    assert blocks.match(other) == []
    assert blocks.match(chain((b"x" * 128, [(b"1" * 32, 3)]))) == page


def test_the_same_page_after_another_one_is_not_reused() -> None:
    blocks = BlockManager(4, 16)
    computed(blocks, chain(A, B))
    assert blocks.match(chain(B)) == []
    assert blocks.match([chain(B, B)[1]]) == []


def test_contents_are_compared_even_if_hashes_collide() -> None:
    blocks = BlockManager(4, 16)
    (key,) = chain(A)
    computed(blocks, [key])
    assert blocks.match([PageKey(key.hash, key.content[:-1] + b"?")]) == []


def test_cached_pages_are_evicted_last_and_the_least_recently_used_first() -> None:
    blocks = BlockManager(4, 16)
    first, second = computed(blocks, chain(A, A)), computed(blocks, chain(B))
    blocks.release(first)
    blocks.release(second)
    unused = blocks.allocate()
    assert unused not in (*first, *second)
    assert blocks.allocate() == first[1]  # the end of a prefix goes before its beginning
    assert blocks.match(chain(A, A)) == first[:1]
    blocks.acquire(first[:1])
    assert blocks.allocate() == second[0]
    assert blocks.match(chain(B)) == []
    assert blocks.n_free == 0


def test_a_shared_page_is_free_only_after_its_last_user() -> None:
    blocks = BlockManager(2, 16)
    pages = computed(blocks, chain(A))
    blocks.acquire(pages)
    assert blocks.is_shared(pages[0])
    blocks.release(pages)
    assert blocks.n_free == 1
    assert not blocks.is_shared(pages[0])
    blocks.release(pages)
    assert blocks.n_free == 2


def test_the_same_content_is_registered_once() -> None:
    blocks = BlockManager(2, 16)
    first, second = computed(blocks, chain(A)), computed(blocks, chain(A))
    assert blocks.match(chain(A)) == first
    blocks.release(first)
    blocks.release(second)
    blocks.check([])


def test_without_a_prefix_cache_nothing_is_found() -> None:
    blocks = BlockManager(2, 16, prefix_cache=False)
    pages = computed(blocks, chain(A))
    assert blocks.match(chain(A)) == []
    blocks.release(pages)
    blocks.check([])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_every_page_in_exactly_one_state(seed: int) -> None:
    generator = random.Random(seed)
    blocks = BlockManager(generator.randint(1, 20), 4)
    tables: list[list[int]] = []
    for _ in range(400):
        if tables and (generator.random() < 0.4 or not blocks.n_free):
            blocks.release(tables.pop(generator.randrange(len(tables))))
        else:
            keys = chain(*generator.choices([A, B], k=generator.randint(1, 4)))
            table = blocks.match(keys)
            blocks.acquire(table)
            while len(table) < len(keys) and blocks.n_free:
                table.append(blocks.allocate())
                if generator.random() < 0.8:
                    blocks.register(table[-1], keys[len(table) - 1])
            tables.append(table)
        blocks.check(tables)
        assert blocks.n_used == len({page for table in tables for page in table})
    for table in tables:
        blocks.release(table)
    blocks.check([])
    assert blocks.n_free == blocks.n_pages


def test_the_check_reports_lost_and_doubled_pages() -> None:
    blocks = BlockManager(4, 16)
    pages = computed(blocks, chain(A))
    blocks.check([pages])
    with pytest.raises(RuntimeError, match="wrong reference counts"):
        blocks.check([])
    blocks._unused.pop()
    with pytest.raises(RuntimeError, match="unused and cached pages"):
        blocks.check([pages])
    blocks.reset()
    blocks._key[0] = chain(A)[0]
    with pytest.raises(RuntimeError, match="registered pages"):
        blocks.check([])

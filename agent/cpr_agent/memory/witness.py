"""The witness: a digest over pages of guest RAM, taken when the guest has stopped and again before it runs.

A guest's NUMA nodes count as one RAM, in their order. ``sampled`` hashes ``pages`` pages of it that a stored random seed
chooses, and always the first and the last of each node. If a fraction f
of all pages was damaged, it notices with probability 1 - (1 - f)^pages: 4,096 pages find 1 % damage but for one in 10^17.
``full`` hashes everything, in 2 MiB pieces on all cores. xxh3-128 (xxhash releases the GIL for large buffers).
"""

from __future__ import annotations

import mmap
import os
import random
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate, islice

import xxhash

from cpr_agent.core.model import Located, Witness

PAGE = 4096
DEFAULT_PAGES = 4096
MEASURED_BYTES = 1 << 30
"""Of a full witness, to know what the whole costs: a multiple of each alignment that device-dax has."""
_CHUNK = 2 << 20


def new_witness(kind: str = "sampled") -> Witness:
    """A witness still to be taken, with a seed of its own."""
    if kind == "sampled":
        return Witness(kind="sampled", seed=secrets.randbits(64), pages=DEFAULT_PAGES)
    return Witness(kind="full") if kind == "full" else Witness(kind="off")


def take_witness(located: Sequence[Located], like: Witness) -> Witness:
    """Hash what ``like`` chooses. Blocking; raises OSError if the memory can't be opened or mapped."""
    if like.kind == "off":
        return like
    if like.kind == "sampled":
        return replace(like, digest=_sampled(located, like))
    with _all_mapped(located) as ram:
        return replace(like, digest=_full(ram))


def measure_witness(located: Sequence[Located], like: Witness) -> tuple[str, float]:
    """How long taking it takes (s), and what was measured. Blocking; raises OSError."""
    kind = f"{like.kind}, {like.pages} pages" if like.pages else like.kind
    measured = [_beginning(one) for one in located] if like.kind == "full" else located
    size, part = (sum(one.identity.size_bytes for one in ranges) for ranges in (located, measured))
    begun = time.monotonic()
    take_witness(measured, like)
    return kind, (time.monotonic() - begun) * size / part


def _beginning(located: Located) -> Located:
    size = min(located.identity.size_bytes, MEASURED_BYTES)
    return replace(located, identity=replace(located.identity, size_bytes=size))


def is_blank(located: Sequence[Located]) -> bool:
    """Blocking; raises OSError."""
    zeros = bytes(_CHUNK)
    with _all_mapped(located) as ram:
        return all(piece == zeros[: len(piece)] for piece in _pieces(ram))


@contextmanager
def _all_mapped(located: Sequence[Located]) -> Iterator[list[memoryview]]:
    with ExitStack() as at_end:
        yield [at_end.enter_context(_mapped(one)) for one in located]


@contextmanager
def _opened(located: Located) -> Iterator[int]:
    fd = os.open(located.node, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _mapped(located: Located) -> Iterator[memoryview]:
    identity = located.identity
    with _opened(located) as fd:
        # device-dax takes MAP_SHARED only, in multiples of its alignment; definitions are checked for that.
        mapping = mmap.mmap(fd, identity.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=identity.offset_bytes)
    with mapping, memoryview(mapping) as ram:
        yield ram


@contextmanager
def _page_reader(located: Located) -> Iterator[Callable[[int], bytes | memoryview]]:
    """By the number of a page. A guest waits for thousands, all over its RAM: in a file each pread(2) is cheaper than
    the page fault of a mapping, and other threads can run meanwhile. device-dax can't be read, but maps 2 MiB at once."""
    with _opened(located) as fd:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            begin = located.identity.offset_bytes
            yield lambda page: os.pread(fd, PAGE, begin + page * PAGE)
            return
    with _mapped(located) as ram:
        yield lambda page: ram[page * PAGE : (page + 1) * PAGE]


def chosen_pages(sizes: Sequence[int], seed: int, pages: int) -> list[int]:
    """Page numbers in ascending order, counted on through all ranges of these ``sizes`` (bytes); the first and the last of
    each range always among them."""
    ends = list(accumulate(size // PAGE for size in sizes))
    if ends[-1] <= pages:
        return list(range(ends[-1]))
    chosen = random.Random(seed).sample(range(1, ends[-1] - 1), pages - 2)  # noqa: S311 - a sample, not a secret
    return sorted({0, *chosen, *(page for end in ends for page in (end - 1, end))} - {ends[-1]})


def _sampled(located: Sequence[Located], like: Witness) -> str:
    digest = xxhash.xxh3_128(seed=like.seed)
    sizes = [one.identity.size_bytes for one in located]
    with ExitStack() as at_end:
        readers = iter([at_end.enter_context(_page_reader(one)) for one in located])
        begin, end, ends = 0, 0, accumulate(size // PAGE for size in sizes)
        for page in chosen_pages(sizes, like.seed, like.pages):
            while page >= end:
                begin, end, read = end, next(ends), next(readers)
            digest.update(page.to_bytes(8, "little"))
            digest.update(read(page - begin))
    return digest.hexdigest()


def _full(ram: Sequence[memoryview]) -> str:
    whole, threads = xxhash.xxh3_128(), os.cpu_count() or 1
    count = sum(-(-len(one) // _CHUNK) for one in ram)
    each = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        # A thread's pieces are a run of them: a task for each would cost as much as a tenth of the hashing.
        for digests in pool.map(lambda at: _digests(islice(_pieces(ram), at, at + each)), range(0, count, each)):
            whole.update(digests)
    return whole.hexdigest()


def _digests(pieces: Iterable[memoryview]) -> bytes:
    return b"".join(map(xxhash.xxh3_128_digest, pieces))


def _pieces(ram: Sequence[memoryview]) -> Iterator[memoryview]:
    return (one[at : at + _CHUNK] for one in ram for at in range(0, len(one), _CHUNK))

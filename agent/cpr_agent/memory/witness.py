"""The witness: a digest over pages of guest RAM, taken when the guest has stopped and again before it runs.

``sampled`` hashes ``pages`` pages that a stored random seed chooses, and always the first and the last. If a fraction f
of all pages was damaged, it notices with probability 1 - (1 - f)^pages: 4,096 pages find 1 % damage but for one in 10^17.
``full`` hashes everything, in 2 MiB pieces on all cores. xxh3-128 (xxhash releases the GIL for large buffers).
"""

from __future__ import annotations

import mmap
import os
import random
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

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


def take_witness(located: Located, like: Witness) -> Witness:
    """Hash what ``like`` chooses. Blocking; raises OSError if the memory can't be opened or mapped."""
    if like.kind == "off":
        return like
    with _mapped(located) as ram:
        digest = _sampled(ram, like) if like.kind == "sampled" else _full(ram)
    return replace(like, digest=digest)


def measure_witness(located: Located, like: Witness) -> tuple[str, float]:
    """How long taking it takes (s), and what was measured. Blocking; raises OSError."""
    size, kind = located.identity.size_bytes, f"{like.kind}, {like.pages} pages" if like.pages else like.kind
    part = min(size, MEASURED_BYTES) if like.kind == "full" else size
    begun = time.monotonic()
    take_witness(replace(located, identity=replace(located.identity, size_bytes=part)), like)
    return kind, (time.monotonic() - begun) * size / part


def is_blank(located: Located) -> bool:
    """Blocking; raises OSError."""
    zeros = bytes(_CHUNK)
    with _mapped(located) as ram:
        return all(ram[at : at + _CHUNK] == zeros[: len(ram) - at] for at in range(0, len(ram), _CHUNK))


@contextmanager
def _mapped(located: Located) -> Iterator[memoryview]:
    identity = located.identity
    fd = os.open(located.node, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # device-dax takes MAP_SHARED only, in multiples of its alignment; definitions are checked for that.
        mapping = mmap.mmap(fd, identity.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=identity.offset_bytes)
    finally:
        os.close(fd)
    with mapping, memoryview(mapping) as ram:
        yield ram


def chosen_pages(size_bytes: int, seed: int, pages: int) -> list[int]:
    """Page numbers in ascending order, the first and the last always among them."""
    last = size_bytes // PAGE - 1
    if last + 1 <= pages:
        return list(range(last + 1))
    chosen = set(random.Random(seed).sample(range(1, last), pages - 2))  # noqa: S311 - a sample, not a secret
    return [0, *sorted(chosen), last]


def _sampled(ram: memoryview, like: Witness) -> str:
    digest = xxhash.xxh3_128(seed=like.seed)
    for page in chosen_pages(len(ram), like.seed, like.pages):
        digest.update(page.to_bytes(8, "little"))
        digest.update(ram[page * PAGE : (page + 1) * PAGE])
    return digest.hexdigest()


def _full(ram: memoryview) -> str:
    def piece(start: int) -> bytes:
        return xxhash.xxh3_128_digest(ram[start : start + _CHUNK])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = xxhash.xxh3_128()
        for part in pool.map(piece, range(0, len(ram), _CHUNK)):
            whole.update(part)
    return whole.hexdigest()

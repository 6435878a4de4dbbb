# SPDX-License-Identifier: GPL-2.0-or-later
"""The witness: a digest of pages of guest RAM, taken when the guest has stopped, and again before it runs.

A guest's NUMA nodes count as one RAM, in their order. ``sampled`` divides it into ``pages`` equal parts and hashes one page
of each, which a stored random seed chooses, and always the first and the last page of each node. If a fraction f of all
pages is damaged, it notices with probability 1 - (1 - f)^pages or more: 4,096 pages miss 1 % damage once in 10^17. ``full``
hashes everything, in 2 MiB pieces on all cores. The hash is xxh3-128; xxhash releases the GIL for large buffers.

A file is read, and never mapped: it belongs to the VM's user, who may cut it off, and whoever touches a mapping beyond its
end is killed (SIGBUS; mmap(2))."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import stat
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

import xxhash
from msgspec.structs import replace

from cpr_agent.core.model import Located, MemoryIdentity, Witness

PAGE = 4096
DEFAULT_PAGES = 4096
MEASURED_BYTES = 1 << 30
"""Hashed to measure the cost of a full witness: a multiple of each alignment that device-dax has."""
SHORTER = "it is shorter than it was"
SWAPS = Path("/proc/swaps")
"""File systems whose pages are in memory all the time, but for those of tmpfs that are swapped out."""
_CHUNK = 2 << 20
_READ = 256 << 10
"""At once, of a file: each thread has a buffer of that size."""
_MAX_THREADS = 32
"""Fewer use up a host's memory bandwidth, and each has a buffer."""
_SEGMENT = 64 << 20
_Piece = memoryview | tuple[int, int, int]
"""Mapped memory; or a descriptor to read from, with length and offset (bytes)."""
_Reader = Callable[[int, int], bytes | memoryview]


def new_witness(kind: str = "sampled") -> Witness:
    """A witness still to be taken, with a seed of its own."""
    if kind == "sampled":
        return Witness(
            kind="sampled", seed=random.SystemRandom().getrandbits(64), pages=DEFAULT_PAGES, chosen_by="shake-128"
        )
    return Witness(kind="full") if kind == "full" else Witness(kind="off")


def take_witness(located: Sequence[Located], like: Witness) -> Witness:
    """Hash what ``like`` chooses. Blocking; raises OSError if the memory can't be opened or mapped."""
    if like.kind == "off":
        return like
    if like.kind == "full":
        return replace(like, digest=_full(located))
    return replace(like, digest=(_sampled if like.chosen_by == "shake-128" else _sampled_at_random)(located, like))


@contextmanager
def prepared_witness(located: Sequence[Located], like: Witness) -> Iterator[Callable[[], Witness]]:
    """Do beforehand as much as is possible while the guest runs. Yields the function that takes the witness after the guest
    has stopped. Both block; either raises OSError or ValueError if the memory can't be opened or mapped."""
    if like.kind != "sampled":
        yield lambda: take_witness(located, like)
        return
    with _sample(located, like) as (head, parts):
        pieces = [*parts]
        try:
            if not _is_at_hand(located):
                _digest(like.seed, head, pieces)  # so that pages are mapped and cached, and errors are known
            yield lambda: replace(like, digest=_digest(like.seed, head, pieces))
        finally:
            pieces.clear()  # a mapping can't end while slices of it live


def _is_at_hand(located: Sequence[Located]) -> bool:
    """Whether it is whole, and none of it has to be mapped or read from a disk. Raises OSError."""
    for one in located:
        if not one.identity.in_ram or _swaps():
            return False
        with _opened(one) as fd:
            if os.fstat(fd).st_size < one.identity.offset_bytes + one.identity.size_bytes:
                raise OSError(errno.ENODATA, SHORTER)
    return True


def _swaps() -> bool:
    """Whether the host may have put any memory on a disk; /proc/swaps has a line for each place where it could."""
    try:
        return any(int(line.split()[-2]) for line in SWAPS.read_text().splitlines()[1:])
    except (OSError, ValueError, IndexError):
        return True


def measure_witness(located: Sequence[Located], like: Witness) -> tuple[str, float]:
    """The witness's kind in words, and how long it takes (s). Blocking; raises OSError."""
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
    """Whether all of it is zeros. Blocking; raises OSError."""
    zeros = bytes(_CHUNK)
    with _readers(located) as readers:
        sizes = (one.identity.size_bytes for one in located)
        pieces = (read(*piece) for read, size in zip(readers, sizes, strict=True) for piece in _pieces(size))
        return all(piece == zeros[: len(piece)] for piece in pieces)


@contextmanager
def _readers(located: Sequence[Located]) -> Iterator[list[_Reader]]:
    """For each range, what gives ``length`` bytes from ``begin`` on."""
    with ExitStack() as at_end:
        yield [at_end.enter_context(_reader(one)) for one in located]


@contextmanager
def _reader(located: Located) -> Iterator[_Reader]:
    with _opened(located) as fd:
        if _is_file(fd):
            yield lambda begin, length: _read(fd, length, located.identity.offset_bytes + begin)
            return
        with _mapped_from(fd, located.identity) as ram:
            yield lambda begin, length: ram[begin : begin + length]


def _is_file(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _read(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) < length:
        raise OSError(errno.ENODATA, SHORTER)
    return data


@contextmanager
def _opened(located: Located) -> Iterator[int]:
    """The VM's user may have put something else into the place of the file since it was located: a FIFO would be waited
    for."""
    fd = os.open(located.node, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info, identity = os.fstat(fd), located.identity
        if identity.kind == "file" and (info.st_dev, info.st_ino) != (identity.st_dev, identity.inode):
            raise OSError(errno.ESTALE, "another file has its name now")
        if not stat.S_ISREG(info.st_mode) and not stat.S_ISCHR(info.st_mode):
            raise OSError(errno.EINVAL, "it is neither a file nor a device")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _mapped_from(fd: int, identity: MemoryIdentity, begin: int = 0, length: int = 0) -> Iterator[memoryview]:
    """``length`` bytes from ``begin`` on; by default all."""
    # device-dax takes MAP_SHARED only, in multiples of its alignment; definitions are checked for that.
    at = identity.offset_bytes + begin
    mapping = mmap.mmap(fd, length or identity.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=at)
    with mapping, memoryview(mapping) as ram:
        yield ram


def chosen_pages(sizes: Sequence[int], seed: int, pages: int) -> list[int]:
    """Page numbers in ascending order, counted through all ranges of these ``sizes`` (bytes); always with the first and the
    last of each range. SHAKE128 (FIPS 202) chooses them, which is the same in every version of Python."""
    ends = list(accumulate(size // PAGE for size in sizes))
    if ends[-1] <= pages:
        return list(range(ends[-1]))
    words = struct.unpack(f"<{pages}Q", hashlib.shake_128(seed.to_bytes(9, "little")).digest(8 * pages))
    bounds = [at * ends[-1] // pages for at in range(pages + 1)]
    chosen = (begin + word % (end - begin) for begin, end, word in zip(bounds, bounds[1:], words, strict=False))
    return sorted({0, *chosen, *(page for end in ends for page in (end - 1, end))} - {ends[-1]})


def _parts(sizes: Sequence[int], like: Witness) -> tuple[bytes, list[tuple[int, int, int]]]:
    """The numbers of the pages to hash, packed; and for each piece the number of its range, its offset there, its length
    (bytes)."""
    chosen = chosen_pages(sizes, like.seed, like.pages)
    head = struct.pack(f"<{len(chosen)}Q", *chosen)
    if len(chosen) * PAGE == sum(sizes):
        return head, [(number, 0, size) for number, size in enumerate(sizes)]
    parts: list[tuple[int, int, int]] = []
    begin = 0
    for number, size in enumerate(sizes):
        end = begin + size // PAGE
        here = chosen[bisect_left(chosen, begin) : bisect_left(chosen, end)]
        parts += [(number, (page - begin) * PAGE, PAGE) for page in here]
        begin = end
    return head, parts


def _sampled(located: Sequence[Located], like: Witness) -> str:
    with _sample(located, like) as (head, pieces):
        return _digest(like.seed, head, pieces)


@contextmanager
def _sample(located: Sequence[Located], like: Witness) -> Iterator[tuple[bytes, Iterator[_Piece]]]:
    """The input of the hash: the numbers of the pages, packed, and then the pages. A guest waits for thousands of them, all
    over its RAM: in a file a pread(2) is cheaper than a mapping's page fault and end. device-dax can't be read, but maps 2
    MiB at once."""
    head, parts = _parts([one.identity.size_bytes for one in located], like)
    with ExitStack() as at_end:
        places: list[Callable[[int, int], _Piece]] = []
        for one in located:
            fd = at_end.enter_context(_opened(one))
            if _is_file(fd):
                places.append(partial(_place, fd, one.identity.offset_bytes))
            else:
                places.append(partial(_slice, at_end.enter_context(_mapped_from(fd, one.identity))))
        whole = len(parts) == len(located)
        split = [(at, *piece) for at, _, length in parts for piece in _pieces(length)] if whole else parts
        yield head, (places[at](begin, length) for at, begin, length in split)


def _slice(ram: memoryview, begin: int, length: int) -> memoryview:
    return ram[begin : begin + length]


def _place(fd: int, offset: int, begin: int, length: int) -> tuple[int, int, int]:
    return fd, length, offset + begin


def _digest(seed: int, head: bytes, pieces: Iterable[_Piece]) -> str:
    digest = xxhash.xxh3_128(head, seed=seed)
    for piece in pieces:
        if isinstance(piece, tuple):
            data = os.pread(*piece)
            if len(data) < piece[1]:
                raise OSError(errno.ENODATA, SHORTER)
            digest.update(data)
        else:
            digest.update(piece)
    return digest.hexdigest()


def _sampled_at_random(located: Sequence[Located], like: Witness) -> str:
    """For checkpoints before manifest schema 3: Python's random module chose the pages, and another Python may choose
    others."""
    ends = list(accumulate(one.identity.size_bytes // PAGE for one in located))
    chosen = set(range(ends[-1]))
    if ends[-1] > like.pages:
        ends_of_ranges = {page for end in ends for page in (end - 1, end)} - {ends[-1]}
        chosen = {0, *random.Random(like.seed).sample(range(1, ends[-1] - 1), like.pages - 2), *ends_of_ranges}  # noqa: S311
    digest = xxhash.xxh3_128(seed=like.seed)
    with _readers(located) as readers:
        for read, one, end in zip(readers, located, ends, strict=True):
            begin = end - one.identity.size_bytes // PAGE
            for page in sorted(page for page in chosen if begin <= page < end):
                digest.update(page.to_bytes(8, "little"))
                digest.update(read((page - begin) * PAGE, PAGE))
    return digest.hexdigest()


def _full(located: Sequence[Located]) -> str:
    """Each thread maps one segment at a time, and unmaps it while the others hash. One mapping of all of a large guest's
    RAM would at its end keep one thread busy with page tables, for as long as a sixth of the hashing."""
    whole = xxhash.xxh3_128()
    with ExitStack() as at_end:
        segments: list[tuple[int, MemoryIdentity, int, int]] = []
        for one in located:
            fd, identity = at_end.enter_context(_opened(one)), one.identity
            step = max(_SEGMENT, identity.align_bytes, identity.page_bytes)
            begins = range(0, identity.size_bytes, step)
            segments += [(fd, identity, begin, min(step, identity.size_bytes - begin)) for begin in begins]
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            for digests in pool.map(_digests, segments):
                whole.update(digests)
    return whole.hexdigest()


def _digests(segment: tuple[int, MemoryIdentity, int, int]) -> bytes:
    fd, identity, begin, length = segment
    if _is_file(fd):
        at, buffer = identity.offset_bytes + begin, memoryview(bytearray(_READ))
        return b"".join(_digest_read(fd, at + piece, size, buffer) for piece, size in _pieces(length))
    with _mapped_from(*segment) as ram:
        return b"".join(xxhash.xxh3_128_digest(ram[piece : piece + size]) for piece, size in _pieces(length))


def _digest_read(fd: int, offset: int, length: int, buffer: memoryview) -> bytes:
    """By way of the same buffer each time: the pages of a new one would cost as much as the hash."""
    digest = xxhash.xxh3_128()
    for at in range(0, length, len(buffer)):
        part = buffer[: min(len(buffer), length - at)]
        if os.preadv(fd, [part], offset + at) < len(part):
            raise OSError(errno.ENODATA, SHORTER)
        digest.update(part)
    return digest.digest()


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """Where each begins, and its length."""
    return ((at, min(_CHUNK, length - at)) for at in range(0, length, _CHUNK))

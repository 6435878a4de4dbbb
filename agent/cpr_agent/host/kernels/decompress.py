# SPDX-License-Identifier: GPL-2.0-or-later
"""What initrds are compressed with, unpacked piece by piece. Sources: lib/decompress*.c; RFC 8878 (zstd)."""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import select
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, Protocol

CHUNK_BYTES = 1 << 18
MOST_BYTES = 4 << 30
"""An initrd that unpacks to more would not fit into most hosts, and the kernel keeps all of it in memory."""
MOST_ENTRIES = 500_000
DICTIONARY_BYTES = 512 << 20
"""Memory that xz or lzma may ask for."""
LZ4_BLOCK_BYTES = (8 << 20) + (8 << 20) // 255 + 16
"""Most that a block of LZ4's legacy frame can have (``LZ4_compressBound`` of 8 MiB, lib/decompress_unlz4.c)."""


CUT_OFF = "is cut off: its compressed part ends early"


class BadArchive(ValueError):
    """Why an initrd would not be unpacked as a whole: goes after its name in a sentence."""


class Budget:
    """Bounds what is spent on one initrd: time (up to ``deadline`` of the monotonic clock), bytes unpacked, files in it."""

    def __init__(self, deadline: float) -> None:
        self._began = time.monotonic()
        self._deadline = deadline
        self._bytes = MOST_BYTES
        self._entries = MOST_ENTRIES

    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def look(self) -> None:
        """Raises BadArchive when the time is up."""
        if time.monotonic() > self._deadline:
            raise BadArchive(f"could not be read to its end within {self._deadline - self._began:.0f} s")

    def unpacked(self, size_bytes: int) -> None:
        self.look()
        self._bytes -= size_bytes
        if self._bytes < 0:
            raise BadArchive(f"unpacks to more than {MOST_BYTES >> 30} GiB")

    def entry(self) -> None:
        self._entries -= 1
        if self._entries < 0:
            raise BadArchive(f"has more than {MOST_ENTRIES} files in it")


class Window(NamedTuple):
    """A file up to ``end``."""

    fd: int
    end: int

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.fd, max(0, min(size, self.end - at)), at)

    def need(self, at: int, size: int) -> bytes:
        """Raises BadArchive if there are not so many bytes."""
        data = self.read(at, size)
        if len(data) < size:
            raise BadArchive(CUT_OFF)
        return data


class Decompressor(Protocol):
    """What bz2's and lzma's have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class Kind(NamedTuple):
    """A compression: its name, the kernel's config symbol for it, and either a decompressor or a program with the end of
    what it is to be given."""

    name: str
    symbol: str
    decompressor: Callable[[], Decompressor] | None = None
    program: str = ""
    end: Callable[[Window, int], int] | None = None


class _Gzip:
    """zlib's as the others are."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)  # with gzip's header and checksum
        self._rest = b""

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._rest

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        out = self._zlib.decompress(self._rest + data, max_length)
        self._rest = self._zlib.unconsumed_tail
        return out


def _xz() -> Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DICTIONARY_BYTES)


def _lzma() -> Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=DICTIONARY_BYTES)


def _zstd_end(window: Window, at: int) -> int:
    """Where a frame ends, by the headers of its blocks."""
    (descriptor,) = window.need(at + 4, 1)
    single = bool(descriptor & 0x20)
    at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + (int(single), 2, 4, 8)[descriptor >> 6]
    last = False
    while not last:
        header = int.from_bytes(window.need(at, 3), "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == 3:
            raise BadArchive("is damaged: a block of its compressed part is of no known kind")
        at += 3 + (1 if kind == 1 else size)  # one byte, repeated
    at += 4 if descriptor & 0x04 else 0
    window.need(at - 1, 1)
    return at


def _lz4_end(window: Window, at: int) -> int:
    """Where a legacy frame ends. It does not say how many blocks it has: at the end of the file, or at what is no size."""
    at += 4
    window.need(at, 5)  # a size, and something of the first block
    while size := int.from_bytes(window.read(at, 4), "little"):
        if size > LZ4_BLOCK_BYTES:
            break  # another frame, or an archive of another kind, begins
        window.need(at + 4 + size - 1, 1)
        at += 4 + size
    left = window.end - at
    if 0 < left < 4 and window.read(at, left).strip(b"\0"):
        raise BadArchive(CUT_OFF)
    return at


def _rest(window: Window, _: int) -> int:
    return window.end


MAGICS = {
    b"\x1f\x8b": Kind("gzip", "RD_GZIP", _Gzip),
    b"BZh": Kind("bzip2", "RD_BZIP2", bz2.BZ2Decompressor),
    b"\xfd7zXZ": Kind("xz", "RD_XZ", _xz),
    b"\x5d\x00\x00": Kind("lzma", "RD_LZMA", _lzma),
    b"\x28\xb5\x2f\xfd": Kind("zstd", "RD_ZSTD", program="zstd", end=_zstd_end),
    b"\x02\x21\x4c\x18": Kind("lz4", "RD_LZ4", program="lz4", end=_lz4_end),
    b"\x89LZO": Kind("lzo", "RD_LZO", program="lzop", end=_rest),
}
"""Of lib/decompress.c, which looks at two bytes."""


class Compressed:
    """A compressed piece of ``window`` that begins at ``at``, and ends at ``end``, which a library knows once all chunks
    are taken; ``why_not`` says why it can't be unpacked. Raises BadArchive if already its outside is not whole."""

    def __init__(self, window: Window, at: int, kind: Kind, budget: Budget) -> None:
        self._window, self._at, self._kind, self._budget = window, at, kind, budget
        self.end = kind.end(window, at) if kind.end else at
        self.why_not = f"{kind.program} is not installed" if kind.program and not shutil.which(kind.program) else ""
        if kind.symbol == "RD_XZ" and window.need(at + 7, 1) not in (b"\0", b"\1"):
            # lib/xz without XZ_DEC_ANY_CHECK: XZ_OPTIONS_ERROR
            raise BadArchive("has a checksum of xz that no kernel knows: compress it with --check=crc32")

    def chunks(self) -> Generator[bytes, None, None]:
        """What it unpacks to. Raises BadArchive."""
        for chunk in self._by_program() if self._kind.program else self._by_library():
            self._budget.unpacked(len(chunk))
            yield chunk

    def _by_library(self) -> Iterator[bytes]:
        assert self._kind.decompressor
        decompressor = self._kind.decompressor()
        while not decompressor.eof:
            data = self._window.read(self.end, CHUNK_BYTES) if decompressor.needs_input else b""
            self.end += len(data)
            try:
                chunk = decompressor.decompress(data, CHUNK_BYTES)
            except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
                raise BadArchive(f"is damaged: {self._kind.name} says: {error}") from None
            if chunk:
                yield chunk
            elif not (data or decompressor.eof):
                raise BadArchive(CUT_OFF)
            else:
                self._budget.look()
        self.end -= len(decompressor.unused_data)

    def _by_program(self) -> Iterator[bytes]:
        program = subprocess.Popen(
            [self._kind.program, "-dcq"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
        with program:
            assert program.stdout
            assert program.stderr
            feeder = threading.Thread(target=self._feed, args=(program,), daemon=True)
            feeder.start()
            try:
                while chunk := self._wait(program.stdout.fileno()):
                    yield chunk
                said = program.stderr.read(1024).decode(errors="replace").strip().splitlines()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(self._budget.left_s())
            finally:
                program.kill()
                feeder.join()
        if program.returncode:
            words = said[-1] if said else f"it ended with {program.returncode}"
            raise BadArchive(f"is damaged: {self._kind.program} says: {words}")

    def _wait(self, fd: int) -> bytes:
        if not select.select([fd], [], [], self._budget.left_s())[0]:
            self._budget.look()
        return os.read(fd, CHUNK_BYTES)

    def _feed(self, program: subprocess.Popen[bytes]) -> None:
        assert program.stdin
        with contextlib.suppress(OSError), program.stdin as pipe:  # OSError: it wants no more
            at = self._at
            while at < self.end and (data := self._window.read(at, min(CHUNK_BYTES, self.end - at))):
                pipe.write(data)
                at += len(data)

# SPDX-License-Identifier: GPL-2.0-or-later
"""An initrd, read to its end as the kernel will: cpio archives one after the other, each as it is or compressed.

Sources: init/initramfs.c, lib/decompress.c, Documentation/driver-api/early-userspace/buffer-format.rst. The kernel does not
mind an archive that ends in the middle of a file, and starts with half of it; here that is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpr_agent.host.kernels.decompress import MAGICS, BadArchive, Budget, Compressed, Window
from cpr_agent.host.kernels.files import open_regular
from cpr_agent.host.kernels.images import Part

HEADER_BYTES = 110
NAME_BYTES = 4096
"""PATH_MAX: the kernel skips what has a longer name."""
CPIO = (b"070701", b"070702")
TRAILER = b"TRAILER!!!"
WITHIN_A_FILE = "is cut off: it ends within a file"
TIMEOUT_S = 180.0

_MODULE = re.compile(rb"(?:^|/)(?:\d+-)?([\w+-]+)\.ko(?:\.(?:gz|xz|zst|bz2|lz4))?$")
"""Some initrds number modules in the order in which they are to be loaded."""
_VERSION = re.compile(rb"(?:^|/)lib/modules/([^/]+)/.")


@dataclass
class Contents:
    """What the agent wants to know of an initrd. ``unread`` says why a part was not unpacked, "" if all was."""

    entries: int = 0
    init: bool = False
    modules: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    """Kernels that it has modules of."""
    compressions: set[str] = field(default_factory=set)
    """Config symbols of what it is compressed with: ``RD_ZSTD``."""
    unread: str = ""

    def add(self, name: bytes) -> None:
        self.entries += 1
        path = name.lstrip(b"./")
        self.init = self.init or path == b"init"
        if module := _MODULE.search(path):
            self.modules.add(module[1].decode().replace("-", "_"))
        if version := _VERSION.search(path):
            self.versions.add(version[1].decode(errors="replace"))


def read_initrd(path: str | Path, part: Part | None = None, timeout_s: float = TIMEOUT_S) -> Contents:
    """All of the file, or a ``part`` of it, within a bound of time and size. Raises BadArchive, OSError."""
    contents = Contents()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        offset, length = part or (0, size)
        window = _without_bootconfig(Window(file.fileno(), min(offset + length, size)), offset)
        budget = Budget(time.monotonic() + timeout_s)
        at = offset
        if window.end <= at:
            raise BadArchive("is empty")
        if _after_zeros(window, at, budget) == window.end:
            raise BadArchive("has nothing but zeros in it")
        while (at := _after_zeros(window, at, budget)) < window.end:
            magic = window.read(at, len(CPIO[0]))
            if magic.startswith(b"0"):
                at = _plain(window, at, contents, budget)
                continue
            kind = next((kind for start, kind in MAGICS.items() if magic.startswith(start)), None)
            if not kind and at == offset:
                raise BadArchive("is neither a cpio archive nor compressed in a way that a kernel knows")
            if not kind:
                raise BadArchive(f"has bytes after byte {at - offset} that are neither an archive nor padding")
            contents.compressions.add(kind.symbol)
            stream = Compressed(window, at, kind, budget)
            if stream.why_not:
                contents.unread = stream.why_not
            else:
                with contextlib.closing(stream.chunks()) as chunks:
                    _walk(_Reader(chunks), contents, budget)
            at = stream.end
    return contents


def _without_bootconfig(window: Window, offset: int) -> Window:
    """Documentation/admin-guide/bootconfig.rst: it is appended to an initrd, with its size, checksum and this word."""
    word = b"#BOOTCONFIG\n"
    end = window.end - len(word)
    if end - 8 < offset or window.read(end, len(word)) != word:
        return window
    return Window(window.fd, max(offset, end - 8 - int.from_bytes(window.read(end - 8, 4), "little")))


def _after_zeros(window: Window, at: int, budget: Budget) -> int:
    while chunk := window.read(at, 1 << 16):
        budget.look()
        rest = chunk.lstrip(b"\0")
        at += len(chunk) - len(rest)
        if rest:
            break
    return at


class _Reader:
    """Chunks as a stream that can be read and skipped; ``at`` is how far it is."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._used = 0
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes that were taken from the chunks, and not read."""
        return len(self._chunk) - self._used

    def _more(self) -> bool:
        while not self.left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._chunk, self._used = chunk, 0
        return True

    def _take(self, count: int) -> bytes:
        taken = self._chunk[self._used : self._used + count]
        self._used += len(taken)
        self.at += len(taken)
        return taken

    def read(self, count: int) -> bytes:
        """Raises BadArchive if there are not so many."""
        out = self._take(min(count, self.left))
        while len(out) < count and self._more():
            out += self._take(min(count - len(out), self.left))
        if len(out) < count:
            raise BadArchive(WITHIN_A_FILE)
        return out

    def skip(self, count: int) -> None:
        """Raises BadArchive if there are not so many."""
        while count and self._more():
            some = min(count, self.left)
            self._used += some
            self.at += some
            count -= some
        if count:
            raise BadArchive(WITHIN_A_FILE)

    def skip_zeros(self) -> bool:
        """False at the end."""
        while self._more():
            if self._chunk[self._used]:
                return True
            rest = self._chunk[self._used :].lstrip(b"\0")
            self.at += self.left - len(rest)
            self._chunk, self._used = rest, 0
        return False


def _plain(window: Window, at: int, contents: Contents, budget: Budget) -> int:
    """An archive that is not compressed: it ends after its trailer. Returns where."""

    read_up_to = at

    def chunks() -> Iterator[bytes]:
        nonlocal read_up_to
        while chunk := window.read(read_up_to, 1 << 18):
            read_up_to += len(chunk)
            budget.look()
            yield chunk

    reader = _Reader(chunks())
    if not _one(reader, contents, budget):
        return window.end
    return read_up_to - reader.left


def _walk(reader: _Reader, contents: Contents, budget: Budget) -> None:
    """The archives within a compressed one."""
    while _one(reader, contents, budget) and reader.skip_zeros():
        pass


def _one(reader: _Reader, contents: Contents, budget: Budget) -> bool:
    """One archive, up to its trailer; False if it has none because it holds nothing. Raises BadArchive."""
    before = contents.entries
    while reader.skip_zeros():
        if reader.at % 4:
            raise BadArchive(f"is damaged: a file begins at byte {reader.at} of an archive, which 4 does not divide")
        header = reader.read(HEADER_BYTES)
        if not header.startswith(CPIO):
            raise BadArchive(f"is damaged: at byte {reader.at - HEADER_BYTES} of an archive no file begins")
        size, name_size = _number(header[54:62]), _number(header[94:102])
        budget.entry()
        if not 0 < name_size <= NAME_BYTES:
            reader.skip(-(HEADER_BYTES + name_size) % 4 + name_size + size + -size % 4)
            continue
        name = reader.read(name_size).rstrip(b"\0")
        if name == TRAILER:
            reader.skip(-(HEADER_BYTES + name_size) % 4)
            return True
        reader.skip(-(HEADER_BYTES + name_size) % 4 + size + -size % 4)
        contents.add(name)
    if contents.entries > before:
        raise BadArchive("is cut off: an archive in it ends without its trailer")
    return False


def _number(digits: bytes) -> int:
    """As the kernel's simple_strtoul reads them: up to what is no hexadecimal digit."""
    match = re.match(rb"[0-9A-Fa-f]+", digits)
    return int(match[0], 16) if match else 0

# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel's image: a bzImage, or a unified kernel image (UKI) that has kernel, initrd and command line as sections.

Sources: Documentation/arch/x86/boot.rst, ``bzImage64_probe`` (arch/x86/kernel/kexec-bzimage64.c), "PE Format"
(learn.microsoft.com), systemd-stub(7), and the UAPI group's specification "Unified Kernel Image".
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cpr_agent.host.kernels.files import NOT_REGULAR, head, open_regular
from cpr_agent.host.kernels.versions import VERSION

SETUP_BYTES = 64 << 10
"""No real-mode part of an x86 kernel is larger."""
HEADER_BYTES = 1024
MOST_SECTIONS = 96
"""Windows' limit; systemd-stub's images have about ten."""
TEXT_BYTES = 4096
"""Most to read of a section that is a line of text."""


class Part(NamedTuple):
    """A piece of a file."""

    offset: int
    size: int


class Uki(NamedTuple):
    """A unified kernel image. Of several sections with one name the first counts, which is the default profile's."""

    path: str
    sections: dict[str, Part]

    def text(self, section: str) -> str:
        """Of one that is a line of text; "" if there is none. Raises OSError."""
        part = self.sections.get(section)
        if not part or part.size > TEXT_BYTES:
            return ""
        with open_regular(self.path) as file:
            file.seek(part.offset)
            return file.read(part.size).rstrip(b"\0").decode(errors="replace").strip()


class NoUki(ValueError):
    """Why a file is no unified kernel image."""


def read_uki(path: str | Path) -> Uki:
    """Raises NoUki, OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            sections = _sections(file, size)
        except struct.error:
            raise NoUki("ends within its headers") from None
    if ".linux" not in sections:
        raise NoUki("has no kernel in it (no section .linux)")
    for name, part in sections.items():
        if part.offset + part.size > size:
            raise NoUki(f"is cut off: its section {name} goes on to byte {part.offset + part.size}, and it has {size}")
    return Uki(str(path), sections)


def is_uki(path: str | Path) -> bool:
    try:
        read_uki(path)
    except (NoUki, OSError):
        return False
    return True


def _sections(file: BinaryIO, size: int) -> dict[str, Part]:
    start = file.read(64)
    if start[:2] != b"MZ":
        raise NoUki("is not a PE image")
    (at,) = struct.unpack_from("<I", start, 0x3C)
    if at >= size:
        raise NoUki("is not a PE image")
    file.seek(at)
    coff = file.read(24)
    if coff[:4] != b"PE\0\0":
        raise NoUki("is not a PE image")
    count, optional = struct.unpack_from("<H12xH", coff, 6)
    if count > MOST_SECTIONS:
        raise NoUki(f"has {count} sections")
    file.seek(at + 24 + optional)
    sections: dict[str, Part] = {}
    for _ in range(count):
        entry = file.read(40)
        virtual, raw, offset = struct.unpack_from("<I4xII", entry, 8)
        name = entry[:8].rstrip(b"\0").decode("ascii", errors="replace")
        sections.setdefault(name, Part(offset, min(virtual, raw) if virtual else raw))
    return sections


def image_problem(path: str) -> str:
    """Why ``path`` can't be loaded for a kexec, "" if nothing of it speaks against that."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(HEADER_BYTES)
            if not size:
                return "is empty"
            if os.uname().machine != "x86_64" and Path(path).suffix != ".efi":
                return ""
            if not _is_bzimage(start) and (start[:2] == b"MZ" or Path(path).suffix == ".efi"):
                uki = read_uki(path)
                part = uki.sections[".linux"]
                file.seek(part.offset)
                inside = _bzimage_problem(file.read(min(HEADER_BYTES, part.size)), part.size)
                return f"has a kernel in it that {inside}" if inside else ""
            return _bzimage_problem(start, size)
    except OSError as error:
        return f"is {NOT_REGULAR}" if error.strerror == NOT_REGULAR else f"can't be read: {error.strerror}"
    except NoUki as error:
        return f"is neither a bzImage nor a unified kernel image: it {error}"


def version_inside(path: str | Path) -> str:
    """What an image says of itself (``kernel_version`` in boot.rst, a UKI's ``.uname``), "" if nothing."""
    try:
        start = head(path, SETUP_BYTES)
        if _is_bzimage(start):
            return _version_of(start)
        uki = read_uki(path)
        if VERSION.fullmatch(named := uki.text(".uname")):
            return named
        part = uki.sections[".linux"]
        with open_regular(path) as file:
            file.seek(part.offset)
            return _version_of(file.read(min(SETUP_BYTES, part.size)))
    except (OSError, NoUki, struct.error):
        return ""


def _is_bzimage(start: bytes) -> bool:
    return start[0x1FE:0x200] == b"\x55\xaa" and start[0x202:0x206] == b"HdrS"


def _version_of(start: bytes) -> str:
    (at,) = struct.unpack_from("<H", start, 0x20E) if _is_bzimage(start) else (0,)
    word = start[0x200 + at : 0x200 + at + 256].split(b"\0")[0].partition(b" ")[0].decode(errors="replace")
    return word if at and VERSION.fullmatch(word) else ""


def _bzimage_problem(start: bytes, size: int) -> str:
    """What bzImage64_probe would refuse; and what it would take and could not start, since its end is missing."""
    if os.uname().machine != "x86_64":
        return ""
    if len(start) < HEADER_BYTES or not _is_bzimage(start):
        return "is not a bzImage"
    (protocol,), (flags,) = struct.unpack_from("<H", start, 0x206), struct.unpack_from("<H", start, 0x236)
    if protocol < 0x20C:
        return f"speaks boot protocol {protocol >> 8}.{protocol & 0xFF:02}, and a kexec needs 2.12"
    if not start[0x211] & 1 or not flags & 0b01:  # LOADED_HIGH, XLF_KERNEL_64
        return "is not a 64-bit bzImage"
    if not flags & 0b10:  # XLF_CAN_BE_LOADED_ABOVE_4G
        return "can't be loaded above 4 GiB"
    (paragraphs,) = struct.unpack_from("<I", start, 0x1F4)  # syssize
    whole = ((start[0x1F1] or 4) + 1) * 512 + paragraphs * 16
    if paragraphs and size < whole:
        return f"is cut off: it has {size} bytes of {whole}"
    return ""

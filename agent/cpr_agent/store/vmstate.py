# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's state file: whether it is one, its machine and its CPUs.

The format is that of migration/savevm.c, behind libvirt's own header where that has saved it: a header, the machine's name,
a section for each device, and at the end a description of all sections in JSON. A file of cpr-save has no description; one
of the original proposal names no machine either.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import BinaryIO

import msgspec

from cpr_agent.core.model import Vmstate
from cpr_agent.errors import NotVmstate
from cpr_agent.files import digest_of
from cpr_agent.store import image

MAGIC = b"QEVM"
VERSION = 3
"""QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION of migration/savevm.h; numbers are big-endian."""
_CONFIGURATION = b"\x07"
_DESCRIPTION = b"\x06"
"""QEMU_VM_CONFIGURATION and QEMU_VM_VMDESCRIPTION, the bytes that begin these sections."""
_CPU = re.compile(rb"\x04.{4}\x0acpu_common(.{4})\x00\x00\x00.", re.DOTALL)
"""The section of a CPU (QEMU_VM_SECTION_FULL): number in the file, length and name, instance, version."""

MAX_BYTES = 256 << 20
"""Of a state: it has some hundred KB, and as much more as its devices have RAM of their own. A QEMU may make its file as
large as it likes, and others wait while it is read."""
_HEAD_BYTES = 4096
_TAIL_BYTES = 4 << 20
"""The description is at the end, and has some hundred KB."""
_MAX_CANDIDATES = 20_000
"""Bytes that could begin the description."""


class _Device(msgspec.Struct):
    name: str = ""


class _Description(msgspec.Struct):
    """The part of it that is needed; the rest is a hundred kilobytes of devices' fields."""

    devices: tuple[_Device, ...] = ()


_DECODER = msgspec.json.Decoder(_Description)
"""See store/schema.py, READ."""


def inspect(fd: int, path: str, vm: str) -> Vmstate:
    """Read an open state file, once; the offset of ``fd`` stays. Raises NotVmstate, OSError."""
    problem = ""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        problem = "it is not a regular file"
    elif info.st_size > MAX_BYTES:
        problem = f"it has {info.st_size} bytes, more than the {MAX_BYTES} that a state may have"
    else:
        with open(os.dup(fd), "rb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.seek(0)
            digest, size = digest_of(file, info.st_size)
            file.seek(_begin(file, path, vm))
            head = file.read(_HEAD_BYTES)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
        os.lseek(fd, 0, os.SEEK_SET)  # the duplicate shares the offset, and QEMU reads from where it is
        problem = _header_problem(head)
    if problem:
        raise NotVmstate(f"{path} is not a QEMU state file: {problem}", vm=vm, left="nothing was loaded")
    cpus = sum(device.name == "cpu_common" for device in _description(tail).devices)
    if not cpus and size <= _TAIL_BYTES:
        cpus = len({section[1] for section in _CPU.finditer(tail)})
    return Vmstate(
        path=path,
        size_bytes=size,
        sha256=digest,
        machine=_machine(head),
        cpus=cpus,
    )


def _begin(file: BinaryIO, path: str, vm: str) -> int:
    """Where QEMU's state begins. Raises NotVmstate."""
    file.seek(0)
    if file.read(len(image.STEM)) != image.STEM:
        return 0
    file.seek(0)
    return image.header_of(file.read(image.MAX_HEAD_BYTES), path, vm).state_at


def _header_problem(data: bytes) -> str:
    if not data:
        return "it is empty"
    if data[:4] != MAGIC:
        return f"it starts with {data[:4]!r} where QEMU writes {MAGIC!r}"
    if (version := int.from_bytes(data[4:8], "big")) != VERSION:
        return f"its version is {version}, known is {VERSION}"
    return ""


def _machine(data: bytes) -> str:
    """The machine type, as ``pc-q35-10.0``; "" if the file does not say."""
    if data[8:9] != _CONFIGURATION:
        return ""
    length = int.from_bytes(data[9:13], "big")
    return data[13 : 13 + length].decode("ascii", "replace")


def _description(tail: bytes) -> _Description:
    """The file's last section; empty if the file was cut off before its end."""
    at = len(tail)
    for _ in range(_MAX_CANDIDATES):
        at = tail.rfind(_DESCRIPTION, 0, at)
        if at < 0:
            break
        if int.from_bytes(tail[at + 1 : at + 5], "big") == len(tail) - at - 5:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
                return _DECODER.decode(tail[at + 5 :])
    return _Description()

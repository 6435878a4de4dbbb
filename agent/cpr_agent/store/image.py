# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's save image: a header, the domain's XML, and QEMU's state (virQEMUSaveHeader, src/qemu/qemu_saveimage.h).

Numbers have the byte order of the host that wrote them. ``data_len`` bytes of XML, of a cookie and of padding follow the
header; then comes what QEMU has written, by which it began its state.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cpr_agent.errors import NotVmstate

MAGIC = b"LibvirtQemudSave"
PARTIAL = b"LibvirtQemudPart"
"""Of an image that is not complete."""
STEM = b"LibvirtQemud"
VERSION = 2
RAW = 0
"""The format of an image that is not compressed; what else there is an adopted domain can't have."""
_HEAD = struct.Struct("=16s5I56x")
"""Magic, version, data_len, was_running, format, cookie_offset, and room."""
PADDING_BYTES = 1024
"""As libvirt leaves for later changes of the XML."""
MAX_HEAD_BYTES = 16 << 20
"""Of all that comes before QEMU's state."""


class Header(NamedTuple):
    """``xml`` is the domain's, ``cookie`` libvirt's own notes, b"" if there are none. QEMU's state begins at
    ``state_at``."""

    xml: str
    cookie: bytes
    was_running: bool
    state_at: int


def header_of(image: bytes, path: str, vm: str) -> Header:
    """Of the beginning of an image, which has all of its XML. Raises NotVmstate."""
    what = f"{path} is not an image of libvirt's that the agent can use"
    if len(image) < _HEAD.size:
        raise NotVmstate(f"{what}: it has {len(image)} bytes", vm=vm)
    magic, version, data_len, was_running, form, cookie_at = _HEAD.unpack_from(image)
    problem = ""
    if magic != MAGIC:
        problem = "it is not complete" if magic == PARTIAL else f"it starts with {magic!r}"
    elif version != VERSION:
        problem = f"its version is {version}, known is {VERSION}"
    elif form != RAW:
        problem = f"its format is {form}; save_image_format in qemu.conf must be raw"
    elif not 0 < data_len <= MAX_HEAD_BYTES or len(image) < _HEAD.size + data_len or cookie_at >= data_len:
        problem = "it ends in its XML"
    if problem:
        raise NotVmstate(f"{what}: {problem}", vm=vm)
    data = image[_HEAD.size : _HEAD.size + data_len]
    xml, _, _ = data[: cookie_at or None].partition(b"\0")
    cookie = data[cookie_at:].partition(b"\0")[0] if cookie_at else b""
    try:
        return Header(xml.decode(), cookie, bool(was_running), _HEAD.size + data_len)
    except UnicodeDecodeError as error:
        raise NotVmstate(f"{what}: its XML is not UTF-8: {error}", vm=vm) from error


def rewritten(image: bytes, header: Header, xml: str, *, running: bool) -> bytes:
    """The image with another XML, for a guest that is to run once it is restored, or not to."""
    data = xml.encode() + b"\0"
    cookie_at = len(data) if header.cookie else 0
    data += header.cookie + b"\0" if header.cookie else b""
    data += bytes(PADDING_BYTES)
    head = _HEAD.pack(MAGIC, VERSION, len(data), running, RAW, cookie_at)
    return head + data + image[header.state_at :]

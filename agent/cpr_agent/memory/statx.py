# SPDX-License-Identifier: GPL-2.0-or-later
"""statx(2), which Python's os lacks before 3.15: what the kernel knows of a file without asking its file system."""

from __future__ import annotations

import ctypes
import os
import stat

import msgspec

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_WANTED = 0x001 | 0x100  # STATX_TYPE, STATX_INO; the numbers of devices are always there
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Statx(ctypes.Structure):
    """``struct statx`` of linux/stat.h."""

    _fields_ = (
        ("before_mode", ctypes.c_uint32 * 7),
        ("mode", ctypes.c_uint16),
        ("padding", ctypes.c_uint16),
        ("inode", ctypes.c_uint64),
        ("before_devices", ctypes.c_uint64 * 11),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 14),
    )


class Key(msgspec.Struct, frozen=True):
    """Identifies a character device by its number, whatever its node is, or a file."""

    kind: str
    device: int
    inode: int


def key_of(info: os.stat_result) -> Key:
    if stat.S_ISCHR(info.st_mode):
        return Key("device", info.st_rdev, 0)
    return Key("file", info.st_dev, info.st_ino)


def known_key(path: str) -> Key:
    """The same of ``path``, by what the kernel has in memory: stat(2) of a descriptor waits for a server that is gone, for
    ever (measured with FUSE; nfs_getattr() in fs/nfs/inode.c does likewise). Raises OSError."""
    found = _Statx()
    if _LIBC.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _WANTED, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    if stat.S_ISCHR(found.mode):
        return Key("device", os.makedev(found.rdev_major, found.rdev_minor), 0)
    return Key("file", os.makedev(found.dev_major, found.dev_minor), found.inode)

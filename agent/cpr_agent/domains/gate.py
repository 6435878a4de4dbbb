# SPDX-License-Identifier: GPL-2.0-or-later
"""The gate: the path by which a domain's QEMU opens its RAM is there only while an act of the agent lets it be.

The XML of an adopted domain names a link below /run/cpr-agent/gate. Without that link every start of the domain fails with
ENOENT, for root too, and the guest's RAM stays as it is: whoever starts it, from whatever image. Root
alone can make the link, and what it leads to must be root's as well: QEMU's user is that of all domains, and serves their
guests. It may open the memory only meanwhile, by an entry in the access control list."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from cpr_agent.core.model import VM_NAME
from cpr_agent.core.paths import why_way_swappable
from cpr_agent.errors import MemoryUnusable
from cpr_agent.handles import NotOursError, directory_at

CLOSED = "the gate to its memory is closed, and nothing was started"


class Grants(Protocol):
    """Entries in access control lists: host.grants.DeviceGrants, and the very one of own VMs, which share devices with
    domains."""

    def give(self, place: str, devices: Sequence[int], uid: int) -> None: ...

    def take_back(self, place: str) -> None: ...

    def restore(self, device: int) -> None: ...


class Gate:
    """``directory`` holds a link for each domain whose gate is open. QEMU's user may pass it, and root alone may write to
    it."""

    def __init__(self, directory: Path, grants: Grants) -> None:
        self._directory = directory
        self._grants = grants

    def path(self, name: str) -> Path:
        """The one that the domain's XML names. Raises MemoryUnusable for a name that no VM can have."""
        if not VM_NAME.fullmatch(name):
            raise MemoryUnusable(f"{name!r} is not a name that a VM can have", left=CLOSED)
        return self._directory / name

    def open(self, name: str, node: str, descriptor: int, uid: int) -> None:
        """Let a QEMU of user ``uid`` open ``node`` by ``path`` until ``close``; ``descriptor`` is that node, open, and
        proved to be the guest's memory. Raises MemoryUnusable, and the gate is closed then."""
        self.path(name)
        try:
            self.close(name)
            _refuse_foreign(Path(node), descriptor)
            with self._opened() as directory:
                self._grants.give(_place(name), [descriptor], uid)
                os.symlink(node, name, dir_fd=directory)
                if not os.path.samestat(os.stat(name, dir_fd=directory), os.fstat(descriptor)):
                    raise NotOursError(node, "it is not the memory that was proved")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.close(name)
            what = f"the gate to its memory {node} can't be opened: {error.strerror}"
            raise MemoryUnusable(what, vm=name, left=CLOSED) from error

    def is_open(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def close(self, name: str) -> None:
        """Also if it is closed. A QEMU that has the memory open keeps it. Raises OSError."""
        self.path(name)
        try:
            with contextlib.suppress(FileNotFoundError), self._opened() as directory:
                os.unlink(name, dir_fd=directory)
        finally:
            self._grants.take_back(_place(name))

    def close_all(self) -> None:
        """Close what an agent before this one has left open, before anybody may ask this one. Raises OSError: nothing may
        go on then."""
        with contextlib.suppress(FileExistsError):
            self._directory.mkdir(mode=0o711)
            self._directory.chmod(0o711)  # against the umask
        with self._opened() as directory:
            for name in os.listdir(directory):  # noqa: PTH208 - of a descriptor
                node = os.readlink(name, dir_fd=directory)
                os.unlink(name, dir_fd=directory)
                with contextlib.suppress(OSError):  # the device may be gone
                    self._restore(node)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Raises NotOursError if others may write to it, OSError."""
        with directory_at(self._directory) as directory:
            info = os.fstat(directory)
            if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise NotOursError(self._directory, "others than root may write to it")
            yield directory

    def _restore(self, node: str) -> None:
        descriptor = os.open(node, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._grants.restore(descriptor)
        finally:
            os.close(descriptor)


def _refuse_foreign(node: Path, descriptor: int) -> None:
    """A guest that has taken over its QEMU must be able neither to replace another guest's memory nor to give it away.
    Raises NotOursError, OSError."""
    info = os.fstat(descriptor)
    if info.st_uid not in (0, os.geteuid()):
        raise NotOursError(node, f"it belongs to user {info.st_uid}, who could replace it: chown root {node}")
    if why := why_way_swappable(node):
        raise NotOursError(node, why)


def _place(name: str) -> str:
    """In the list of grants; no place of an own VM has such a name."""
    return f"{name}:domain"

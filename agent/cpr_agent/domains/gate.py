# SPDX-License-Identifier: GPL-2.0-or-later
"""The gate: the path by which a domain's QEMU opens its RAM is there only while an act of the agent lets it be.

The XML of an adopted domain names /run/cpr-agent/gate/NAME/ram, a link. While the gate is closed neither the link nor its
directory is there, and each start of the domain fails with ENOENT: whoever starts it, from whatever image, and the guest's
RAM stays as it is. Without its directory, because QEMU makes a missing file where it may, and root may everywhere: a QEMU
that libvirt runs as root would boot its guest on that file (measured with 7.2, 10.0 and 11.1).

Root alone can make the link, and what it leads to must be root's as well: QEMU's user is that of all domains, and serves
their guests. It may open the memory only meanwhile, by an entry in the access control list.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from cpr_agent.core.model import VM_NAME
from cpr_agent.core.paths import why_way_swappable
from cpr_agent.errors import MemoryUnusable
from cpr_agent.handles import NotOursError, directory_at

log = logging.getLogger(__name__)

LIMIT_S = 150.0
"""No gate is open for longer, whatever becomes of the start: libvirt looks at a domain's disks and networks before it
starts QEMU, which then opens its memory at once. A QEMU that does not see the device behind the link, because
cgroup_device_acl lacks it, tries for ever, and libvirt with it, until the link is gone: file_ram_open() gets ENOENT without
O_CREAT, and EEXIST with it (measured as above)."""
LINK = "ram"
MODE = 0o711
"""QEMU's user may pass."""
CLOSED = "the gate to its memory is closed, and nothing was started"


class Grants(Protocol):
    """Entries in access control lists: host.grants.DeviceGrants, and the very one of own VMs, which share devices with
    domains."""

    def give(self, place: str, devices: Sequence[int], uid: int) -> None: ...

    def take_back(self, place: str) -> None: ...

    def restore(self, device: int) -> None: ...


Later = Callable[[float, Callable[[], None]], asyncio.TimerHandle]


Qemus = Callable[[], Iterable[tuple[str, int]]]


def qemus_of(directory: Path) -> Iterator[tuple[str, int]]:
    """Name and PID of each domain's QEMU, as libvirt has them in /run/libvirt/qemu; a file may have outlived its QEMU."""
    for file in directory.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            yield file.stem, int(file.read_text())


def _later(seconds: float, work: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, work)


class Gate:
    """``root`` holds a directory for each domain whose gate is open. QEMU's user may pass it, and root alone may write to
    it.

    libvirt gives each QEMU a /dev of its own, in which nodes have the access control lists that they had as it was made. So
    a gate that closes also takes the entry back from the ``qemus`` of all domains whose gates are closed.
    """

    def __init__(self, root: Path, grants: Grants, qemus: Qemus = tuple, later: Later = _later) -> None:
        self._root = root
        self._grants = grants
        self._qemus = qemus
        self._later = later
        self._limits: dict[str, asyncio.TimerHandle] = {}
        self._nodes: set[str] = set()
        """To which gates have led."""

    def path(self, name: str) -> Path:
        """The one that the domain's XML names. Raises MemoryUnusable for a name that no VM can have."""
        if not VM_NAME.fullmatch(name):
            raise MemoryUnusable(f"{name!r} is not a name that a VM can have", left=CLOSED)
        return self._root / name / LINK

    def open(self, name: str, node: str, descriptor: int, uid: int) -> None:
        """Let a QEMU of user ``uid`` open ``node`` by ``path`` until ``close``, and for LIMIT_S at most; ``descriptor`` is
        that node, open, and proved to be the guest's memory. Raises MemoryUnusable, and the gate is closed then."""
        path = self.path(name)
        try:
            self.close(name)
            _refuse_foreign(Path(node), descriptor)
            with self._opened() as root:
                self._nodes.add(node)
                self._grants.give(_place(name), [descriptor], uid)
                new = f".{name}.new"
                _clear(root, new)
                os.mkdir(new, dir_fd=root)
                os.chmod(new, MODE, dir_fd=root)  # against the umask
                os.symlink(node, f"{new}/{LINK}", dir_fd=root)
                os.rename(new, name, src_dir_fd=root, dst_dir_fd=root)
                if not os.path.samestat(path.stat(), os.fstat(descriptor)):
                    raise NotOursError(node, "it is not the memory that was proved")
                self._limits[name] = self._later(LIMIT_S, lambda: self._shut(name))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.close(name)
            what = f"the gate to its memory {node} can't be opened: {error.strerror}"
            raise MemoryUnusable(what, vm=name, left=CLOSED) from error

    def is_open(self, name: str) -> bool:
        return os.path.lexists(self.path(name).parent)

    def close(self, name: str) -> None:
        """Also if it is closed. A QEMU that has the memory open keeps it. Raises OSError."""
        self.path(name)
        if limit := self._limits.pop(name, None):
            limit.cancel()
        try:
            with contextlib.suppress(FileNotFoundError), self._opened() as root:
                _put_away(root, name)
        finally:
            self._grants.take_back(_place(name))
            self.sweep()

    def sweep(self) -> None:
        """To be called whenever any domain has started: libvirt may have made its /dev while a gate was open."""
        closed = [pid for name, pid in self._qemus() if name not in self._limits] if self._nodes else []
        for node, pid in itertools.product(self._nodes, closed):
            with contextlib.suppress(OSError):  # there is no such device in its /dev, or it has ended
                self._restore(f"/proc/{pid}/root{node}", os.stat(node).st_rdev)  # noqa: PTH116 - of many QEMUs

    def close_all(self) -> None:
        """Close what an agent before this one has left open, before anybody may ask this one. Raises OSError: nothing may
        go on then."""
        with contextlib.suppress(FileExistsError):
            self._root.mkdir()
            self._root.chmod(MODE)  # against the umask
        with self._opened() as root:
            for name in os.listdir(root):  # noqa: PTH208 - of a descriptor
                node = _clear(root, name) if name.startswith(".") else _put_away(root, name)
                self._nodes.update({node} - {""})
        for node in self._nodes:
            with contextlib.suppress(OSError):  # the device may be gone
                self._restore(node)
        self.sweep()

    def _shut(self, name: str) -> None:
        log.warning("domain %s: its QEMU has not opened its memory in %g s, and now can't", name, LIMIT_S)
        try:
            self.close(name)
        except OSError as error:
            log.error("domain %s: the gate to its memory can't be closed: %s", name, error)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Raises NotOursError if others may write to it, OSError."""
        with directory_at(self._root) as root:
            info = os.fstat(root)
            if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise NotOursError(self._root, "others than root may write to it")
            yield root

    def _restore(self, node: str, device: int | None = None) -> None:
        """``device``: only if it is this one, by its number. Raises OSError."""
        descriptor = os.open(node, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(descriptor)
            if device is None or (stat.S_ISCHR(info.st_mode) and info.st_rdev == device and info.st_uid == 0):
                self._grants.restore(descriptor)
        finally:
            os.close(descriptor)


def _put_away(root: int, name: str) -> str:
    """Its directory gets another name, and keeps the link until it is needed again: a QEMU that has found the directory
    already still finds the link, and makes no file in its place. Returns what the link leads to, "" without one. Raises
    OSError."""
    os.stat(name, dir_fd=root, follow_symlinks=False)
    gone = f".{name}.gone"
    _clear(root, gone)
    os.rename(name, gone, src_dir_fd=root, dst_dir_fd=root)
    return _node(root, gone)


def _clear(root: int, directory: str) -> str:
    """Remove it. Returns the same. Raises OSError."""
    node = _node(root, directory)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(f"{directory}/{LINK}", dir_fd=root)
    with contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(directory, dir_fd=root)
        except NotADirectoryError:
            os.unlink(directory, dir_fd=root)
    return node


def _node(root: int, directory: str) -> str:
    try:
        return os.readlink(f"{directory}/{LINK}", dir_fd=root)
    except OSError:
        return ""


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

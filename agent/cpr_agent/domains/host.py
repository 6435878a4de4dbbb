# SPDX-License-Identifier: GPL-2.0-or-later
"""Where libvirt has what is its own on this host (Debian's and Fedora's packages), and whose a QEMU is by the kernel."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cpr_agent.core.model import VM_NAME
from cpr_agent.domains import qemu_conf
from cpr_agent.errors import QemuFailed
from cpr_agent.files import command_line_of
from cpr_agent.store.image import STEM

_HEAD_BYTES = 64 << 10
"""Of an image, by which its XML has named its domain."""
BUILT_IN = ("libvirt-qemu", "qemu")
"""Of Debian's and Fedora's packages, if qemu.conf names none."""


class LibvirtPaths(msgspec.Struct, frozen=True):
    """``root`` is / but for tests. The names below are those that libvirt's system mode has had for good."""

    root: Path

    @property
    def definitions(self) -> Path:
        """A domain's persistent XML, as NAME.xml."""
        return self.root / "etc/libvirt/qemu"

    @property
    def settings(self) -> Path:
        """Of its QEMU driver."""
        return self.root / "etc/libvirt/qemu.conf"

    @property
    def images(self) -> Path:
        return self.root / "var/lib/libvirt/qemu/save"

    def image(self, domain: str) -> Path:
        """From which ``virsh start`` restores the domain, if it is there (``virsh managedsave``)."""
        return self.images / f"{domain}.save"

    @property
    def pids(self) -> Path:
        return self.root / "run/libvirt/qemu"

    def pid_file(self, domain: str) -> Path:
        return self.pids / f"{domain}.pid"

    def log(self, domain: str) -> Path:
        return self.root / f"var/log/libvirt/qemu/{domain}.log"


def adopted(directory: Path, namespace: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and XML of each domain whose XML has our namespace; a host without libvirt has no such directory."""
    for path in sorted(directory.glob("*.xml")):
        if VM_NAME.fullmatch(path.stem) and (raw := _adopted(path, namespace)):
            yield path.stem, raw


def is_adopted(path: Path, namespace: bytes) -> bool:
    return bool(_adopted(path, namespace))


def _adopted(path: Path, namespace: bytes) -> bytes:
    with contextlib.suppress(OSError):
        raw = path.read_bytes()
        return raw if namespace in raw else b""
    return b""


def qemu_pid(pid_file: Path, domain: str) -> int:
    """0 if the domain has no QEMU. A file that outlived its QEMU names a process that is another one by now."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return 0
    return pid if _is_named(pid, domain) else 0


def qemus_named(name: str, user: str) -> list[int]:
    """All processes that were started as the QEMU of a VM of this name; any other user than this one and the agent's may
    give a process such arguments."""
    uids = {os.geteuid()}
    with contextlib.suppress(KeyError):
        uids.add(pwd.getpwnam(user).pw_uid)
    named = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_named(int(pid), name)]  # noqa: PTH208
    return [pid for pid in named if _owner(pid) in uids]


def _owner(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 - /proc
    except OSError:
        return -1


def _is_named(pid: int, name: str) -> bool:
    wanted = f"guest={name}"
    return any(word.split(",", 1)[0] == wanted for word in command_line(pid))


def qemu_uid(conf: Path) -> int:
    """The user that libvirt runs QEMU as (qemu.conf, ``user``): by name, or as a number with or without a plus sign. No
    domain that was adopted has one of its own. Raises QemuFailed."""
    try:
        named = qemu_conf.text(qemu_conf.read(conf), "user", "")
    except (ValueError, OSError) as error:
        raise QemuFailed(f"{conf} does not say whom QEMU runs as: {error}", left="nothing was started") from error
    for name in (named,) if named else BUILT_IN:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    if named.removeprefix("+").isdecimal():
        return int(named)
    what = f"the user {named or ' or '.join(BUILT_IN)} that libvirt runs QEMU as does not exist"
    raise QemuFailed(what, left="nothing was started", remedy=f"see `user` in {conf}")


def kill(pid: int, domain: str) -> bool:
    """End the domain's QEMU; by descriptor, so that no other process can be meant. Returns False without the right to
    it."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if _is_named(pid, domain):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return True


def command_line(pid: int) -> tuple[str, ...]:
    """Of a process; empty if it has ended."""
    return tuple(map(os.fsdecode, command_line_of(pid)))


def maps_whole(pid: int, file: int, offset: int, size: int) -> bool:
    """Whether the process has these bytes of an open file or device mapped, shared, and in one piece (proc_pid_maps(5)).
    A path there may be any bytes, and there may be many."""
    wanted = os.fstat(file)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:  # noqa: PTH123 - line by line
        for line in maps:
            span, flags, at, device, inode, *path = line.rstrip(b"\n").split(maxsplit=5)
            begin, end = (int(number, 16) for number in span.split(b"-"))
            if int(at, 16) == offset and end - begin >= size and flags[3:4] == b"s":
                major, minor = (int(number, 16) for number in device.split(b":"))
                if _is_mapped(pid, os.makedev(major, minor), int(inode), os.fsdecode(b"".join(path)), wanted):
                    return True
    return False


def _is_mapped(pid: int, device: int, inode: int, path: str, wanted: os.stat_result) -> bool:
    """Of a device the kernel tells whose node it is: one in the /dev that libvirt has made for this QEMU."""
    if not stat.S_ISCHR(wanted.st_mode):
        return (device, inode) == (wanted.st_dev, wanted.st_ino)
    with contextlib.suppress(OSError):
        node = os.stat(f"/proc/{pid}/root{path}", follow_symlinks=False)  # noqa: PTH116 - a name in /proc
        return (node.st_dev, node.st_ino) == (device, inode) and node.st_rdev == wanted.st_rdev
    return False


def has_open(pid: int, path: Path) -> bool:
    """Whether the process, or one that it has started, has the file open that is at ``path`` now."""
    try:
        wanted = path.stat()
    except OSError:
        return False
    return any(os.path.samestat(found, wanted) for one in (pid, *_children(pid)) for found in _open_files(one))


def has_image_open(pid: int, domain: str) -> bool:
    """Whether the process, or one that it has started, has any image of this domain's open: of other domains it may have
    some, which are restored at the same time."""
    named = f"<name>{domain}</name>".encode()
    for one in (pid, *_children(pid)):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{one}/fd"):  # noqa: PTH208 - names alone
                with contextlib.suppress(OSError):
                    path = f"/proc/{one}/fd/{name}"
                    if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - the object itself
                        with open(path, "rb") as file:  # noqa: PTH123
                            head = file.read(_HEAD_BYTES)
                        if head.startswith(STEM) and named in head:
                            return True
    return False


def _children(pid: int) -> Iterator[int]:
    """Of all of its threads (proc_pid_task(5))."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            yield from map(int, path.read_text().split())


def _open_files(pid: int) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names alone
            with contextlib.suppress(OSError):
                yield os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116 - the object itself

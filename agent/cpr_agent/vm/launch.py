# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that ``cpr-vm@NAME.service`` runs: prove the memory, bind the sockets, become QEMU.

    python3 -m cpr_agent.vm.launch RUN_DIR/NAME

It starts only by a ticket that the agent left, and uses it up: a ``systemctl start cpr-vm@NAME`` by hand finds none and
fails, so that no such start boots a VM over the RAM of its own live checkpoint. It runs as the VM's user.

Every VM's pause waits for it, so that it imports what is built into Python alone: json, socket, pathlib and typing take
twice as long as the interpreter itself, and all the rest of this.
"""
# Nor pathlib or contextlib:
# ruff: noqa: PTH101, PTH104, PTH108, PTH119, PTH120, PTH123, SIM105

from __future__ import annotations

import _socket
import fcntl
import marshal
import os
import stat
import sys

MYPY = False
if MYPY:  # typing, for the type checker alone
    from typing import Any

TICKET = "ticket"
EXIT_REFUSED = 78
"""EX_CONFIG of sysexits.h: systemd shows it by name."""


class RefusedError(Exception):
    """Why QEMU was not started."""


def main(arguments: list[str]) -> int:
    directory = arguments[1]
    name = os.path.basename(directory)
    try:
        ticket = take_ticket(directory)
        _redirect_output(ticket["log"])
        _check_program(ticket["argv"][0])
        ram = zip(ticket["memory_fds"], ticket["nodes"], ticket["memory"], strict=True)
        descriptors = {fd: open_memory(node, wanted) for fd, node, wanted in ram}
        listeners = {fd: _listen(path) for path, fd in ticket["sockets"].items()}
        descriptors.update({fd: listener.fileno() for fd, listener in listeners.items()})
        _place(descriptors)
        _notify_ready()
        os.execv(ticket["argv"][0], ticket["argv"])  # noqa: S606 - becoming QEMU is what this program is for
    except (RefusedError, OSError, KeyError, ValueError) as error:
        print(f"cpr-vm {name}: {error}", file=sys.stderr)  # noqa: T201 - stderr is the VM's log
        return EXIT_REFUSED


def take_ticket(directory: str) -> dict[str, Any]:
    """Take the ticket away, then read it: a second start finds none."""
    path, taken = f"{directory}/{TICKET}", f"{directory}/{TICKET}.taken"
    try:
        os.rename(path, taken)
    except FileNotFoundError:
        raise RefusedError(f"there is no ticket to start it. Use: cprctl start {os.path.basename(directory)}") from None
    try:
        with open(taken, "rb") as file:
            ticket = marshal.load(file)  # noqa: S302 - only the VM's own user could forge it, and this runs as that user
    except (EOFError, TypeError, ValueError) as error:
        raise RefusedError(f"{path} is not a ticket: {error}") from None
    if not isinstance(ticket, dict):
        raise RefusedError(f"{path} is not a ticket")
    return ticket


def open_memory(node: str, wanted: dict[str, Any]) -> int:
    """Open the RAM and prove on the open descriptor that it is the memory that ``wanted`` describes.

    Never creates anything: QEMU would make an ordinary file of a missing /dev/daxX.Y and start on it (FACTS.md).
    """
    fd = os.open(node, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(fd)
    if wanted["kind"] == "devdax":
        if not stat.S_ISCHR(info.st_mode):
            raise RefusedError(f"{node} is not a character device")
        sysfs = os.path.realpath(f"/sys/dev/char/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}")
        found = {
            "subsystem": os.path.basename(os.path.realpath(f"{sysfs}/subsystem")),
            "uuid": _attribute(f"{os.path.dirname(sysfs)}/uuid"),
            "device_size_bytes": int(_attribute(f"{sysfs}/size") or 0),
        }
        expected = {
            "subsystem": "dax",
            "uuid": wanted["uuid"],
            "device_size_bytes": wanted["device_size_bytes"],
        }
    else:
        found = {"regular": stat.S_ISREG(info.st_mode), "st_dev": info.st_dev, "inode": info.st_ino}
        expected = {"regular": True, "st_dev": wanted["st_dev"], "inode": wanted["inode"]}
        if info.st_size < wanted["offset_bytes"] + wanted["size_bytes"]:
            raise RefusedError(f"{node} has {info.st_size} bytes, too few")
    if found != expected:
        raise RefusedError(f"{node} is not the memory that was proved: expected {expected}, found {found}")
    return fd


def _attribute(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _check_program(path: str) -> None:
    if not os.access(path, os.X_OK):
        raise RefusedError(f"the QEMU binary {path} does not exist or cannot be executed")


def _redirect_output(log: str) -> None:
    """Write stdout and stderr, QEMU's too, to the VM's log, which the agent has made."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _listen(path: str) -> _socket.socket:
    """Bind before QEMU runs: a client that connects now waits in the queue instead of polling."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o660)
    listener.listen(1)
    return listener


def _place(descriptors: dict[int, int]) -> None:
    """Move each descriptor to the number that the command line uses, inheritable."""
    above = max(descriptors) + 1
    high = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for target, fd in descriptors.items()}
    for target, fd in high.items():
        os.dup2(fd, target, inheritable=True)


def _notify_ready() -> None:
    """sd_notify(3) READY=1, by hand: the sockets accept connections from here on."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    sender = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    sender.connect("\0" + address[1:] if address.startswith("@") else address)
    sender.send(b"READY=1")
    sender.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv))

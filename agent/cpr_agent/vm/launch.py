# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that ``cpr-vm@NAME.service`` runs: take the memory, bind the sockets, become QEMU.

    python3 -m cpr_agent.vm.launch RUN_DIR/tickets/NAME

It starts only by a ticket that the agent hands over at a socket there, once: a ``systemctl start cpr-vm@NAME`` by hand
finds none and fails, so that no such start boots a VM over the RAM of its own live checkpoint. It runs as the VM's user, to
whom the directory does not belong. The log and the RAM come with the ticket: descriptors that the agent has opened and
proved.

Every VM's pause waits for it, so that it imports what is built into Python alone: json, socket, pathlib and typing take
twice as long as the interpreter itself, and all the rest of this.
"""
# Nor pathlib or contextlib:
# ruff: noqa: PTH101, PTH108, PTH119, SIM105

from __future__ import annotations

import _socket
import fcntl
import marshal
import os
import sys

MYPY = False
if MYPY:  # typing, for the type checker alone
    from typing import Any

TICKET = "sock"
MAX_TICKET_BYTES = 1 << 20
MAX_DESCRIPTORS = 64
INT_BYTES = 4
EXIT_REFUSED = 78
"""EX_CONFIG of sysexits.h: systemd shows it by name."""


class RefusedError(Exception):
    """Why QEMU was not started."""


def main(arguments: list[str]) -> int:
    directory = arguments[1]
    name = os.path.basename(directory)
    try:
        agent, ticket, (log, *memory) = take_ticket(directory)
        _redirect_output(log)
        _check_program(ticket["argv"][0])
        descriptors = dict(zip(ticket["memory_fds"], memory, strict=True))
        listeners = {fd: _listen(path) for path, fd in ticket["sockets"].items()}
        descriptors.update({fd: listener.fileno() for fd, listener in listeners.items()})
        _start_leader(ticket.get("leader"), above=max(descriptors))
        _place(descriptors)
        agent.send(b"R")  # the sockets accept connections from here on
        os.execv(ticket["argv"][0], ticket["argv"])  # noqa: S606 - becoming QEMU is what this program is for
    except (RefusedError, OSError, KeyError, ValueError) as error:
        print(f"cpr-vm {name}: {error}", file=sys.stderr)  # noqa: T201 - stderr is the VM's log
        return EXIT_REFUSED


def take_ticket(directory: str) -> tuple[_socket.socket, dict[str, Any], list[int]]:
    """The connection to the agent, the ticket, and the descriptors of the log and of each range of memory. Raises
    RefusedError, OSError."""
    path = f"{directory}/{TICKET}"
    asking = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        asking.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        raise RefusedError(f"there is no ticket to start it. Use: cprctl start {os.path.basename(directory)}") from None
    room = _socket.CMSG_SPACE(MAX_DESCRIPTORS * INT_BYTES)
    data, ancillary, _, _ = asking.recvmsg(MAX_TICKET_BYTES, room, _socket.MSG_CMSG_CLOEXEC)
    try:
        ticket = marshal.loads(data)  # noqa: S302 - root alone could make the socket
    except (EOFError, TypeError, ValueError) as error:
        raise RefusedError(f"{path} gave no ticket: {error}") from None
    sent = b"".join(rights for _, _, rights in ancillary)
    cuts = range(0, len(sent), INT_BYTES)
    return asking, ticket, [int.from_bytes(sent[cut : cut + INT_BYTES], sys.byteorder) for cut in cuts]


def _check_program(path: str) -> None:
    if not os.access(path, os.X_OK):
        raise RefusedError(f"the QEMU binary {path} does not exist or cannot be executed")


def _redirect_output(log: int) -> None:
    """Write stdout and stderr, QEMU's too, to the VM's log, which is the agent's."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


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


def _start_leader(argv: list[str] | None, above: int) -> None:
    """The process that stands for the VM towards systemd-machined (vm/machine-leader). It ends when this one does: QEMU
    keeps the other end of its stdin, ``above`` the numbers that the command line uses. It inherits the log, and no more."""
    if not argv:
        return
    try:
        stdin, kept = os.pipe()
        os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)])
        os.close(stdin)
        fcntl.fcntl(kept, fcntl.F_DUPFD, above + 1)
    except OSError as error:  # nothing depends on it
        print(f"systemd-machined will not know it: {error}", file=sys.stderr)  # noqa: T201 - stderr is the VM's log


def _place(descriptors: dict[int, int]) -> None:
    """Move each descriptor to the number that the command line uses, inheritable."""
    above = max(descriptors) + 1
    high = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for target, fd in descriptors.items()}
    for target, fd in high.items():
        os.dup2(fd, target, inheritable=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

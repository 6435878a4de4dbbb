# SPDX-License-Identifier: GPL-2.0-or-later
"""The ticket by which a QEMU is started (ADR 1): handed over once, at a socket that only root can have made.

The launcher says over the same connection that the VM's sockets accept. It needs no sd_notify(3) for that, by which QEMU
could speak to systemd later, and keep its own stop away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from cpr_agent.handles import peer_of
from cpr_agent.host.waiting import readable

SAVED = "saved"
"""A mark beside a ticket's socket, where no VM's user can make it: the QEMU holds a guest that is saved for a kexec."""
SEND_BYTES = 1 << 20
"""As far as the host allows (net.core.wmem_max): a ticket is one message."""


class Offer:
    """A ticket that waits for the first process of one of these users."""

    def __init__(self, ticket: bytes, descriptors: Sequence[int], uids: Collection[int]) -> None:
        self._message = ticket, descriptors
        self._uids = uids
        self._heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the launcher was ready, before it let go of the connection."""
        self._connection: socket.socket | None = None

    async def until_ready(self, pid: int, timeout_s: float) -> bool:
        """Wait until the launcher with this PID, which becomes QEMU, has bound the VM's sockets. False if it ends first."""
        if not pid:
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        ended = asyncio.create_task(readable(pidfd, timeout_s))
        try:
            await asyncio.wait({self._heard, ended}, return_when=asyncio.FIRST_COMPLETED)
            return self._heard.done() and self._heard.result()
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
            os.close(pidfd)

    def give(self, listener: socket.socket) -> bool:
        """Accept one caller; returns whether that one has the ticket."""
        try:
            asking, _ = listener.accept()
        except OSError:
            return False
        try:
            if peer_of(asking).uid not in self._uids:
                raise PermissionError
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            ticket, descriptors = self._message
            socket.send_fds(asking, [ticket], descriptors)
        except OSError:
            asking.close()
            return False
        self._connection = asking
        asyncio.get_running_loop().add_reader(asking, self._hear)
        return True

    def _hear(self) -> None:
        assert self._connection
        try:
            said = self._connection.recv(1)
        except OSError:
            said = b""
        self.close()
        if not self._heard.done():
            self._heard.set_result(bool(said))

    def close(self) -> None:
        if self._connection:
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def offered(path: Path, offer: Offer, owner: int | None) -> Iterator[Offer]:
    """While this lasts there is a socket ``path`` of user ``owner``, who does not own its directory. Raises OSError."""
    loop = asyncio.get_running_loop()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        if owner is not None:
            os.chown(path, owner, -1, follow_symlinks=False)
        listener.listen()

        def give() -> None:
            if offer.give(listener):
                loop.remove_reader(listener)
                path.unlink(missing_ok=True)

        loop.add_reader(listener, give)
        try:
            yield offer
        finally:
            loop.remove_reader(listener)
            path.unlink(missing_ok=True)
            offer.close()

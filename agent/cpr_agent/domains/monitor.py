# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket to which a domain's QEMU connects as it starts: the agent's own monitor, while libvirt lets nobody through
its."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from cpr_agent.handles import peer_of


class Listening:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    async def connection(self, pid: Callable[[], int]) -> socket.socket:
        """That of the process ``pid``; any other is hung up on, however many there are: all domains' QEMUs may be of one
        user. Raises OSError."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            try:
                if peer_of(connection).pid == pid() != 0:
                    return connection
            except OSError:
                pass
            connection.close()
            await asyncio.sleep(0)  # sock_accept() takes no turn of its own while more are waiting


@contextlib.contextmanager
def listening(path: Path, uid: int) -> Iterator[Listening]:
    """For a QEMU of this user, while the block lasts. Raises OSError."""
    path.parent.mkdir(mode=0o711, exist_ok=True)
    path.parent.chmod(0o711)  # against the umask
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o600)  # nobody can connect before listen()
            if uid != os.geteuid():
                os.chown(path, uid, -1, follow_symlinks=False)
            listener.listen(1)
            yield Listening(listener)
        finally:
            path.unlink(missing_ok=True)

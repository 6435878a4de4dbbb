# SPDX-License-Identifier: GPL-2.0-or-later
"""The system bus of another host, by ssh: as ``busctl -H`` does it, through that host's systemd-stdio-bridge(1).

ssh's end of a socket is its stdin and stdout; on ours we talk as on any bus. Over there the caller is the user of the ssh
login: the bridge connects to its bus by itself, and ignores the name that this side gives (``sd_bus_set_anonymous``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator

from cpr_agent.bus.wire import ClientBus

HOST = re.compile(r"(?P<who>(?:[^@\s]+@)?(?:\[[^\]\s]+\]|[^:\[\]\s@]+))(?::(?P<port>\d+))?")
END_TIMEOUT_S = 5.0
_NO_PROGRAM = 127
"""A shell's exit status when it finds no such program (POSIX, "Exit Status for Commands")."""


class BridgeError(Exception):
    """There is no way to that host's bus."""


@contextlib.asynccontextmanager
async def bridge(host: str, timeout_s: float) -> AsyncIterator[ClientBus]:
    """A connection to the system bus of ``host`` ("user@host:port"). Raises BridgeError.

    ssh is the one that $CPRCTL_SSH names, or the one on PATH; it asks for passwords by itself, on the terminal.
    """
    async with contextlib.AsyncExitStack() as stack:
        near, far = socket.socketpair()
        bus = ClientBus(sock=near)
        stack.callback(bus.disconnect)
        with far:
            ssh = await _ssh(host, far)
        said = asyncio.ensure_future(_stderr_tail(ssh))
        stack.callback(said.cancel)
        stack.push_async_callback(_end, ssh)
        stack.callback(bus.disconnect)  # first, so that ssh ends by itself
        try:
            async with asyncio.timeout(timeout_s):
                await bus.connect()
        except (OSError, EOFError, TimeoutError) as error:
            bus.disconnect()
            raise BridgeError(await _reason(host, ssh, said, error)) from error
        yield bus


async def _ssh(host: str, far: socket.socket) -> asyncio.subprocess.Process:
    match = HOST.fullmatch(host)
    if not match or host.startswith("-"):
        raise BridgeError(f"{host!r} is not a host: write user@host, or user@host:port")
    port = ("-p", match["port"]) if match["port"] else ()
    program = os.environ.get("CPRCTL_SSH") or "ssh"
    try:
        return await asyncio.create_subprocess_exec(
            *(program, "-xT", *port, "--", match["who"].replace("[", "").replace("]", ""), "systemd-stdio-bridge"),
            stdin=far.fileno(),
            stdout=far.fileno(),
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=_ignore_interrupts,
        )
    except OSError as error:
        raise BridgeError(f"cannot run {program}: {error.strerror}") from error


def _ignore_interrupts() -> None:
    """Ctrl-C is for cprctl, which may still have to cancel a job over this connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


async def _stderr_tail(ssh: asyncio.subprocess.Process) -> str:
    """The last line on ssh's stderr, which is read all the time lest it blocks."""
    last = ""
    if ssh.stderr is None:
        return last
    async for line in ssh.stderr:
        last = line.decode(errors="replace").strip() or last
    return last


async def _reason(host: str, ssh: asyncio.subprocess.Process, said: asyncio.Future[str], error: BaseException) -> str:
    """Whether the host could not be reached, or has no bridge, or that has no bus."""
    timed_out = isinstance(error, TimeoutError)
    await _end(ssh)
    words = await said
    if ssh.returncode == _NO_PROGRAM:
        return f"{host} has no systemd-stdio-bridge ({words}): it comes with systemd there, and must be on that user's PATH"
    what = "timed out" if timed_out else words or f"ssh ended with status {ssh.returncode}"
    return f"cannot reach the system bus of {host}: {what}"


async def _end(ssh: asyncio.subprocess.Process) -> None:
    """It ends by itself when our side of the socket is closed; else by force."""
    for force in (ssh.terminate, ssh.kill):
        with contextlib.suppress(TimeoutError, ProcessLookupError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await ssh.wait()
                return
        with contextlib.suppress(ProcessLookupError):
            force()
    await ssh.wait()

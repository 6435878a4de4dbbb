# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU guest agent (qga), over the socket of its virtio-serial port: by it a guest's clock is set, and a guest sleeps.

The peer belongs to the guest, and the agent does not trust it: a reply is bounded in size and time, and has to be JSON of
the right shape. The protocol is that of docs/interop/qemu-ga.rst and qga/qapi-schema.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from cpr_agent.errors import GuestAgentFailed

PORT = "org.qemu.guest_agent.0"
"""The name of the virtio-serial port in the guest; qemu-ga looks for it."""
TIMEOUT_S = 20.0
_REPLY_BYTES = 1 << 20
_DELIMITER = b"\xff"
_CLOCK_GOOD_S = 1.0
_ATTEMPTS = 3
"""A guest under load may take a while to set its clock, which is then late by that."""


class _RefusedError(GuestAgentFailed):
    """It answered with an error in the right shape. The guest may have obeyed all the same."""


class GuestAgent:
    """One connection, in sync. Every method raises GuestAgentFailed."""

    def __init__(self, vm: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._vm = vm
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, vm: str, path: Path, timeout_s: float = TIMEOUT_S) -> AsyncIterator[GuestAgent]:
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=_REPLY_BYTES)
        except OSError as error:
            raise GuestAgentFailed(f"its guest agent's socket {path}: {error.strerror or error}", vm=vm) from error
        try:
            agent = cls(vm, reader, writer)
            await agent._synchronize(timeout_s)
            yield agent
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def execute(self, command: str, timeout_s: float = TIMEOUT_S, **arguments: object) -> Any:
        reply = await self._exchange(command, b"", arguments, timeout_s)
        if "return" not in reply:
            error = reply.get("error")
            said = str(error.get("desc") if isinstance(error, dict) else error)[:1000]
            words = "".join(letter if letter.isprintable() else " " for letter in said).split()
            raise _RefusedError(f"its guest agent refused {command}: {' '.join(words)[:200]}", vm=self._vm)
        return reply["return"]

    async def clock(self, timeout_s: float) -> float:
        """The time of the guest's clock (epoch s)."""
        told = await self.execute("guest-get-time", timeout_s)
        if not isinstance(told, int) or isinstance(told, bool) or abs(told) >= 1 << 63:
            raise GuestAgentFailed("its guest agent answered guest-get-time with garbage", vm=self._vm)
        return told / 1e9

    async def _synchronize(self, timeout_s: float) -> None:
        """Skip replies that an earlier client left unread."""
        number = secrets.randbits(31)
        self._writer.write(_DELIMITER)  # ends a request of which an earlier client sent the half
        reply = await self._exchange("guest-sync-delimited", _DELIMITER, {"id": number}, timeout_s)
        if reply.get("return") != number:
            raise GuestAgentFailed("its guest agent answered with what it was not asked", vm=self._vm)

    async def _exchange(self, command: str, until: bytes, arguments: dict[str, object], timeout_s: float) -> dict[str, Any]:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                if until:
                    await self._reader.readuntil(until)
                reply = json.loads(await self._reader.readuntil(b"\n"))
        except TimeoutError:
            raise GuestAgentFailed(
                f"its guest agent did not answer {command} within {timeout_s:.0f} s", vm=self._vm
            ) from None
        except (ValueError, RecursionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            raise GuestAgentFailed(f"its guest agent answered {command} with garbage, or went away", vm=self._vm) from error
        if not isinstance(reply, dict):
            raise GuestAgentFailed(f"its guest agent answered {command} with garbage", vm=self._vm)
        return reply


async def offers(vm: str, path: Path, command: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the guest agent is there and lets ``command`` be used. Raises GuestAgentFailed."""
    async with GuestAgent.connected(vm, path, timeout_s) as agent:
        told = await agent.execute("guest-info", timeout_s)
    try:
        return any(known["name"] == command and known["enabled"] is True for known in told["supported_commands"])
    except (TypeError, KeyError):
        raise GuestAgentFailed("its guest agent answered guest-info with garbage", vm=vm) from None


async def suspend(vm: str, path: Path, asleep: asyncio.Future[Any], timeout_s: float) -> None:
    """Ask the guest to sleep (S3), and return when ``asleep`` is done. QEMU tells of the sleep: qemu-ga does not answer
    when it succeeds (see ``guest-suspend-ram`` in its schema), and is not trusted. Raises GuestAgentFailed; the guest may
    go to sleep even then."""
    async with GuestAgent.connected(vm, path, timeout_s) as agent:
        answer = asyncio.ensure_future(agent.execute("guest-suspend-ram", 2 * timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({answer, asleep}, return_when=asyncio.FIRST_COMPLETED)
                if not asleep.done():
                    answer.result()
                    await asyncio.wait({asleep})
        except TimeoutError:
            raise GuestAgentFailed(f"its guest was asked to sleep, and did not within {timeout_s:.0f} s", vm=vm) from None
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)


async def set_clock(vm: str, path: Path, now: Callable[[], float], timeout_s: float = TIMEOUT_S) -> float:
    """Set the guest's clock to ``now()`` (epoch seconds); returns by how much it was behind (s).

    The clock that is read afterwards decides: qemu-ga also reports an error when it has set the clock and could not
    run ``hwclock`` for the RTC, which many guests lack, and QEMU's RTC did not stand still anyway.
    """
    async with GuestAgent.connected(vm, path, timeout_s) as agent:
        behind_s = now() - await agent.clock(timeout_s)
        for _ in range(_ATTEMPTS):
            problem = ""
            try:
                await agent.execute("guest-set-time", timeout_s, time=int(now() * 1e9))
            except _RefusedError as refused:
                problem = refused.what
            asked = now()
            off_s = await agent.clock(timeout_s) - asked
            if -_CLOCK_GOOD_S < off_s < now() - asked + _CLOCK_GOOD_S:
                return behind_s
        raise GuestAgentFailed(
            problem or f"its guest agent says that it has set the clock, which is {off_s:+.0f} s off", vm=vm
        )

"""A QMP connection: bounded in time, safe for descriptors, and honest about its end.

qemu.qmp has no timeouts of its own and its listeners stay silent after EOF (FACTS.md); this adds both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from cpr_agent.errors import QemuFailed

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in milliseconds; only a stuck one, or a host in deep trouble, needs more than this."""
ATTEMPTS = 5
"""At a connection that an event disturbs, of which a QEMU has few as it comes up."""

Event = dict[str, Any]


class QmpRefused(QemuFailed):
    """QEMU understood the command and said no."""


class _Client(QMPClient):
    """One whose hooks for messages do not write each of them out, indented, for a log that nobody reads: that takes as long
    as all else that is done for it, and guests wait."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Qmp:
    """One connection to one QEMU. Create it by ``connect``."""

    def __init__(self, vm: str, client: QMPClient) -> None:
        self.vm = vm
        self._client = client
        self._lock = asyncio.Lock()
        self._waiters: list[tuple[Callable[[Event], bool], asyncio.Future[Event]]] = []
        self._sinks: list[Callable[[str], None]] = []
        self._gone = False
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._watch())]

    @classmethod
    async def connect(cls, vm: str, path: Path, timeout_s: float) -> Qmp:
        """Connect and negotiate. Raises QemuFailed: nobody listens, no greeting in time, or not QMP at all."""
        try:
            async with asyncio.timeout(timeout_s):
                client = await _connected(vm, path)
        except TimeoutError:
            raise QemuFailed(
                f"QEMU did not greet on {path} within {timeout_s:.0f} s", vm=vm, remedy="another client may hold it"
            ) from None
        except (ConnectError, QMPError, OSError) as error:
            raise QemuFailed(f"no QMP on {path}: {_reason(error)}", vm=vm) from error
        return cls(vm, client)

    def on_event(self, sink: Callable[[str], None]) -> None:
        """``sink`` gets the name of each event, and ``"GONE"`` once at the end."""
        self._sinks.append(sink)

    @property
    def gone(self) -> bool:
        return self._gone

    async def execute(
        self,
        command: str,
        arguments: dict[str, object] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Run one command; ``fd`` travels with it (SCM_RIGHTS). Raises QmpRefused, QemuFailed."""
        async with self._lock:  # one at a time, so that a descriptor can't reach another command
            try:
                async with asyncio.timeout(timeout_s):
                    if fd is not None:
                        self._client.send_fd_scm(fd)
                    return await self._client.execute(command, arguments)
            except ExecuteError as error:
                raise QmpRefused(f"QEMU refused {command}: {error}", vm=self.vm) from error
            except TimeoutError:
                raise QemuFailed(f"QEMU did not answer {command} within {timeout_s:.0f} s", vm=self.vm) from None
            except (QMPError, OSError) as error:
                raise QemuFailed(f"QEMU went away during {command}: {_reason(error)}", vm=self.vm) from error

    @contextlib.contextmanager
    def expecting(self, predicate: Callable[[Event], bool]) -> Iterator[asyncio.Future[Event]]:
        """A future for the first event that fits; enter before the command that causes it."""
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        entry = (predicate, future)
        self._waiters.append(entry)
        if self._gone:
            future.set_exception(QemuFailed("QEMU is gone", vm=self.vm))
        try:
            yield future
        finally:
            self._waiters.remove(entry)
            if future.done() and not future.cancelled():
                future.exception()  # taken note of, even if nobody waited
            future.cancel()

    async def quit(self) -> None:
        """Ask QEMU to exit; that it goes away while answering is what was asked for."""
        with contextlib.suppress(QemuFailed):
            await self.execute("quit")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Exception):  # after the peer's end disconnect() raises what ended it
            async with asyncio.timeout(5):
                await self._client.disconnect()

    async def _pump(self) -> None:
        async for event in self._client.events:
            message = dict(event)
            for predicate, future in list(self._waiters):
                if not future.done() and predicate(message):
                    future.set_result(message)
            for sink in self._sinks:
                sink(str(message.get("event")))

    async def _watch(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        self._gone = True
        for _, future in self._waiters:
            if not future.done():
                future.set_exception(QemuFailed("QEMU went away", vm=self.vm))
        for sink in self._sinks:
            sink("GONE")


async def _connected(vm: str, path: Path) -> QMPClient:
    """A QEMU that comes up can tell of an event, such as RESUME, where qemu.qmp expects its greeting, or the answer to
    qmp_capabilities: asked anew it has both."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await _negotiated(vm, path)
        except ConnectError as error:
            if not isinstance(error.exc, (GreetingError, NegotiationError)):
                raise
    return await _negotiated(vm, path)


async def _negotiated(vm: str, path: Path) -> QMPClient:
    client = _Client(vm)
    client.logger.disabled = True  # its errors reach us as exceptions
    try:
        await client.connect(str(path))
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await client.disconnect()
        raise
    return client


def _reason(error: BaseException) -> str:
    if isinstance(error, ExecInterruptedError):
        return "it closed the connection"
    inner = getattr(error, "exc", None) or error
    return f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__


def event_time(event: Event) -> float:
    """When QEMU says the event happened, in epoch seconds."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6

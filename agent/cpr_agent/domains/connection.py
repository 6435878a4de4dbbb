# SPDX-License-Identifier: GPL-2.0-or-later
"""Libvirt's daemon, for acts on its domains. The only importer of python3-libvirt, which a host without domains never
loads.

Every call blocks until the daemon answers, and one of a domain waits for that domain's job: each domain has a thread and a
connection of its own, so that none waits for another one's, and no call is waited for beyond its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from cpr_agent.errors import CprError, QemuFailed, QemuRefused, QemuUnreachable
from cpr_agent.text import printable
from cpr_agent.vm.qmp import EVENTS
from cpr_agent.vm.retry import poll_until

log = logging.getLogger(__name__)

T = TypeVar("T")

URI = "qemu:///system"
CALL_S = 40.0
"""libvirt itself gives up on a domain's job after 30 s (QEMU_JOB_WAIT_TIME, src/qemu/qemu_domainjob.c)."""
NOTED_S = 10.0
"""For libvirt to note that a QEMU has ended."""
KEEPALIVE_S, KEEPALIVE_COUNT = 5, 3
"""A daemon that hangs is known as such after their product."""
IDLE_SESSIONS = 8
"""As many as are kept for later: to open a connection takes a dozen questions of the daemon."""
_REASON = 1000


class MonitorEvent(NamedTuple):
    """Of a QEMU, by way of libvirt; ``data`` is JSON, "" for none."""

    domain: str
    name: str
    at: float
    """Epoch seconds."""
    data: str


def installed_version(connection: Any, emulator: str) -> int:
    """Of the QEMU at this path, as libvirt has versions (10.0.2 is 10000002), if that is its default one: it tells no
    other's, and 0 is returned. In a session's thread."""
    default = re.search(r"<path>([^<]*)</path>", connection.getDomainCapabilities(None, None, None, None, 0))
    return int(connection.getVersion()) if default and default[1] == emulator else 0


def dotted(version: int) -> str:
    """As QEMU itself writes it."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


def listen(listeners: list[T], listener: T) -> Callable[[], None]:
    """Returns how to stop."""
    listeners.append(listener)
    return lambda: listeners.remove(listener)


class Heard:
    """What the daemon tells by itself. Each function is called in the event loop."""

    def __init__(self) -> None:
        self.monitor: list[Callable[[MonitorEvent], None]] = []
        self.started: list[Callable[[str], None]] = []
        """This domain, adopted or not, has a QEMU."""
        self.suspended: list[Callable[[str], None]] = []
        """libvirt leaves the guest of this domain paused, or has paused it."""
        self.ended: list[Callable[[str], None]] = []
        """The QEMU of this domain has ended."""
        self.defined: list[Callable[[str], None]] = []
        """The definition of this domain has changed, or is gone."""
        self.lost: list[Callable[[], None]] = []
        """The daemon is gone, and so are the QEMUs' events."""


class Library:
    """python3-libvirt, loaded when it is first needed, with its event loop in a thread of its own: without one it notices
    no daemon that hangs."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._module: Any = None

    def module(self) -> Any:
        """Raises QemuUnreachable."""
        with self._loading:
            if self._module is None:
                self._module = self._loaded()
        return self._module

    def _loaded(self) -> Any:
        try:
            import libvirt
        except ImportError as error:
            remedy = "install it: apt install python3-libvirt"
            raise QemuUnreachable("python3-libvirt is not installed", remedy=remedy) from error
        libvirt.registerErrorHandler(lambda *_: None, None)  # it would print each error that it raises
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._run_events, args=(libvirt,), name="libvirt-loop", daemon=True).start()
        return libvirt

    def _run_events(self, module: Any) -> None:
        while True:
            with contextlib.suppress(Exception):
                module.virEventRunDefaultImpl()

    def told(self, error: Exception, domain: str, deed: str) -> QemuFailed:
        """libvirt's own error as one of the agent's."""
        what = f"libvirt has not {deed}: {printable(str(error), _REASON)}"
        module = self._module
        if module is None or not isinstance(error, module.libvirtError):
            return QemuFailed(what, vm=domain)
        gone = (
            module.VIR_ERR_NO_CONNECT,
            module.VIR_ERR_INVALID_CONN,
            module.VIR_ERR_RPC,
            module.VIR_ERR_SYSTEM_ERROR,
            module.VIR_ERR_OPERATION_TIMEOUT,
            module.VIR_ERR_NO_DOMAIN,
        )
        lost = error.get_error_code() in gone or error.get_error_domain() == module.VIR_FROM_RPC
        return (QemuUnreachable if lost else QemuRefused)(what, vm=domain)


class Session:
    """One connection, and the thread in which its calls are made, one after the other."""

    def __init__(self, library: Library, uri: str, name: str) -> None:
        self._library = library
        self._uri = uri
        self._thread = ThreadPoolExecutor(1, f"libvirt-{name}")
        self._last: Future[Any] | None = None
        self._connection: Any = None

    @property
    def idle(self) -> bool:
        """No call goes on in the thread, which may outlast its caller's patience."""
        return self._last is None or self._last.done()

    async def call(self, domain: str, deed: str, work: Callable[[Any], T], timeout_s: float | None = CALL_S) -> T:
        """``work`` on the domain, in the thread: it goes on there if it takes longer. Raises QemuRefused,
        QemuUnreachable."""

        def on_domain() -> T:
            return work(self._open().lookupByName(domain))

        return await self._run(domain, deed, on_domain, timeout_s)

    async def ask(self, domain: str, deed: str, work: Callable[[Any], T], timeout_s: float | None = CALL_S) -> T:
        """Likewise on the connection."""
        return await self._run(domain, deed, lambda: work(self._open()), timeout_s)

    async def _run(self, domain: str, deed: str, work: Callable[[], T], timeout_s: float | None) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                self._last = running = self._thread.submit(work)
                return await asyncio.wrap_future(running)
        except TimeoutError:
            raise QemuUnreachable(
                f"libvirt has not {deed} within {timeout_s:g} s",
                vm=domain,
                remedy="see: systemctl status libvirtd virtqemud",
            ) from None
        except CprError:
            raise
        except Exception as error:
            raise self._library.told(error, domain, deed) from error

    def _open(self) -> Any:
        """In the thread."""
        if self._connection is None or not self._connection.isAlive():
            self._connection = self._library.module().open(self._uri)
            self._connection.setKeepAlive(KEEPALIVE_S, KEEPALIVE_COUNT)
        return self._connection

    def forget(self) -> None:
        """Once its last call is over."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()


class Libvirt:
    """All sessions with one daemon."""

    def __init__(self, uri: str = URI) -> None:
        self.heard = Heard()
        self._library = Library()
        self._uri = uri
        self._sessions: dict[str, Session] = {}
        self._idle: list[Session] = []
        self._watching: Any = None
        self._watch = Session(self._library, uri, "events")
        self._numbers = itertools.count()

    def of(self, domain: str) -> Session:
        """The domain's own."""
        if domain not in self._sessions:
            self._sessions[domain] = Session(self._library, self._uri, domain)
        return self._sessions[domain]

    async def aside(self, domain: str, deed: str, work: Callable[[Any], T], timeout_s: float | None = CALL_S) -> T:
        """``work`` on the domain by a session of its own, for what takes long, or must not wait for what does: libvirtd
        serves but a few calls of one connection at a time. Raises QemuRefused, QemuUnreachable."""
        session = self._idle.pop() if self._idle else Session(self._library, self._uri, f"aside-{next(self._numbers)}")
        try:
            return await session.call(domain, deed, work, timeout_s)
        finally:
            if session.idle and len(self._idle) < IDLE_SESSIONS:
                self._idle.append(session)
            else:
                session.forget()

    async def until_off(self, domain: str) -> None:
        """Wait until libvirt has noted that the domain has no QEMU any more. Raises QemuRefused, QemuUnreachable."""
        noted = asyncio.Event()
        forget = listen(self.heard.ended, lambda ended: noted.set() if ended == domain else None)
        try:
            if await self.of(domain).call(domain, "said whether it is off", lambda found: found.isActive()):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(NOTED_S):
                        await noted.wait()
        finally:
            forget()

    async def create(self, domain: str) -> None:
        """Start the domain; it takes as long as the hook that libvirt asks meanwhile. Raises QemuRefused,
        QemuUnreachable."""
        await self.aside(domain, "started it", lambda found: found.create(), None)

    async def monitor_commands(self, domain: str, what: str, messages: Sequence[str], timeout_s: float) -> list[str]:
        """What its QEMU answers to messages of QMP, one after the other. Raises QemuRefused, QemuUnreachable."""

        def ask(found: Any) -> list[str]:
            import libvirt_qemu

            return [libvirt_qemu.qemuMonitorCommand(found, message, 0) for message in messages]

        return await self.of(domain).call(domain, f"had its QEMU do {what}", ask, timeout_s)

    async def until_there(self, timeout_s: float) -> None:
        """Raises QemuUnreachable."""

        async def problem() -> QemuUnreachable | None:
            try:
                await self.watch()
            except QemuUnreachable as error:
                return error
            return None

        if error := await poll_until(problem, lambda found: found is None, timeout_s, slowest_s=1.0):
            raise error

    async def watch(self) -> None:
        """Hear what happens from now on; does nothing if it is heard already. Raises QemuUnreachable, QemuFailed."""
        loop = asyncio.get_running_loop()
        names = sorted(EVENTS)

        def subscribe(connection: Any) -> None:
            if self._watching is connection:
                return
            self._subscribe(connection, loop, names)
            self._watching = connection

        await self._watch.ask("", "told of its events", subscribe)

    def _subscribe(self, connection: Any, loop: asyncio.AbstractEventLoop, names: list[str]) -> None:
        """In a thread. The callbacks come in the one of the library's own event loop."""
        library = self._library.module()
        import libvirt_qemu

        heard = self.heard

        def tell(listeners: list[Callable[..., None]], *what: object) -> None:
            def on_loop() -> None:
                for listen in tuple(listeners):
                    listen(*what)

            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_loop)

        def monitor(_: Any, domain: Any, event: str, seconds: int, micros: int, details: str | None, __: Any) -> None:
            at = seconds + micros / 1e6
            tell(heard.monitor, MonitorEvent(domain.name(), event, at, details or ""))

        lifecycles = {
            library.VIR_DOMAIN_EVENT_STARTED: heard.started,
            library.VIR_DOMAIN_EVENT_SUSPENDED: heard.suspended,
            library.VIR_DOMAIN_EVENT_STOPPED: heard.ended,
            library.VIR_DOMAIN_EVENT_DEFINED: heard.defined,
            library.VIR_DOMAIN_EVENT_UNDEFINED: heard.defined,
        }

        def lifecycle(_: Any, domain: Any, event: int, detail: int, __: Any) -> None:  # noqa: ARG001
            tell(lifecycles.get(event, []), domain.name())

        def closed(_: Any, reason: int, __: Any) -> None:  # noqa: ARG001
            tell(heard.lost)

        for name in names:
            libvirt_qemu.qemuMonitorEventRegister(connection, None, name, monitor, None)
        connection.domainEventRegisterAny(None, library.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
        connection.registerCloseCallback(closed, None)

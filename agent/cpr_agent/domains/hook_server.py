# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket at which libvirt's hook asks the agent whether an adopted domain may go on.

Only root can reach it (mode 0600, and SO_PEERCRED), and nobody but libvirt's own daemon has a reason to. Each request is
bounded in size and time, and so is the number of all at once: what a broken host sends costs the agent nothing. While the
agent decides it shows that it lives, and it notices a hook that was killed or has given up: a yes that nobody hears ends a
guest.

domains/ask.py is the other end, and says what each byte means.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from cpr_agent.core.model import VM_NAME
from cpr_agent.domains import ask
from cpr_agent.errors import CprError
from cpr_agent.handles import Peer, peer_of
from cpr_agent.text import printable

log = logging.getLogger(__name__)

MAX_AT_ONCE = 64
READ_S = 10.0
"""For a request to come in as a whole."""
BEAT_S = ask.SILENCE_S / 8
MARGIN_S = 10.0
"""An answer later than this before the hook gives up may not be heard."""
ANSWER_S = {operation: seconds - MARGIN_S for operation, seconds in ask.ANSWER_S.items()}
RELEASED = "released"
"""The pipe beside the socket, into which the hook writes the names of domains that libvirt is through with."""
_PIPE_BYTES = 1 << 16
"""As many as a pipe holds (pipe(7)): lines are whole then, because each is written at once."""
_BACKLOG = 128
_PIECE = 1 << 16


class HookRequest:
    """One call of the hook. ``operation`` and ``sub_operation`` are libvirt's (https://libvirt.org/hooks.html); ``pid`` is
    the hook's process, 0 if it is unknown; ``xml`` is the domain as libvirt is about to run it, or runs it."""

    def __init__(  # noqa: PLR0913 - what libvirt tells a hook
        self, operation: str, sub_operation: str, domain: str, xml: str, pid: int = 0, line: HookLine | None = None
    ) -> None:
        self.operation = operation
        self.sub_operation = sub_operation
        self.domain = domain
        self.xml = xml
        self.pid = pid
        self._line = line
        self._gone = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """Whether the hook and the libvirt daemon that has called it still wait, and will for some seconds."""
        if not self._gone.is_set() and self._line and not self._line.open:
            self.give_up()
        return not self._gone.is_set()

    def give_up(self) -> None:
        """No answer is heard any more."""
        self._gone.set()

    async def until_gone(self) -> None:
        """Wait until nobody waits for the answer any more."""
        await self._gone.wait()

    def hold(self) -> bool:
        """Call it right before an act after which only a yes is right, and do not act if it returns False: nobody waits.
        From here on the hook waits for minutes, and if this agent is killed it asks the next one again."""
        return self.waiting and (self._line is None or self._line.hold())


class HookLine:
    """The connection to a hook."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self.held = False
        self._connection = connection
        self._pid = peer.pid
        self._caller = parent_of(peer.pid)

    @property
    def open(self) -> bool:
        """The hook is there, and so is the process that has called it."""
        try:
            self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return parent_of(self._pid) == self._caller
        except OSError:
            pass
        return False  # it has ended, or says what no hook says

    def hold(self) -> bool:
        self.held = self.say(ask.HELD)
        return self.held

    def say(self, word: bytes) -> bool:
        """Returns whether the hook can hear it: a few bytes never fill the socket's buffer."""
        try:
            return self._connection.send(word, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT) == len(word)
        except OSError:
            return False


class HookServer:
    """``on_request`` gives the refusal of a request, "" for a yes. It need not be quick, but what it does after the hook
    has gone counts for nothing; it is not cancelled then. One request of a domain comes after the other. ``release`` comes
    by a pipe, without XML, and its answer is not heard."""

    def __init__(self, path: Path, on_request: Callable[[HookRequest], Awaitable[str]]) -> None:
        self._path = path
        self._on_request = on_request
        self._listener: socket.socket | None = None
        self._pipe = -1
        self._serving: dict[asyncio.Task[None], HookLine] = {}
        self._deciding: set[asyncio.Task[str]] = set()
        """They live on after their hooks."""
        self._last: dict[str, asyncio.Task[str]] = {}
        """By domain, whom the next one comes after."""

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    def open(self) -> None:
        """Listen. Everything that a request could start must be closed before. Raises OSError."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)  # nobody can connect before listen()
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)
        pipe = self._path.with_name(RELEASED)
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        self._pipe = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # not only read: it has no end then
        asyncio.get_running_loop().add_reader(self._pipe, self._hear)

    async def close(self) -> None:
        """Take no new request, and end when those are answered whose yes was acted on. The others are hung up on: their
        hooks ask the next agent."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        if self._pipe >= 0:
            asyncio.get_running_loop().remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1
            self._path.with_name(RELEASED).unlink(missing_ok=True)
        for task, line in self._serving.items():
            if not line.held:
                task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _hear(self) -> None:
        for name in os.read(self._pipe, _PIPE_BYTES).decode(errors="replace").split("\n"):
            if VM_NAME.fullmatch(name):
                self._decide(HookRequest("release", "end", name, "")).add_done_callback(_log_failure)

    def _accept(self) -> None:
        assert self._listener
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.settimeout(0)
        try:
            peer = peer_of(connection)
        except OSError:
            connection.close()
            return
        line = HookLine(connection, peer)
        if peer.uid not in (0, os.geteuid()):
            log.warning("user %d asked as a hook of libvirt, and was hung up on", peer.uid)
            connection.close()
        elif max(len(self._serving), len(self._deciding)) >= MAX_AT_ONCE:
            line.say(_no(f"the agent has {MAX_AT_ONCE} requests to decide on already; try again later"))
            connection.close()
        else:
            task = asyncio.get_running_loop().create_task(self._serve(connection, line, peer))
            self._serving[task] = line
            task.add_done_callback(self._serving.pop)

    async def _serve(self, connection: socket.socket, line: HookLine, peer: Peer) -> None:
        with connection:
            try:
                async with asyncio.timeout(READ_S):
                    request = await _read(connection, line, peer.pid)
            except (TimeoutError, ValueError, OSError) as error:
                line.say(_no(f"a request that can't be read: {str(error) or 'it took too long'}"))
                return
            try:
                why = await self._decided(connection, line, request)
            except CprError as error:
                why = error.text
            except Exception as error:  # whatever it is, the hook gets a no
                log.exception("hook %s of %s", request.operation, request.domain)
                why = f"the agent has failed: {error}"
            line.say(_no(why) if why else ask.YES)

    async def _decided(self, connection: socket.socket, line: HookLine, request: HookRequest) -> str:
        """The refusal, or "". Raises what the handler raises."""
        loop = asyncio.get_running_loop()
        patience_s = ANSWER_S[request.operation]
        until = loop.time() + patience_s
        deciding = self._decide(request)
        gone = loop.create_task(request.until_gone())
        loop.add_reader(connection, lambda: _hung_up(connection, request))
        try:
            while not deciding.done():
                if not request.waiting:
                    return "nobody waits for the answer"
                if not line.held and loop.time() > until:
                    return f"the agent has not decided within {patience_s:g} s"
                line.say(ask.ALIVE)
                await asyncio.wait({deciding, gone}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            return deciding.result()
        finally:
            loop.remove_reader(connection)
            gone.cancel()
            request.give_up()

    def _decide(self, request: HookRequest) -> asyncio.Task[str]:
        before = self._last.get(request.domain)
        task = asyncio.get_running_loop().create_task(self._after(before, request))
        self._last[request.domain] = task
        self._deciding.add(task)
        task.add_done_callback(lambda _: self._decided_on(request.domain, task))
        return task

    async def _after(self, before: asyncio.Task[str] | None, request: HookRequest) -> str:
        if before:
            await asyncio.wait({before})
        return await self._on_request(request) if request.waiting else "nobody waits for the answer"

    def _decided_on(self, domain: str, task: asyncio.Task[str]) -> None:
        self._deciding.discard(task)
        if self._last.get(domain) is task:
            del self._last[domain]
        if not task.cancelled():
            task.exception()  # its hook may have gone, and then nobody asks


def _log_failure(task: asyncio.Task[str]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("hook release: %s", error)


def _hung_up(connection: socket.socket, request: HookRequest) -> None:
    asyncio.get_running_loop().remove_reader(connection)
    request.give_up()


async def _read(connection: socket.socket, line: HookLine, pid: int) -> HookRequest:
    """Raises ValueError, OSError."""
    length = int.from_bytes(await _exactly(connection, ask.LENGTH_BYTES), "big")
    if length > ask.MAX_BYTES:
        raise ValueError(f"it has {length} bytes, and {ask.MAX_BYTES} at most are read")
    parts = (await _exactly(connection, length)).split(b"\0")
    if len(parts) != 4:
        raise ValueError(f"it has {len(parts)} parts")
    operation, sub_operation, domain, xml = (part.decode() for part in parts)
    if operation not in ANSWER_S:
        raise ValueError(f"{operation!r} is not a question")
    return HookRequest(operation, sub_operation, domain, xml, pid, line)


async def _exactly(connection: socket.socket, count: int) -> bytearray:
    loop, data = asyncio.get_running_loop(), bytearray()
    while len(data) < count:
        piece = await loop.sock_recv(connection, min(_PIECE, count - len(data)))
        if not piece:
            raise ValueError("it ends early")
        data += piece
    return data


def _no(why: str) -> bytes:
    return ask.NO + printable(why).encode()


def parent_of(pid: int) -> int:
    """The parent of a process, libvirt's daemon for a hook's; 0 if it is unknown (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - a few bytes of /proc, looked at often
            return int(stat.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0

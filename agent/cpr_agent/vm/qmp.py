# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP connection: bounded in time and memory, decoded into types, safe for descriptors, and honest about its end.

qemu.qmp has no timeouts of its own, keeps every event for ever, and takes any JSON for an answer. Here a message
is bounded and decoded, and events are handled as they come, so that a flood or a lie costs the QEMU that sends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace
from qemu.qmp import ConnectError, ExecInterruptedError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import require
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from cpr_agent.errors import QemuFailed, QemuRefused, QemuUnreachable
from cpr_agent.handles import peer_of, socket_at, uid_of
from cpr_agent.text import printable
from cpr_agent.vm.patience import Patience
from cpr_agent.vm.replies import EVENT_DATA, MESSAGE, TIMESTAMP, Query, UnreadableReplyError

T = TypeVar("T")

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in milliseconds; only a stuck one, or a host in deep trouble, needs more than this."""
CLOSE_TIMEOUT_S = 1.0
"""For a QEMU to read the last command; one that does not is hung up on."""
ATTEMPTS = 5
"""At a connection that an event disturbs, of which a QEMU has few as it comes up."""
MAX_MESSAGE_BYTES = 1 << 20
"""The longest answer, of query-qmp-schema, has 200 to 300 KB; asyncio buffers twice this."""
MESSAGES_PER_TURN = 64
"""After so many in one go the event loop gets its turn, however many more are waiting."""
EVENTS = frozenset({"STOP", "RESUME", "SUSPEND", "WAKEUP", "SHUTDOWN", "MIGRATION"})
"""Events that tell something to the agent. All others are dropped: a guest can cause some of them in a loop (pvpanic)."""
DEVICE_DELETED = "DEVICE_DELETED"
"""It is counted only."""
GONE = "GONE"
"""Told once, when the connection has ended."""
REPEAT_S = 0.2
"""An event that comes again within this time is told once more, at the end of it."""
CLOCK_SLACK_S = 5.0
"""An event cannot be older than the wait for it, nor from the future, by more than this."""


class Event(msgspec.Struct, frozen=True):
    """``problem``: why QEMU's words about the event can't be true, "" if they can."""

    name: str
    at: float
    """Epoch seconds."""
    status: str
    """Of MIGRATION."""
    problem: str = ""


class _Wait(msgspec.Struct, frozen=True):
    """Somebody waits for the first event that ``fits``, since ``began`` (s of the monotonic clock)."""

    fits: Callable[[Event], bool]
    future: asyncio.Future[Event]
    began: float


Command = tuple[str, Mapping[str, object]]
"""Its name and its arguments."""
_ENCODE = msgspec.json.Encoder().encode


class _Answers(Generic[T]):
    """``all`` has the answers to ``count`` commands, once these are there."""

    def __init__(self, count: int, read: Callable[[int, Message], T]) -> None:
        self.all: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        self._read = read
        self._found: dict[int, T] = {}
        self._count = count

    def take(self, number: int, answer: Message | ExecInterruptedError) -> None:
        """A failure of one is that of all; a second answer is none."""
        if self.all.done() or number in self._found:
            return
        try:
            if isinstance(answer, ExecInterruptedError):
                raise answer
            self._found[number] = self._read(number, answer)
        except (QMPError, QemuFailed) as error:
            self.all.set_exception(error)
        else:
            if len(self._found) == self._count:
                self.all.set_result([self._found[one] for one in range(self._count)])


class _Slot:
    """Where the parent puts the answer to one command, or that there will be none."""

    def __init__(self, answers: _Answers[Any], number: int) -> None:
        self._answers = answers
        self._number = number

    async def put(self, answer: Message) -> None:
        self.put_nowait(answer)

    def put_nowait(self, answer: Message | ExecInterruptedError) -> None:
        self._answers.take(self._number, answer)


class _Client(QMPClient):
    """QMPClient with messages that are decoded by ``replies.MESSAGE``: an answer stays bytes until its type is known.

    ``heard`` gets each event of EVENTS. The parent's own listeners get none: they keep all.
    """

    _limit = MAX_MESSAGE_BYTES
    """As ``readbuflen``, for qemu.qmp before 0.0.4."""

    def __init__(self, vm: str, heard: Callable[[Event], None]) -> None:
        super().__init__(vm)
        self.readbuflen = MAX_MESSAGE_BYTES
        self.dropped = 0
        """The number of events outside of EVENTS."""
        self.unplugged = 0
        """The number of DEVICE_DELETED among them."""
        self._heard = heard
        self._in_turn = 0
        self.logger.disabled = True  # its errors reach us as exceptions

    @property
    def peer(self) -> int:
        """PID of the process that listens at the other end: the one that called listen()."""
        endpoint = self._writer.get_extra_info("socket") if self._writer else None
        return peer_of(endpoint).pid if endpoint is not None else 0

    def abort(self) -> None:
        """Hang up, whether or not the peer has read what was sent."""
        if self._writer:
            self._writer.transport.abort()

    @require(Runstate.RUNNING)
    async def answers(self, asked: Sequence[Command], read: Callable[[int, Message], T]) -> list[T]:
        """What ``read`` makes of each answer as it comes, of which each may have MAX_MESSAGE_BYTES. The commands go in one
        message and one write(2), which wakes QEMU once, past the parent's queues and tasks for each. Raises
        QMPError; StateError at once if the connection has ended: no answer would come; whatever ``read`` raises."""
        answers = _Answers(len(asked), read)
        ids = [self._get_exec_id() for _ in asked]
        sent = zip(asked, ids, strict=True)
        lines = [_ENCODE({"execute": command, "arguments": given, "id": id_}) for (command, given), id_ in sent]
        for number, id_ in enumerate(ids):
            self._pending[id_] = _Slot(answers, number)  # type: ignore[assignment]  # of a queue, it has what the parent needs
        try:
            await self._outgoing.put(Message(b"\n".join([*lines, b""]), eager=False))
            return await answers.all
        finally:
            for id_ in ids:
                del self._pending[id_]

    def _cb_outbound(self, msg: Message) -> Message:
        return msg  # the parent formats each for a log, which takes as long as all else that is done for it

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _do_recv(self) -> Message:
        while True:
            self._in_turn += 1
            if self._in_turn % MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)
            line = await self._readline()
            try:
                envelope = MESSAGE.read(line)
            except UnreadableReplyError as error:
                raise ProtocolError(f"a message that can't be read: {error}") from error
            if envelope.event and envelope.event not in EVENTS and self.runstate is Runstate.RUNNING:
                self.dropped += 1
                self.unplugged += envelope.event == DEVICE_DELETED
                continue
            if envelope.event:
                heard = _event(envelope.event, envelope.timestamp, envelope.data)
                return Message({"event": envelope.event, "decoded": heard}, eager=False)
            message: dict[str, object] = {} if envelope.id is None else {"id": envelope.id}
            if bytes(envelope.answer):
                message["return"] = envelope.answer
            if envelope.error:
                message["error"] = envelope.error.desc
            if bytes(envelope.QMP):
                message["QMP"] = _greeting(envelope.QMP)
            return Message(message, eager=False)

    async def _on_message(self, msg: Message) -> None:
        if isinstance(event := msg.get("decoded"), Event):
            self._heard(event)
        elif msg.get("id") in self._pending:
            await super()._on_message(msg)
        # Else it answers a command whose caller was cancelled, or the qmp_capabilities, without an id, of a client before
        # this one that QEMU was too late for. The parent would format it for a log, which fails for an answer that is still
        # bytes, and so would end the connection.


def _greeting(raw: msgspec.Raw) -> object:
    """The parent looks at its shape."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError("a greeting that can't be read") from error


def _event(name: str, timestamp: msgspec.Raw, data: msgspec.Raw) -> Event:
    try:
        status = EVENT_DATA.read(data).status if name == "MIGRATION" else ""
        return Event(name, TIMESTAMP.read(timestamp).epoch_s, status)
    except UnreadableReplyError as error:
        return Event(name, 0.0, "", f"QEMU told of {name} in a way that makes no sense: {error}")


class Qmp(ABC):
    """A conversation with one QEMU, by whichever way its messages go."""

    def __init__(self, vm: str) -> None:
        self.vm = vm
        self._waits: list[_Wait] = []
        self._sinks: list[Callable[[str], None]] = []
        self._told: set[str] = set()
        self._again: set[str] = set()
        self._gone = False

    def on_event(self, sink: Callable[[str], None]) -> None:
        """``sink`` gets the name of each event of EVENTS, at most every REPEAT_S, and GONE once at the end."""
        self._sinks.append(sink)

    @property
    def gone(self) -> bool:
        return self._gone

    @property
    def unplugged(self) -> int | None:
        """How many devices have gone since the conversation began, by all that QEMU has said before its last answer; None
        where events come by another way than answers."""
        return None

    async def execute(
        self,
        command: str,
        arguments: dict[str, object] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        """Run one command whose answer says no more than that it was done. Raises as ``ask``."""
        await self._raw(command, arguments, fd, timeout_s)

    async def ask(
        self,
        query: Query[T],
        arguments: dict[str, object] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> T:
        """Run one command; ``fd`` travels with it (SCM_RIGHTS). Raises QemuRefused,
        QemuUnreachable; QemuFailed for an answer that is none to this query."""
        return self._decode(query, await self._raw(query.command, arguments, fd, timeout_s))

    def _decode(self, query: Query[T], raw: msgspec.Raw | bytes) -> T:
        """Raises QemuFailed."""
        try:
            return query.read(raw)
        except UnreadableReplyError as error:
            raise QemuFailed(f"QEMU gave an answer to {query.command} that makes no sense: {error}", vm=self.vm) from error

    async def ask_all(
        self, asked: Sequence[tuple[Query[Any], dict[str, object]]], timeout_s: float = COMMAND_TIMEOUT_S
    ) -> list[Any]:
        """The answers, in order. None for one that this QEMU refuses. Raises QemuFailed."""
        answers = []
        try:
            async with asyncio.timeout(timeout_s):
                for query, arguments in asked:
                    answers.append(await self.ask_optional(query, None, arguments))
        except TimeoutError:
            raise QemuFailed(f"QEMU did not answer within {timeout_s:.3g} s", vm=self.vm) from None
        return answers

    async def ask_optional(self, query: Query[T], absent: T, arguments: dict[str, object] | None = None) -> T:
        """The answer of a command or a property that this QEMU may lack."""
        try:
            return await self.ask(query, arguments)
        except QemuRefused:
            return absent

    async def property(self, query: Query[T], path: str, name: str, absent: T | None = None) -> T:
        """``name`` of the QOM object at ``path``; ``absent``, if it is not None, where there is none."""
        arguments: dict[str, object] = {"path": path, "property": name}
        return await (self.ask(query, arguments) if absent is None else self.ask_optional(query, absent, arguments))

    @abstractmethod
    async def _raw(
        self, command: str, arguments: dict[str, object] | None, fd: int | None, timeout_s: float
    ) -> msgspec.Raw:
        """The answer. Raises QemuRefused, QemuUnreachable, QemuFailed."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of QEMU, which runs on."""

    @contextlib.contextmanager
    def expecting(self, name: str, fits: Callable[[Event], bool] = lambda _: True) -> Iterator[asyncio.Future[Event]]:
        """A future for the first event ``name`` that ``fits``; enter before the command that causes it. It raises
        QemuFailed if QEMU's words about it can't be true."""
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        wait = _Wait(lambda event: event.name == name and (bool(event.problem) or fits(event)), future, time.monotonic())
        self._waits.append(wait)
        if self._gone:
            future.set_exception(QemuUnreachable("the connection to QEMU is lost", vm=self.vm))
        try:
            yield future
        finally:
            self._waits.remove(wait)
            if future.done() and not future.cancelled():
                future.exception()  # a failure that the caller did not wait for is known by now
            future.cancel()

    async def quit(self) -> None:
        """Ask QEMU to exit. It may go away before it answers."""
        with contextlib.suppress(QemuFailed):
            await self.execute("quit")

    def _hear(self, event: Event) -> None:
        for wait in self._waits:
            if not wait.future.done() and wait.fits(event):
                believed = _believed(event, wait.began)
                if believed.problem:
                    wait.future.set_exception(QemuFailed(believed.problem, vm=self.vm))
                else:
                    wait.future.set_result(believed)
        self._tell(event.name)

    def _tell(self, name: str) -> None:
        """At once; but a second time only when REPEAT_S have passed, for all that came meanwhile."""
        if self._gone:
            return
        if name in self._told:
            self._again.add(name)
            return
        self._told.add(name)
        asyncio.get_running_loop().call_later(REPEAT_S, self._may_tell_again, name)
        for sink in self._sinks:
            sink(name)

    def _may_tell_again(self, name: str) -> None:
        self._told.discard(name)
        if name in self._again:
            self._again.discard(name)
            self._tell(name)

    def _end(self, why: str) -> None:
        """Tell everybody that waits, once, that the conversation is over."""
        if self._gone:
            return
        self._gone = True
        for wait in self._waits:
            if not wait.future.done():
                wait.future.set_exception(QemuUnreachable(why, vm=self.vm))
        for sink in self._sinks:
            sink(GONE)


class SocketQmp(Qmp):
    """One connection to one QEMU's own monitor. Create it by ``connect``, or by ``over`` if QEMU has connected."""

    def __init__(self, vm: str) -> None:
        super().__init__(vm)
        self._client = _Client(vm, self._hear)
        self._lock = asyncio.Lock()
        self._patience = Patience()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, vm: str, path: Path, timeout_s: float, pid: int = 0) -> SocketQmp:
        """Connect and negotiate, with no other process than ``pid`` if there is one. Raises QemuUnreachable: no listener,
        no greeting in time, or not QMP at all; QemuFailed for somebody else's socket."""
        try:
            async with asyncio.timeout(timeout_s):
                qmp = await _connected(vm, path, pid)
        except TimeoutError:
            raise QemuUnreachable(
                f"QEMU did not greet on {path} within {timeout_s:.3g} s", vm=vm, remedy="another client may hold it"
            ) from None
        except (ConnectError, QMPError, OSError) as error:
            raise QemuUnreachable(f"no QMP on {path}: {_reason(error)}", vm=vm) from error
        if pid and (peer := qmp._client.peer) != pid:
            await qmp.close()
            raise QemuFailed(f"the socket {path} is not its QEMU's: process {peer} listens there, not {pid}", vm=vm)
        return qmp

    @classmethod
    async def over(cls, vm: str, connection: socket.socket, timeout_s: float) -> SocketQmp:
        """Negotiate on a connection that QEMU has made; it is closed if that fails. Raises QemuUnreachable."""
        qmp = cls(vm)
        try:
            async with asyncio.timeout(timeout_s):
                await qmp.negotiate(connection)
        except TimeoutError:
            raise QemuUnreachable(f"QEMU did not greet within {timeout_s:.3g} s", vm=vm) from None
        except (ConnectError, QMPError, OSError) as error:
            raise QemuUnreachable(f"no QMP where QEMU has connected: {_reason(error)}", vm=vm) from error
        return qmp

    @property
    def dropped(self) -> int:
        """How many events were dropped since the connection began."""
        return self._client.dropped

    @property
    def unplugged(self) -> int | None:
        return self._client.unplugged

    async def ask_all(
        self, asked: Sequence[tuple[Query[Any], dict[str, object]]], timeout_s: float = COMMAND_TIMEOUT_S
    ) -> list[Any]:
        """The answers, in order, to questions that are sent at once: a guest may wait for them. None for one that this QEMU
        refuses. Raises QemuFailed."""
        if not asked:
            return []

        def read(number: int, answer: Message) -> Any:
            query = asked[number][0]
            return None if "error" in answer else self._decode(query, self._value(query.command, answer))

        commands = [(query.command, arguments) for query, arguments in asked]
        timeout_s = min(timeout_s, self._patience.next_s())
        try:
            return await self._answers(commands, read, None, timeout_s)
        except TimeoutError:
            raise QemuFailed(f"QEMU did not answer within {timeout_s:.3g} s", vm=self.vm) from None
        except (QMPError, OSError) as error:
            raise QemuFailed(f"QEMU went away during {commands[0][0]}: {_reason(error)}", vm=self.vm) from error

    async def _answers(
        self, commands: Sequence[Command], read: Callable[[int, Message], T], fd: int | None, timeout_s: float
    ) -> list[T]:
        """Raises TimeoutError, QMPError, OSError; whatever ``read`` raises."""
        # One at a time, so that a descriptor can't reach another command; and the wait for that counts.
        async with asyncio.timeout(timeout_s), self._lock:
            began = time.monotonic()
            if fd is not None:
                self._client.send_fd_scm(fd)
            try:
                return await self._client.answers(commands, read)
            finally:
                self._patience.waited(time.monotonic() - began)

    def _value(self, command: str, answer: Message) -> msgspec.Raw:
        """Raises QemuFailed."""
        value = answer.get("return")
        if not isinstance(value, msgspec.Raw):
            raise QemuFailed(f"QEMU gave no answer to {command}", vm=self.vm)
        return value

    async def _raw(
        self, command: str, arguments: dict[str, object] | None, fd: int | None, timeout_s: float
    ) -> msgspec.Raw:
        def read(_: int, answer: Message) -> msgspec.Raw:
            if "error" in answer:
                raise QemuRefused(f"QEMU refused {command}: {answer['error']}", vm=self.vm)
            return self._value(command, answer)

        timeout_s = min(timeout_s, self._patience.next_s())
        try:
            return (await self._answers([(command, arguments or {})], read, fd, timeout_s))[0]
        except TimeoutError:
            raise QemuUnreachable(f"QEMU did not answer {command} within {timeout_s:.3g} s", vm=self.vm) from None
        except (QMPError, OSError) as error:
            raise QemuUnreachable(
                f"the connection to QEMU was lost during {command}: {_reason(error)}", vm=self.vm
            ) from error

    async def close(self) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        disconnecting = self._disconnecting()
        if not (await asyncio.wait({disconnecting}, timeout=CLOSE_TIMEOUT_S))[0]:
            self._client.abort()

    def _disconnecting(self) -> asyncio.Task[None]:
        """It is not cancelled: qemu.qmp would leave an error behind that nobody takes. After the peer's end it is its
        cause."""
        task = asyncio.create_task(self._client.disconnect())
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def open(self, path: Path, pid: int) -> None:
        """Connect and negotiate. Raises the errors of qemu.qmp."""
        if pid:
            with socket_at(path, uid_of(pid)) as address:
                await self.negotiate(address)
        else:
            await self.negotiate(str(path))

    async def negotiate(self, where: str | socket.socket) -> None:
        """Likewise, at an address or on a connection."""
        try:
            await self._client.connect(where)
        except AssertionError as error:  # qemu.qmp asserts that the peer has not hung up by now
            raise ConnectError("the connection was lost as it was made", error) from error
        except asyncio.CancelledError:
            await asyncio.wait({self._disconnecting()})
            raise
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        self._end("the connection to QEMU was lost")


def _believed(event: Event, began: float) -> Event:
    """At a time at which it can have been: a guest's pause is the time between two. By both clocks, so that a step of the
    host's own time is no lie of QEMU's; without a ``problem`` up to CLOCK_SLACK_S."""
    if event.problem:
        return event
    now = time.time()
    earliest = now - (time.monotonic() - began)
    if earliest - CLOCK_SLACK_S <= event.at <= now + CLOCK_SLACK_S:
        return replace(event, at=min(max(event.at, earliest), now))
    return replace(event, problem=f"QEMU says that {event.name} was {event.at - now:+.0f} s from now, which can't be")


async def _connected(vm: str, path: Path, pid: int) -> SocketQmp:
    """A QEMU that comes up can tell of an event, such as RESUME, where qemu.qmp expects its greeting, or the answer to
    qmp_capabilities: asked anew it has both."""
    for attempt in range(ATTEMPTS):
        qmp = SocketQmp(vm)
        try:
            await qmp.open(path, pid)
        except ConnectError as error:
            if not isinstance(error.exc, (GreetingError, NegotiationError, AssertionError)) or attempt == ATTEMPTS - 1:
                raise
        else:
            return qmp
    raise AssertionError("the last attempt returns or raises")


def _reason(error: BaseException) -> str:
    if isinstance(error, ExecInterruptedError):
        return "it closed the connection"
    inner = getattr(error, "exc", None) or error
    return printable(f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__, 500)

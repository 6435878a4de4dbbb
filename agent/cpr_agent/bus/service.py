# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon on the bus: one way in for every call, driven by the XML contract.

Below the library's service classes on purpose (ADR 3): their handlers know no sender, answer unexpected errors with a
traceback and cancelled ones never, and can't authorize properties. Here each call is a task that authorizes, checks, calls,
and always answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cpr_agent.bus.authority import Authority, trusted
from cpr_agent.bus.contract import (
    BUS_NAME,
    INSPECT,
    ROOT,
    Interface,
    introspection,
    read_contract,
    standard_interfaces,
)
from cpr_agent.bus.frames import UnsendableError, forget_arguments, read_arguments, signature_of
from cpr_agent.bus.library import ErrorType, Message, MessageFlag, MessageType, NameFlag, RequestNameReply, Variant
from cpr_agent.bus.limits import COSTS, Limits, refuse_excess, refuse_long_text
from cpr_agent.bus.listeners import Listeners
from cpr_agent.bus.logs import LogObject, LogSettings
from cpr_agent.bus.objects import BusObject, JobObject, ManagerObject, VmObject, error_parts, job_path, vm_path
from cpr_agent.bus.wire import DAEMON, AgentBus, error_text
from cpr_agent.core.jobs import Job
from cpr_agent.core.listener import Listener
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import AccessDenied, Busy, CprError, HostFailed, InvalidArgument, LimitsExceeded
from cpr_agent.text import printable

log = logging.getLogger(__name__)

PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
_KINDS = {f"{ROOT}/vm/": VmObject.interface, f"{ROOT}/job/": JobObject.interface}
"""By how their paths begin."""
CONNECT_TIMEOUT_S = 30.0
ENDED_S = 30.0
"""How long the object of a job that is over stays, for who comes late."""
ENDED_JOBS = 32
"""So many of them at the most."""
JOB_NEWS_S = 0.1
"""Between two signals of a job's changes: guests may stand still meanwhile."""
REFUSAL_S = 1.0
"""Until the answer to a call that was one too many."""
WORKERS = 2
"""Threads for work that callers ask for, and as many for short reads, which that work does not delay. No guest waits for
these: core's work has threads of its own."""
_ANYWHERE = ("Introspect", "Ping", "GetMachineId")
"""Methods of every path (D-Bus specification, "Standard Interfaces")."""
_DEPARTURES = "type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"


class Service(Listener):
    """Publishes ``manager`` on a connected ``bus``."""

    def __init__(self, bus: AgentBus, manager: Manager, run_dir: Path, logs: LogSettings | None = None) -> None:
        self._bus = bus
        self._manager = manager
        self._run_dir = run_dir
        self._authority = Authority(bus)
        self._limits = Limits()
        self._contract = read_contract()
        self._standard = standard_interfaces()
        self._objects: dict[str, BusObject] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._told: dict[str, dict[str, Any]] = {}
        self._told_at: dict[str, float] = {}
        self._changed: set[str] = set()
        self._telling: set[str] = set()
        self._ready = asyncio.Event()
        self._call: ContextVar[Message] = ContextVar("call")
        self._unknown: set[str] = set()
        """Paths of VMs whose state is not known yet: they can be called, and are not shown."""
        self._ended: deque[str] = deque()
        self._listeners = Listeners()
        self._workers: Executor = ThreadPoolExecutor(WORKERS, "callers")
        self._readers: Executor = ThreadPoolExecutor(WORKERS, "reads")
        self._add(ManagerObject(manager, self))
        if logs:
            self._add(LogObject(logs))
        for vm in manager.vms.values():
            self.vm_added(vm)
        manager.listeners.add(self)
        bus.add_message_handler(self._on_message)
        bus.screen(self._is_heard)

    @classmethod
    async def connect(cls, address: str | None) -> AgentBus:
        """A connection to ``address``, or to the system bus. Raises TimeoutError, OSError, EOFError, AddressError."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await AgentBus(address).connect()

    @staticmethod
    async def own_name(bus: AgentBus) -> None:
        """Raises Busy if another agent has the name: a second one would act on the same guests; AccessDenied."""
        bus.send(Message(*DAEMON, "AddMatch", signature="s", body=[_DEPARTURES], flags=MessageFlag.NO_REPLY_EXPECTED))
        wanted = [BUS_NAME, NameFlag.DO_NOT_QUEUE.value]
        reply = await bus.call(Message(*DAEMON, "RequestName", signature="su", body=wanted))
        if reply.message_type is MessageType.ERROR:
            raise AccessDenied(
                f"the bus does not let this user own {BUS_NAME}: {error_text(reply)}",
                left="nothing was started",
                remedy="run the agent as root, with its bus policy installed (org.cpragent1.conf)",
            )
        if reply.body != [RequestNameReply.PRIMARY_OWNER.value]:
            raise Busy(f"another process owns {BUS_NAME}", left="nothing was started", remedy="stop the other agent")

    def open(self) -> None:
        """Answer calls from now on: those that came before the agent had recovered were kept waiting."""
        self._ready.set()

    async def disconnected(self) -> None:
        """Returns, or raises, when the bus is gone."""
        await self._bus.wait_for_disconnect()

    # -- calls --------------------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member == "NameOwnerChanged":
            self._departed(message)
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        try:
            self._limits.begin(str(message.sender))
        except LimitsExceeded as error:  # at once, and not in one more task
            self._reply(message, Message.new_error(message, error.dbus_name, error.text))
            return True
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(lambda _: self._limits.end(str(message.sender)))
        return True

    def _is_heard(self, sender: str) -> bool:
        """Whether a call of ``sender`` that wants no answer is looked at."""
        uid = self._authority.known_uid(sender)
        return self._limits.has_room(sender, None if uid is None or trusted(uid) else uid)

    def _departed(self, message: Message) -> None:
        if message.sender == DAEMON[0] and message.signature == "sss" and not message.body[2]:
            self._authority.gone(message.body[0])
            self._listeners.discard(message.body[0])

    async def _answer(self, call: Message) -> None:
        """The guard around every call: it authorizes, checks, and always answers."""
        self._call.set(call)
        try:
            await self._ready.wait()
            uid = await self._authority.uid(call)
            cost = 0.0 if trusted(uid) else COSTS.get(str(call.member), 1.0)
            with self._limits.one_more(uid) if cost else contextlib.nullcontext():
                if cost:
                    await self._spend(call, uid, cost)
                with self._limits.under_way(uid, cost):
                    signature, body = await self._dispatch(call, uid)
            reply = Message.new_method_return(call, signature, body)
        except CprError as error:
            reply = Message.new_error(call, error.dbus_name, error.text)
        except _Unknown as error:
            reply = Message.new_error(call, error.kind.value, str(error))
        except asyncio.CancelledError:
            self._reply(call, Message.new_error(call, ErrorType.NO_REPLY.value, "the agent is going away"))
            raise
        except OSError as error:
            self._log_failure(call)
            target = self._objects.get(str(call.path))
            failed = HostFailed.of(error, vm=target.name if isinstance(target, VmObject) else "")
            reply = Message.new_error(call, failed.dbus_name, failed.text)
        except Exception:
            self._log_failure(call)
            reply = _internal_error(call)
        self._reply(call, reply)

    def _log_failure(self, call: Message) -> None:
        log.exception("%s.%s on %s", *map(_shown, (call.interface, call.member, call.path)))

    async def _spend(self, call: Message, uid: int, cost: float) -> None:
        """Who goes on to call although he is refused gets each answer late: an answer at once would bring the next call.
        Raises LimitsExceeded."""
        try:
            self._limits.spend(uid, cost)
        except LimitsExceeded:
            forget_arguments(call)
            await asyncio.sleep(REFUSAL_S)
            raise

    def _reply(self, call: Message, reply: Message) -> None:
        if call.flags & MessageFlag.NO_REPLY_EXPECTED:
            return
        try:
            self._bus.send(reply)
        except UnsendableError:
            log.exception("the answer to %s can't be sent", _shown(call.member))
            self._bus.send(_internal_error(call))

    async def _dispatch(self, call: Message, uid: int) -> tuple[str, list[Any]]:
        try:
            interface, target = self._target(call)
        except _Unknown:  # whether there is such a VM or job is for those to know who may look
            await self._authority.require(call, self._wanted_action(call))
            raise
        method = interface.methods[str(call.member)]
        if interface.name in (PROPERTIES, OBJECT_MANAGER):
            settable = self._contract[target.interface].settable if target and method.name == "Set" else ""
            await self._authority.require(call, settable or INSPECT)
            self._listeners.add(str(call.sender), uid)
        elif interface.name in self._contract:
            await self._authority.require(call, method.action)
            self._listeners.add(str(call.sender), uid)
        if (signature := signature_of(call)) != method.in_signature:
            raise InvalidArgument(
                f"{interface.name}.{method.name} takes arguments of signature {method.in_signature!r}, not {signature!r}"
            )
        call = read_arguments(call)
        refuse_excess(call)
        if not trusted(uid):
            refuse_long_text(call)
        if target and interface.name in self._contract:
            return method.out_signature, await target.method(method.name)(*call.body)
        return method.out_signature, await self._standard_call(method.name, str(call.path), call.body)

    def _wanted_action(self, call: Message) -> str:
        """That of the same call of an object that is there: a refusal must not tell the two apart."""
        kind = next((i for prefix, i in _KINDS.items() if str(call.path).startswith(prefix)), ManagerObject.interface)
        interface = self._contract[kind]
        asked = interface.methods.get(str(call.member)) if call.interface in (None, "", kind) else None
        return asked.action if asked else INSPECT

    def _target(self, call: Message) -> tuple[Interface, BusObject | None]:
        path, member = str(call.path), str(call.member)
        target = self._objects.get(path)
        own = [self._contract[target.interface]] if target else []
        offered = [i for i in (*own, *self._standard.values()) if call.interface in (None, "", i.name)]
        if target is None and member not in _ANYWHERE:
            raise _Unknown(ErrorType.UNKNOWN_OBJECT, f"there is no object {path}")
        for interface in offered:
            if member in interface.methods:
                return interface, target
        kind = ErrorType.UNKNOWN_METHOD if offered else ErrorType.UNKNOWN_INTERFACE
        raise _Unknown(kind, f"{path} has no method {call.interface}.{member}")

    async def _standard_call(self, member: str, path: str, body: list[Any]) -> list[Any]:
        match member:
            case "Introspect":
                return [self._introspect(path, await self._children(path))]
            case "Ping":
                return []
            case "GetMachineId":
                return [Path("/etc/machine-id").read_text().strip()]
            case "GetManagedObjects":
                objects = [o for path, o in self._objects.items() if _below_root(path) and path not in self._unknown]
                slow = await asyncio.gather(*map(self._slow, objects), return_exceptions=True)
                there = [(o, values) for o, values in zip(objects, slow, strict=True) if o is self._objects.get(o.path)]
                return [dict(answered(there, self._quick))]
            case _:
                target = self._objects[path]
                if body[0] not in ("", target.interface):
                    raise _Unknown(ErrorType.UNKNOWN_INTERFACE, f"{path} has no properties of an interface {body[0]}")
                return await self._properties_call(member, target, body)

    async def _properties_call(self, member: str, target: BusObject, body: list[Any]) -> list[Any]:
        match member:
            case "GetAll":
                return [await self._values(target)]
            case "Get":
                return [await self._value(target, body[1])]
            case _:
                self._set(target, *body[1:])
                return []

    async def _children(self, path: str) -> set[str]:
        """VMs and jobs are shown to those alone who may look. Raises AccessDenied for a path that could be one."""
        if _below_root(path):
            await self._authority.require(self._call.get(), INSPECT)
        elif path == ROOT:
            return {prefix.split("/")[-2] for prefix in _KINDS}
        below = f"{path.rstrip('/')}/"
        return {p.removeprefix(below).split("/")[0] for p in self._objects if p.startswith(below)}

    def _introspect(self, path: str, children: set[str]) -> str:
        target = self._objects.get(path)
        if target is None and not children and f"{path}/" not in _KINDS:
            raise _Unknown(ErrorType.UNKNOWN_OBJECT, f"there is no object {path}")
        own = [self._contract[target.interface]] if target else []
        standard = [i for i in self._standard.values() if target or i.name.endswith("Introspectable")]
        standard = [i for i in standard if i.name != OBJECT_MANAGER or path == ROOT]
        return introspection([*own, *standard], list(children))

    async def _value(self, target: BusObject, name: str) -> Variant:
        properties = self._contract[target.interface].properties
        if name not in properties:
            raise _Unknown(ErrorType.UNKNOWN_PROPERTY, f"{target.path} has no property {target.interface}.{name}")
        return Variant(properties[name], await target.property(name) if target.is_slow(name) else target.property(name))

    def _set(self, target: BusObject, name: str, value: Variant) -> None:
        properties = self._contract[target.interface]
        if name not in properties.writable:
            raise _Unknown(ErrorType.PROPERTY_READ_ONLY, f"property {name} is read-only")
        if value.signature != properties.properties[name]:
            raise InvalidArgument(f"{name} has type {properties.properties[name]!r}, not {value.signature!r}")
        target.set(name, value.value)

    async def _values(self, target: BusObject) -> dict[str, Variant]:
        return {**await self._slow(target), **self._quick(target)}

    async def _slow(self, target: BusObject) -> dict[str, Variant]:
        """Properties that take a while to read. Whatever was told of meanwhile is as it was told."""
        told = self._told.get(target.path)
        properties = self._contract[target.interface].properties
        found = {name: await self._value(target, name) for name in properties if target.is_slow(name)}
        news = self._told.get(target.path)
        return found if news is None or news is told else {name: news.get(name, value) for name, value in found.items()}

    def _quick(self, target: BusObject, but: Container[str] = ()) -> dict[str, Variant]:
        """The others. They are read last, right before they are sent: a signal tells of what changes after that, and nobody
        who has heard it may be told then of what was before."""
        properties = self._contract[target.interface].properties
        return {
            name: Variant(kind, target.property(name))
            for name, kind in properties.items()
            if name not in but and not target.is_slow(name)
        }

    # -- the caller -----------------------------------------------------------------------------------------------------

    async def may(self, action: str) -> bool:
        return await self._authority.allows(self._call.get(), action)

    async def is_trusted(self) -> bool:
        return trusted(await self._authority.uid(self._call.get()))

    async def apart(self, work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._workers, functools.partial(work, *arguments, **more))

    async def read(self, reading: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, reading, *arguments)

    # -- signals ------------------------------------------------------------------------------------------------------

    def vm_added(self, vm: Vm) -> None:
        target = VmObject(vm, self._manager, str(self._run_dir / "vm" / vm.name / "admin.sock"), self)
        self._objects[target.path] = target
        self._unknown.add(target.path)

    def vm_removed(self, vm: Vm) -> None:
        self._remove(vm_path(vm.name))

    def vm_changed(self, vm: Vm) -> None:
        path = vm_path(vm.name)
        if path not in self._unknown:
            self._properties_changed(path)
        elif vm.state is not VmState.RECOVERING:
            self._unknown.discard(path)
            self._add(self._objects[path])

    def upgrade_changed(self) -> None:
        self._properties_changed(ROOT)

    def job_added(self, job: Job) -> None:
        target = JobObject(job, lambda: self._manager.jobs.cancel(job.id))
        self._add(target)
        self._signal(ROOT, "org.cpragent1.Manager", "JobNew", "uo", [job.id, target.path])
        self._properties_changed(ROOT)

    def job_changed(self, job: Job) -> None:
        self._properties_changed(job_path(job), JOB_NEWS_S)

    def job_removed(self, job: Job) -> None:
        self._later(lambda: self._end(job))
        self._properties_changed(ROOT)

    async def _end(self, job: Job) -> None:
        path = job_path(job)
        await self._tell(path)
        body = [job.id, path, job.result, error_parts(job.error)]
        self._signal(ROOT, "org.cpragent1.Manager", "JobRemoved", "uosa{sv}", body)
        self._ended.append(path)
        asyncio.get_running_loop().call_later(ENDED_S, self._forget, path)
        if len(self._ended) > ENDED_JOBS:
            self._forget(self._ended[0])

    def _forget(self, path: str) -> None:
        if path in self._ended:
            self._ended.remove(path)
            self._remove(path)

    def _add(self, target: BusObject) -> None:
        self._objects[target.path] = target
        if _below_root(target.path):
            self._later(lambda: self._announce(target))

    async def _announce(self, target: BusObject) -> None:
        if target.path in self._objects:
            values = await self._values(target)
            self._told.setdefault(target.path, values)
            body = [target.path, {target.interface: values}]
            self._signal(ROOT, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", body)

    def _remove(self, path: str) -> None:
        target = self._objects.pop(path, None)
        self._told.pop(path, None)
        self._told_at.pop(path, None)
        if path in self._unknown:
            self._unknown.discard(path)
        elif target:
            self._signal(ROOT, OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, [target.interface]])

    def _properties_changed(self, path: str, apart_s: float = 0.0) -> None:
        """Many changes in one turn of the loop, or within ``apart_s`` after the last signal, become one signal, with the
        values that differ from the last told."""
        if path in self._changed:
            return
        self._changed.add(path)
        loop = asyncio.get_running_loop()
        wait_s = self._told_at.get(path, 0.0) + apart_s - loop.time() if apart_s else 0.0
        if wait_s > 0:
            loop.call_later(wait_s, lambda: self._later(lambda: self._tell(path)))
        else:
            self._later(lambda: self._tell(path))

    async def _tell(self, path: str) -> None:
        """One at a time of each object: or what was read first could be told last."""
        if path in self._telling:
            self._changed.add(path)
            return
        self._telling.add(path)
        try:
            await self._tell_once(path)
            while path in self._changed:
                await self._tell_once(path)
        finally:
            self._telling.discard(path)

    async def _tell_once(self, path: str) -> None:
        self._changed.discard(path)
        target = self._objects.get(path)
        if target is None:
            return
        interface = self._contract[target.interface]
        slow = [name for name in interface.properties if name not in interface.silent and target.is_slow(name)]
        found = {name: await self._value(target, name) for name in slow}
        now = {**found, **self._quick(target, interface.silent)}
        before = self._told.get(path, {})
        changed = {name: value for name, value in now.items() if before.get(name) != value}
        self._told[path] = now
        self._told_at[path] = asyncio.get_running_loop().time()
        if changed:
            self._signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [target.interface, changed, []])

    def _later(self, act: Callable[[], Any]) -> None:
        task = asyncio.get_running_loop().create_task(act())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def _signal(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """To each connection that was allowed to ask for the same: a broadcast would tell everybody."""
        for name in self._listeners:
            signal = Message.new_signal(path, interface, member, signature, body)
            signal.destination = name
            try:
                self._bus.send(signal)
            except UnsendableError:
                log.exception("%s of %s can't be sent", member, path)
                return


def answered(
    found: Iterable[tuple[BusObject, dict[str, Variant] | BaseException]], rest: Callable[[BusObject], dict[str, Variant]]
) -> Iterator[tuple[str, dict[str, dict[str, Variant]]]]:
    """Those whose values could be told, with the ``rest`` of them: the fault of one leaves no caller without the others."""
    for one, values in found:
        try:
            if isinstance(values, BaseException):
                raise values
            yield one.path, {one.interface: {**values, **rest(one)}}
        except Exception:
            log.exception("%s is left out", one.path)


def _internal_error(call: Message) -> Message:
    return Message.new_error(call, f"{BUS_NAME}.Error.Internal", "internal error; see: journalctl -u cpr-agent.service")


def _shown(name: object) -> str:
    """A caller's word in the log."""
    return printable(str(name), 100)


def _below_root(path: str) -> bool:
    """Whether the ObjectManager at the root manages the object."""
    return path.startswith(f"{ROOT}/")


class _Unknown(Exception):
    """A call of something that is not there, with the standard error name for it."""

    def __init__(self, kind: ErrorType, text: str) -> None:
        self.kind = kind
        super().__init__(text)

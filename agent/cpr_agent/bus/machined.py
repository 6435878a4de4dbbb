# SPDX-License-Identifier: GPL-2.0-or-later
"""systemd-machined over the agent's own connection; implements core.machines.Registry (org.freedesktop.machine1(5))."""

from __future__ import annotations

import asyncio

from cpr_agent.bus.library import Message, MessageType, Variant
from cpr_agent.bus.wire import AgentBus, error_text
from cpr_agent.core.machines import SERVICE, Listed
from cpr_agent.errors import HostFailed, WrongState
from cpr_agent.text import printable

TIMEOUT_S = 10.0
"""machined answers at once. The bus starts it for the first call."""
_NAME = "org.freedesktop.machine1"
_MANAGER = ("/org/freedesktop/machine1", f"{_NAME}.Manager")
_NO_SUCH_MACHINE = f"{_NAME}.NoSuchMachine"
_ABSENT = (
    *("org.freedesktop.systemd1.", "org.freedesktop.DBus.Error.Spawn."),
    *(
        f"org.freedesktop.DBus.Error.{name}"
        for name in (
            "ServiceUnknown",
            "NameHasNoOwner",
            "NoReply",
            "Timeout",
            "Disconnected",
            "AccessDenied",
            "LimitsExceeded",
        )
    ),
)
"""How the errors begin that say nothing of the machine: machined is not there, can't be started, or does not let us in."""
_TEXT_CHARS = 200


class Machined:
    def __init__(self, bus: AgentBus, timeout_s: float = TIMEOUT_S) -> None:
        self._bus = bus
        self._timeout_s = timeout_s

    async def get(self, name: str) -> Listed | None:
        found = await self._call(*_MANAGER, "GetMachine", "s", name)
        if _is_unknown(found):
            return None
        try:
            path = str(_checked(found).body[0])
            answer = await self._call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", f"{_NAME}.Machine")
            if answer.error_name == "org.freedesktop.DBus.Error.UnknownObject":  # it has ended meanwhile
                return None
            values: dict[str, Variant] = _checked(answer).body[0]
            service, unit = (printable(str(values[key].value), _TEXT_CHARS) for key in ("Service", "Unit"))
            return Listed(service=service, leader=int(values["Leader"].value), unit=unit)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise HostFailed(f"systemd-machined answers for {name} with what is no machine: {error!r}") from error

    async def register(self, name: str, leader: int) -> None:
        _checked(await self._call(*_MANAGER, "RegisterMachine", "sayssus", name, b"", SERVICE, "vm", leader, ""))

    async def unregister(self, name: str) -> None:
        answer = await self._call(*_MANAGER, "UnregisterMachine", "s", name)
        if not _is_unknown(answer):
            _checked(answer)

    async def _call(self, path: str, interface: str, member: str, signature: str, *body: object) -> Message:
        """Raises HostFailed if there is no answer."""
        message = Message(_NAME, path, interface, member, signature=signature, body=list(body))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._bus.call(message)
        except TimeoutError:
            raise HostFailed(f"systemd-machined has not answered {member} within {self._timeout_s:g} s") from None
        except (OSError, EOFError) as error:
            raise HostFailed(f"systemd-machined was not asked: {error}") from error


def _is_unknown(answer: Message) -> bool:
    return answer.message_type is MessageType.ERROR and answer.error_name == _NO_SUCH_MACHINE


def _checked(answer: Message) -> Message:
    """Raises HostFailed, WrongState if it is an error."""
    if answer.message_type is MessageType.ERROR:
        text = printable(error_text(answer), _TEXT_CHARS)
        if str(answer.error_name).startswith(_ABSENT):
            raise HostFailed(f"systemd-machined can't be asked: {text}", left="it does not list VMs; nothing depends on it")
        raise WrongState(f"it says: {text}")
    return answer

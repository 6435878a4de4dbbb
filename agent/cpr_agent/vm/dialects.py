"""How each generation of QEMU is told to save and load with RAM left in place. One class each, one interface.

Chosen by what QMP says it can do (``query-qmp-schema``), not by version. What was measured is in FACTS.md, "CPR on QEMU".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from cpr_agent.errors import QemuFailed
from cpr_agent.vm.qmp import Qmp

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
CONFLICTING = ("postcopy-ram", "background-snapshot", "x-colo", "multifd", "mapped-ram")


class Dialect(ABC):
    """``prepare`` before either act; both acts only start it: completion is the MIGRATION event's to tell."""

    name: ClassVar[str]
    keeps_suspended: ClassVar[bool]
    """False where a save wakes a suspended guest (QEMU up to 8.2)."""

    async def prepare(self, qmp: Qmp) -> None:
        await qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})

    @abstractmethod
    async def save(self, qmp: Qmp, fd: int) -> None: ...

    @abstractmethod
    async def load(self, qmp: Qmp, fd: int) -> None: ...


class CprReboot(Dialect):
    """QEMU >= 8.2: ``mode=cpr-reboot`` and ``file:`` on a descriptor set, so that QEMU needs no right to any path."""

    name = "cpr-reboot"
    keeps_suspended = True

    async def prepare(self, qmp: Qmp) -> None:
        await super().prepare(qmp)
        await qmp.execute("migrate-set-parameters", {"mode": "cpr-reboot"})

    async def save(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("migrate", {"uri": await self._uri(qmp, fd)})

    async def load(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("migrate-incoming", {"uri": await self._uri(qmp, fd)})

    @staticmethod
    async def _uri(qmp: Qmp, fd: int) -> str:
        added = await qmp.execute("add-fd", fd=fd)
        return f"file:/dev/fdset/{added['fdset-id']}"


class IgnoreShared(Dialect):
    """QEMU 5.0 to 8.1: x-ignore-shared alone, to a descriptor given by name. (``exec:`` hides failures: FACTS.md.)"""

    name = "ignore-shared"
    keeps_suspended = False

    async def save(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("getfd", {"fdname": "cpr-state"}, fd=fd)
        await qmp.execute("migrate", {"uri": "fd:cpr-state"})

    async def load(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("getfd", {"fdname": "cpr-state"}, fd=fd)
        await qmp.execute("migrate-incoming", {"uri": "fd:cpr-state"})


def choose(schema: list[dict[str, Any]], vm: str) -> Dialect:
    """The dialect for a QEMU with this ``query-qmp-schema``. Raises QemuFailed if it has none."""
    words = {member["name"] for entity in schema for member in entity.get("members", ()) if "name" in member}
    words |= {value for entity in schema for value in entity.get("values", ())}
    words |= {entity["name"] for entity in schema if entity.get("meta-type") == "command"}
    if "x-ignore-shared" not in words:
        raise QemuFailed("this QEMU cannot leave RAM in place (no x-ignore-shared)", vm=vm, remedy="use QEMU 5.0 or newer")
    if "cpr-reboot" in words:
        return CprReboot()
    return IgnoreShared()

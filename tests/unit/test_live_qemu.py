# SPDX-License-Identifier: GPL-2.0-or-later
"""Acts on one QEMU that are cancelled, or into which another client of its speaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cpr_agent.errors import GuestAgentFailed
from cpr_agent.vm import guest_agent
from cpr_agent.vm.qemu import LiveQemu
from cpr_agent.vm.qmp import Event
from tests.fakes import Gate
from tests.scripted_qmp import ScriptedQmp


class Peer(ScriptedQmp):
    """A QEMU with cpr-reboot and cpr-transfer, whose migrations go on until they are cancelled. A command of ``gates``
    waits. ``states`` are its run states, one after the other; the last stays."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.gates: dict[str, Gate] = {}
        self.states = ["running"]
        self.migration = "none"

    async def _raw(
        self, command: str, arguments: dict[str, object] | None, fd: int | None, timeout_s: float
    ) -> msgspec.Raw:
        if gate := self.gates.get(command):
            gate.entered.set()
            await gate.go.wait()
        return await super()._raw(command, arguments, fd, timeout_s)

    def _answer(self, command: str, arguments: dict[str, object]) -> object:  # noqa: ARG002
        match command:
            case "query-commands":
                return [{"name": "migrate"}]
            case "query-migrate-capabilities":
                return [{"capability": "x-ignore-shared", "state": False}]
            case "query-migrate-parameters":
                return {"mode": "normal"}
            case "query-qmp-schema":
                return [{"name": "0", "meta-type": "enum", "values": ["cpr-reboot", "cpr-transfer"]}]
            case "query-status":
                return {"status": self.states.pop(0) if len(self.states) > 1 else self.states[0], "running": True}
            case "query-migrate":
                return {"status": self.migration}
            case "add-fd":
                return {"fdset-id": 1, "fd": 1}
            case "migrate":
                self.migration = "active"
            case "migrate_cancel":
                self.migration = "cancelled"
        return {}


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def cancelled_thrice(peer: Peer, act: asyncio.Task[None], asked: str) -> None:
    """First once it has ``asked``, then while the migration is being cancelled."""
    cancelling = peer.gates["migrate_cancel"] = Gate()
    waiting = peer.gates[asked] = Gate()
    await waiting.entered.wait()
    waiting.go.set()
    await turns()
    act.cancel()
    await cancelling.entered.wait()
    for _ in range(2):
        act.cancel()
        await turns()
        assert not act.done(), "its migration is still under way"
    cancelling.go.set()
    with pytest.raises(asyncio.CancelledError):
        await act


async def save(qemu: LiveQemu) -> None:
    await qemu.save(0, 60.0, "id")


async def hand_over(qemu: LiveQemu) -> None:
    async def lives() -> bool:
        return True

    async with qemu.handing_over("/run/cpr-agent/vm/web1:b", lives, 60.0):
        await asyncio.Event().wait()


@pytest.mark.parametrize("act", [save, hand_over])
def test_however_often_it_is_cancelled_its_migration_is_over_before(act: Callable[[LiveQemu], asyncio.Task[None]]) -> None:
    """It would stop the guest after the caller has seen it run."""

    async def story() -> None:
        peer = Peer()
        peer.states = ["finish-migrate", "finish-migrate", "running"]
        await cancelled_thrice(peer, asyncio.ensure_future(act(LiveQemu(peer))), "migrate")
        assert peer.states == ["running"], "QEMU refuses `cont` as long as a migration has its guest"

    asyncio.run(story())


def test_the_save_of_a_guest_that_stands_still_is_not_cancelled_as_it_ends() -> None:
    """QEMU would leave it in postmigrate, with half a state in the file."""

    async def story() -> None:
        peer = Peer()
        peer.states = ["paused"]
        looking = peer.gates["query-migrate"] = Gate()
        migrating = peer.gates["migrate"] = Gate()
        act = asyncio.ensure_future(save(LiveQemu(peer)))
        await migrating.entered.wait()
        migrating.go.set()
        await turns()
        act.cancel()
        await looking.entered.wait()
        assert "migrate_cancel" not in peer.asked
        peer.migration = "completed"
        looking.go.set()
        with pytest.raises(asyncio.CancelledError):
            await act
        assert peer.asked.index("query-migrate") < peer.asked.index("migrate_cancel")

    asyncio.run(story())


def test_an_offer_that_is_cancelled_as_it_is_made_is_withdrawn() -> None:
    async def story() -> None:
        peer = Peer()
        offering = peer.gates["migrate"] = Gate()
        act = asyncio.ensure_future(hand_over(LiveQemu(peer)))
        await offering.entered.wait()
        act.cancel()
        with pytest.raises(asyncio.CancelledError):
            await act
        assert "migrate_cancel" in peer.asked

    asyncio.run(story())


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_guest_that_is_on_its_way_to_sleep_is_waited_for(monkeypatch: pytest.MonkeyPatch, *, sleeps: bool) -> None:
    """One that does not tell QEMU of its sleep (s2idle) is woken by a key, which must not come before it sleeps."""
    asked = Gate()

    async def suspend(vm: str, path: Path, asleep: asyncio.Future[Event], timeout_s: float) -> None:  # noqa: ARG001
        asked.entered.set()
        await asked.go.wait()
        if not sleeps:
            raise GuestAgentFailed("it did not within 60 s", vm=vm)
        asleep.set_result(Event("SUSPEND", 1.0, ""))

    async def port(qemu: LiveQemu) -> Path:  # noqa: ARG001
        return Path("/qga")

    @contextlib.contextmanager
    def at(qemu: LiveQemu, path: Path) -> Iterator[Path]:  # noqa: ARG001
        yield path

    monkeypatch.setattr(guest_agent, "suspend", suspend)
    monkeypatch.setattr(LiveQemu, "_guest_agent", port)
    monkeypatch.setattr(LiveQemu, "_at", at)

    async def story() -> None:
        peer = Peer()
        act = asyncio.ensure_future(LiveQemu(peer).suspend(60.0))
        await asked.entered.wait()
        for _ in range(2):
            act.cancel()
            await turns()
            assert not act.done()
        asked.go.set()
        with pytest.raises(asyncio.CancelledError):
            await act
        assert ("send-key" in peer.asked) != sleeps

    asyncio.run(story())


def test_a_guest_that_runs_already_is_not_waited_for() -> None:
    """QEMU tells of no RESUME then."""
    assert asyncio.run(LiveQemu(Peer()).cont()) == 0.0

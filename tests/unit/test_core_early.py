# SPDX-License-Identifier: GPL-2.0-or-later
"""After a kexec guests go on before the host's services are there; each waits for what is its own, and for nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import SaveRequest
from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, Unit
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from cpr_agent.errors import QemuFailed
from tests.bench import Bench, ended
from tests.fakes import AgentKilled, Gate

NAMES = ("web1", "web2")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two guests that a kexec has saved, in the new boot; no agent has started there."""
    bench = Bench(tmp_path)
    for name in NAMES:
        bench.define(name, bench.define_device(name), autostart=True, on_lost_memory="cold-start")

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    bench.runner.started.clear()
    bench.run(until_kexec)
    return bench


async def until_kexec(manager: Manager) -> None:
    manager.upgrade(UpgradeRequest())
    kexec = manager.ports.kexec
    await kexec.started.wait()  # type: ignore[attr-defined]  # the fake's


def early_job(manager: Manager) -> Job:
    (job,) = manager.jobs.current.values()
    assert job.kind == "load-early"
    return job


async def all_early(manager: Manager) -> Job:
    return await ended(manager, early_job(manager))


async def services(manager: Manager) -> Job:
    """What cpr-load.service asks for."""
    return await ended(manager, manager.load_and_start_all())


def running(bench: Bench) -> set[str]:
    return {name for name, qemu in bench.runner.qemus.items() if qemu.status == "running"}


def assert_unbroken(bench: Bench) -> None:
    assert running(bench) == set(NAMES)
    assert bench.runner.violations == []
    assert sorted(bench.runner.started) == [(name, "load") for name in NAMES], "each was loaded once"
    assert bench.host.boot > 1


def mount(bench: Bench, name: str, where: Path) -> None:
    """A mount that the boot is still about to make."""
    bench.units.there[name] = Unit(name=name, mount_point=str(where), active_state="inactive")


async def until_it_waits(bench: Bench, manager: Manager) -> tuple[Gate, Job]:
    """For a mount; the gate lets that come."""
    gate = bench.units.gate = Gate()
    job = early_job(manager)
    await gate.entered.wait()
    return gate, job


def test_guests_run_before_anybody_asks_for_them_and_the_upgrade_ends_with_the_services(bench: Bench) -> None:
    bench.reboot()

    async def story(manager: Manager) -> None:
        assert (await all_early(manager)).state is JobState.DONE
        assert running(bench) == set(NAMES)
        assert manager.ledger.phase is Phase.LOADING
        assert (await services(manager)).result == "nothing to do"
        assert manager.ledger.current
        assert (manager.ledger.phase, manager.ledger.current.loaded) == (Phase.DONE, NAMES)

    bench.run(story, early=True)
    assert_unbroken(bench)


def test_after_a_boot_that_was_no_kexec_nothing_is_loaded_early(bench: Bench) -> None:
    bench.kexec.under_way = None
    bench.reboot()

    async def story(manager: Manager) -> None:
        assert manager.ledger.phase is Phase.BOOTED
        assert not manager.jobs.current
        assert not bench.runner.qemus
        await services(manager)

    bench.run(story, early=True)
    assert_unbroken(bench)


def test_a_mount_that_one_guest_needs_holds_no_other_guest_and_is_waited_for(bench: Bench) -> None:
    bench.reboot()
    mount(bench, "log.mount", bench.root / "log")  # where the logs of both are

    async def story(manager: Manager) -> None:
        gate, job = await until_it_waits(bench, manager)
        assert not bench.runner.qemus
        gate.go.set()
        await ended(manager, job)

    bench.run(story, early=True)
    assert ("start", "log.mount") in bench.units.acts
    assert_unbroken(bench)


def test_the_load_of_all_ends_the_wait_for_what_never_comes(bench: Bench) -> None:
    """The guest is loaded then, or held with its reason: as if there were no early load."""
    bench.reboot()
    mount(bench, "log.mount", bench.root / "log")

    async def story(manager: Manager) -> None:
        _, job = await until_it_waits(bench, manager)
        assert (await services(manager)).result == "done"
        assert job.id not in manager.jobs.current

    bench.run(story, early=True)
    assert_unbroken(bench)


def test_a_kexec_does_not_wait_for_what_never_comes(bench: Bench) -> None:
    """systemd gives the save ten minutes, and would shut all guests down after them. Those that waited stay saved."""
    bench.reboot()
    mount(bench, "log.mount", bench.root / "log")

    async def story(manager: Manager) -> None:
        _, job = await until_it_waits(bench, manager)
        bench.kexec.under_way = Survives.KEXEC
        assert (await ended(manager, manager.before_kexec())).state is JobState.DONE
        assert job.id not in manager.jobs.current

    bench.run(story, early=True)
    assert not bench.runner.started
    del bench.units.there["log.mount"]
    bench.reboot()
    bench.run(services)
    assert_unbroken(bench)


def test_a_mount_that_fails_leaves_its_guest_to_the_load_of_all(bench: Bench) -> None:
    bench.reboot()
    mount(bench, "log.mount", bench.root / "log")
    bench.units.failing["start", "log.mount"] = "log.mount: systemd says dependency"

    async def story(manager: Manager) -> None:
        await all_early(manager)
        assert not bench.runner.qemus
        await services(manager)

    bench.run(story, early=True)
    assert_unbroken(bench)


def test_lost_memory_is_no_reason_to_start_a_guest_afresh_before_the_services_are_there(bench: Bench) -> None:
    """Its device may still come; and what is not there yet holds no guest."""
    bench.reboot()
    bench.devices.take_away("uuid-of-web2")

    async def story(manager: Manager) -> None:
        await all_early(manager)
        assert running(bench) == {"web1"}
        assert not manager.vm("web2").held()
        bench.devices.bring_back()
        await services(manager)

    bench.run(story, early=True)
    assert_unbroken(bench)


def test_one_that_fails_early_holds_no_other_and_is_tried_again_with_the_services(bench: Bench) -> None:
    bench.reboot()
    bench.runner.faults["web2", "load"] = QemuFailed("a tap device is not there", vm="web2")

    async def story(manager: Manager) -> None:
        assert (await all_early(manager)).state is JobState.FAILED
        assert running(bench) == {"web1"}
        bench.runner.faults.clear()
        assert (await services(manager)).result == "done"
        assert manager.ledger.phase is Phase.DONE

    bench.run(story, early=True)
    assert running(bench) == set(NAMES)
    assert bench.runner.violations == []
    assert [kind for _, kind in bench.runner.started] == ["load"] * 3


@pytest.mark.parametrize(
    "point", ["before load-begin", "after load-begin", "before resume", "after resume", "after consume"]
)
def test_an_agent_that_is_killed_three_times_loads_no_guest_twice(bench: Bench, point: str) -> None:
    bench.reboot()
    for _ in range(3):
        bench.runner.die_at = point
        with contextlib.suppress(AgentKilled):
            bench.run(lambda manager: manager.jobs.drain(20), early=True)
        bench.runner.die_at = ""
    bench.run(services)
    assert running(bench) == set(NAMES)
    assert bench.runner.violations == []
    for name in NAMES:
        assert bench.qemu(name).count == bench.runner.counts[name]
        assert bench.records().count("resumed") == 2


def test_what_this_kexec_has_not_saved_waits_for_the_services(tmp_path: Path) -> None:
    """A guest that an admin has saved by hand: nobody counts its seconds."""
    bench = Bench(tmp_path)
    for name in NAMES:
        bench.define(name, bench.define_device(name))

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()
        await manager.vm("web2").save(SaveRequest(need=Survives.KEXEC))

    bench.run(start)
    bench.runner.started.clear()
    bench.run(until_kexec)
    bench.reboot()

    async def story(manager: Manager) -> None:
        await all_early(manager)
        assert running(bench) == {"web1"}
        await services(manager)

    bench.run(story, early=True)
    assert_unbroken(bench)

# SPDX-License-Identifier: GPL-2.0-or-later
"""All VMs at once: all are saved or none is, and the most pause-sensitive guests wait the least."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.listener import Listener
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, VmState
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.vm import Vm
from cpr_agent.errors import Busy, LoadFailed, QemuFailed, QemuRefused, SaveFailed, WrongState
from tests.bench import Bench, ended
from tests.fakes import Gate

NAMES = ("first", "middle", "last")
ORDERS = {"first": 1, "middle": 50, "last": 200}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Three VMs that run on dax devices; "first" is to pause the least."""
    bench = Bench(tmp_path)
    for name in NAMES:
        bench.define(name, bench.define_device(name), order=ORDERS[name])
    bench.run(lambda manager: start(manager, *NAMES))
    bench.runner.started.clear()
    return bench


async def start(manager: Manager, *names: str) -> None:
    for name in names:
        await manager.vm(name).start()


async def save_all(manager: Manager) -> Job:
    return await ended(manager, manager.save_all(Survives.KEXEC))


async def load_all(manager: Manager) -> Job:
    return await ended(manager, manager.load_and_start_all())


def statuses(bench: Bench) -> dict[str, str]:
    return {name: qemu.status for name, qemu in bench.runner.qemus.items()}


def journal(bench: Bench, *events: str) -> list[str]:
    """VMs in the order in which these events were journaled."""
    return [str(record["vm"]) for record in bench.journal() if record["event"] in events]


def test_low_orders_are_saved_last_and_loaded_first(bench: Bench) -> None:
    assert bench.run(save_all).result == "done"
    assert journal(bench, "saved") == ["last", "middle", "first"]
    for name in NAMES:
        bench.runner.end(name)
    assert bench.run(load_all).result == "done"
    assert journal(bench, "resumed") == ["first", "middle", "last"]
    assert set(statuses(bench).values()) == {"running"}
    assert bench.runner.violations == []


@pytest.mark.parametrize("asked", NAMES)
def test_nothing_is_asked_any_more_once_the_first_guest_stops(bench: Bench, asked: str) -> None:
    """Not of a guest of another order either."""
    gate = bench.runner.gates[asked, "inventory"] = Gate()

    async def save(manager: Manager) -> Job:
        job = manager.save_all(Survives.KEXEC)
        await gate.entered.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert set(statuses(bench).values()) == {"running"}
        assert journal(bench, "save-begin") == []
        gate.go.set()
        return await ended(manager, job)

    assert bench.run(save).result == "done"
    assert journal(bench, "save-begin") == ["last", "middle", "first"]


@pytest.mark.parametrize("failing", NAMES)
def test_one_that_has_no_answer_in_the_end_stops_no_guest_of_any_order(bench: Bench, failing: str) -> None:
    """The question that its check has answered, asked once more right before the save."""
    bench.runner.at["before upgrade-saving"] = lambda: bench.runner.faults.update(
        {(failing, "inventory"): QemuFailed("its QEMU does not answer", vm=failing)}
    )
    job = bench.run(save_all)
    assert f"VM {failing}: its QEMU does not answer" in job.result
    assert journal(bench, "save-begin") == []
    assert statuses(bench) == dict.fromkeys(NAMES, "running")
    assert all("manifest.json" not in bench.files(name) for name in NAMES)


def test_a_guest_that_has_to_sleep_does_so_when_its_own_group_is_saved(bench: Bench) -> None:
    bench.runner.vfio["first"] = ["a card of the host"]
    asleep_when: list[dict[str, str]] = []
    gate = bench.runner.gates["first", "after-suspend"] = Gate()

    async def save(manager: Manager) -> Job:
        job = manager.save_all(Survives.KEXEC)
        await gate.entered.wait()
        asleep_when.append(statuses(bench))
        gate.go.set()
        return await ended(manager, job)

    assert bench.run(save).result == "done"
    assert asleep_when == [{"last": "postmigrate", "middle": "postmigrate", "first": "suspended"}]


@pytest.mark.parametrize("failing", NAMES)
def test_one_that_can_not_be_saved_keeps_all_running(bench: Bench, failing: str) -> None:
    bench.runner.faults[failing, "save"] = SaveFailed("no room", vm=failing)
    old = dict(bench.runner.qemus)
    job = bench.run(save_all)
    assert job.state is JobState.FAILED
    assert f"VM {failing}: could not be saved: no room" in job.result
    assert statuses(bench) == dict.fromkeys(NAMES, "running")
    assert bench.runner.qemus == old
    assert all("manifest.json" not in bench.files(name) for name in NAMES)


def test_one_that_can_not_be_resumed_either_is_named(bench: Bench) -> None:
    bench.runner.faults["first", "save"] = SaveFailed("no room", vm="first")
    bench.runner.faults["last", "cont"] = QemuRefused("its disk is locked", vm="last")
    job = bench.run(save_all)
    assert "VM first: could not be saved: no room" in job.result
    assert "but not VM last: could not be resumed: its disk is locked. The guest stands, whole, in its QEMU" in job.result
    assert statuses(bench) == {"first": "running", "middle": "running", "last": "postmigrate"}


@pytest.mark.parametrize("waiting", NAMES)
def test_a_cancelled_save_of_all_resumes_all(bench: Bench, waiting: str) -> None:
    gate = bench.runner.gates[waiting, "save"] = Gate()

    async def cancel(manager: Manager) -> Job:
        job = manager.save_all(Survives.KEXEC)
        await gate.entered.wait()
        manager.jobs.cancel(job.id)
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert statuses(bench) == dict.fromkeys(NAMES, "running")
    assert all("manifest.json" not in bench.files(name) for name in NAMES)


def test_a_save_that_is_cancelled_twice_still_resumes_all(bench: Bench) -> None:
    save_gate = bench.runner.gates["first", "save"] = Gate()
    cont_gate = bench.runner.gates["last", "cont"] = Gate()

    async def cancel_twice(manager: Manager) -> Job:
        job = manager.save_all(Survives.KEXEC)
        await save_gate.entered.wait()
        manager.jobs.cancel(job.id)
        await cont_gate.entered.wait()
        with pytest.raises(WrongState, match="can't be cancelled any more: rolling back"):
            manager.jobs.cancel(job.id)
        cont_gate.go.set()
        return await ended(manager, job)

    assert bench.run(cancel_twice).state is JobState.CANCELLED
    assert statuses(bench) == dict.fromkeys(NAMES, "running")


async def phase(manager: Manager) -> tuple[str, str]:
    current = manager.ledger.require_current()
    return current.phase, current.reason


def test_a_load_that_is_cancelled_keeps_the_checkpoints(bench: Bench) -> None:
    bench.run(save_all)
    gate = bench.runner.gates["middle", "load"] = Gate()

    async def cancel(manager: Manager) -> Job:
        job = manager.load_all()
        await gate.entered.wait()
        manager.jobs.cancel(job.id)
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert statuses(bench) == {"first": "running", "last": "postmigrate"}
    bench.runner.gates.clear()
    assert bench.run(phase) == (Phase.HELD, "its load was cancelled")
    assert bench.run(load_all).result == "done"  # no agent goes on with what an admin has cancelled
    assert statuses(bench) == dict.fromkeys(NAMES, "running")
    assert bench.runner.violations == []


def test_one_that_can_not_be_loaded_does_not_stop_the_others(bench: Bench) -> None:
    bench.run(save_all)
    bench.runner.faults["first", "load"] = LoadFailed("no", vm="first")
    job = bench.run(load_all)
    assert job.state is JobState.FAILED
    assert "VM first: could not be loaded: no" in job.result
    assert statuses(bench) == {"middle": "running", "last": "running"}
    assert bench.files("first") == ["manifest.json", "vmstate"]


def test_nothing_to_do_is_no_failure(bench: Bench) -> None:
    """Everybody is saved, or runs already: the job is done, and says what it did not find."""
    bench.run(save_all)
    for act, what in ((save_all, "no VM has a live guest that is not saved yet"), (load_all, ""), (load_all, "no VM has")):
        job = bench.run(act)
        assert job.state is JobState.DONE
        assert (job.result == "done") == (what == ""), job
        assert what in str(job.error)


def test_a_refresh_of_no_guest_is_nothing_to_do(bench: Bench) -> None:
    async def refresh(manager: Manager) -> Job:
        return await ended(manager, manager.refresh_all())

    bench.run(save_all)
    job = bench.run(refresh)
    assert (job.state, job.result) == (JobState.DONE, "nothing to do")


def test_ram_that_a_kexec_erases_stops_no_guest(bench: Bench) -> None:
    bench.define("volatile")
    bench.run(lambda manager: start(manager, "volatile"))
    job = bench.run(save_all)
    assert f"{bench.root}/volatile.ram" in job.result
    assert "does not survive a kexec" in job.result
    assert statuses(bench) == dict.fromkeys((*NAMES, "volatile"), "running")


def test_a_guest_that_is_saved_in_volatile_ram_stops_no_other(bench: Bench) -> None:
    bench.define("volatile")
    bench.run(lambda manager: start(manager, "volatile"))

    async def save_both_ways(manager: Manager) -> Job:
        await manager.vm("volatile").save(SaveRequest())
        return await save_all(manager)

    job = bench.run(save_both_ways)
    assert "VM volatile: is saved already, in RAM that does not survive a kexec" in job.result
    assert statuses(bench) == {**dict.fromkeys(NAMES, "running"), "volatile": "postmigrate"}


def test_a_qemu_that_does_not_answer_stops_no_guest(bench: Bench) -> None:
    bench.runner.faults["middle", "run_state"] = QemuFailed("no answer", vm="middle")
    job = bench.run(save_all)
    assert "VM middle: can't be saved: its QEMU does not answer" in job.result
    assert journal(bench, "save-begin") == []


@pytest.mark.parametrize("status", ["postmigrate", "io-error", "internal-error", "guest-panicked", "prelaunch"])
def test_a_guest_that_nobody_could_save_stops_no_other(bench: Bench, status: str) -> None:
    """It has a live QEMU, which a kexec would end; only the admin can say that it is not worth anything."""
    bench.qemu("middle").status = status
    job = bench.run(save_all)
    assert job.state is JobState.FAILED
    assert "middle" in job.result
    assert status in job.result
    assert journal(bench, "save-begin") == []


def test_a_guest_that_has_shut_itself_down_is_no_obstacle(bench: Bench) -> None:
    bench.qemu("middle").status = "shutdown"
    assert bench.run(save_all).result == "done"


def test_what_is_saved_already_is_part_of_all(bench: Bench) -> None:
    async def save_one_then_all(manager: Manager) -> Job:
        await manager.vm("middle").save(SaveRequest())
        return await save_all(manager)

    assert bench.run(save_one_then_all).result == "done"
    assert statuses(bench) == dict.fromkeys(NAMES, "postmigrate")


def test_two_loads_of_all_do_not_meet(bench: Bench) -> None:
    bench.run(save_all)

    async def thrice(manager: Manager) -> list[Job]:
        """The last one as cpr-load.service asks for it."""
        jobs = [manager.load_all(), manager.load_all(), manager.load_and_start_all()]
        await manager.jobs.drain(10)
        return jobs

    first, second, last = bench.run(thrice)
    assert (first.result, last.result) == ("done", "nothing to do")
    assert isinstance(second.error, Busy)
    assert sorted(bench.runner.started) == sorted((name, "load") for name in NAMES)


def test_a_reload_tells_of_a_definition_that_has_changed(bench: Bench) -> None:
    """Its VM is in the state that it was in, and has another Description, Autostart or DefinitionState on the bus."""
    told: list[tuple[str, str]] = []

    class Watching(Listener):
        def vm_changed(self, vm: Vm) -> None:
            told.append((vm.name, vm.definition_state))

    async def change(manager: Manager) -> None:
        manager.listeners.add(Watching())
        bench.define("first", "uuid:uuid-of-first", order=ORDERS["first"], autostart=True)
        await manager.reload()

    bench.run(change)
    assert ("first", "changed") in told


def test_a_job_tells_of_each_of_its_guests(bench: Bench) -> None:
    """Waiting, under way, done; and its progress is that of its guests."""
    seen: dict[str, list[str]] = {}
    progress: list[float] = []

    class Watching(Listener):
        def job_changed(self, job: Job) -> None:
            for vm, guest in job.guests.items():
                steps = seen.setdefault(vm, [])
                if steps[-1:] != [guest.step]:
                    steps.append(str(guest.step))
            progress.append(job.progress)

    async def there_and_back(manager: Manager) -> Job:
        manager.listeners.add(Watching())
        await save_all(manager)
        return await load_all(manager)

    job = bench.run(there_and_back)
    assert set(seen) == set(NAMES)
    assert all(
        steps == [*("waiting", "preparing", "saving", "saved"), "waiting", "loading", "loaded"] for steps in seen.values()
    )
    assert {round(one, 2) for one in progress} >= {0.0, 0.33, 0.67, 1.0}
    assert job.started_at <= min(guest.since for guest in job.guests.values()) <= job.ended_at


def test_a_job_names_each_guest_that_was_refused_or_failed(bench: Bench) -> None:
    bench.run(save_all)
    bench.runner.faults["first", "load"] = LoadFailed("no", vm="first")
    failed = bench.run(load_all)
    assert {vm: str(guest.step) for vm, guest in failed.guests.items()} == {
        **dict.fromkeys(NAMES, "loaded"),
        "first": "failed",
    }
    assert "VM first: could not be loaded: no" in failed.guests["first"].error
    del bench.runner.faults["first", "load"]
    bench.run(load_all)
    bench.runner.faults["last", "run_state"] = QemuFailed("mute", vm="last")
    refused = bench.run(save_all)
    assert {vm: str(guest.step) for vm, guest in refused.guests.items()} == {"last": "refused"}


@pytest.mark.parametrize("act", ["start", "load"])
def test_a_load_of_all_waits_for_whoever_just_then_wants_something_of_a_vm(bench: Bench, act: str) -> None:
    """A call that is refused, or one that loads the guest, keeps it from nothing."""

    async def storm(manager: Manager) -> Job:
        await save_all(manager)
        vm = manager.vm("middle")
        comes_to_middle = asyncio.Event()

        class AtMiddle(Listener):
            def job_changed(self, job: Job) -> None:
                if job.step == "loading middle":
                    comes_to_middle.set()

        manager.listeners.add(AtMiddle())
        before = bench.runner.gates["first", "load"] = Gate()
        job = manager.load_all()
        await before.entered.wait()
        meanwhile = bench.runner.gates["middle", "run_state"] = Gate()
        other = asyncio.ensure_future(vm.start() if act == "start" else vm.load(LoadRequest()))
        await meanwhile.entered.wait()
        before.go.set()
        await comes_to_middle.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        meanwhile.go.set()
        await asyncio.gather(other, return_exceptions=True)
        return await ended(manager, job)

    assert bench.run(storm).result == "done"
    assert {qemu.status for qemu in bench.runner.qemus.values()} == {"running"}
    assert bench.runner.violations == []


def test_autostart_starts_what_waits_for_nothing(bench: Bench) -> None:
    bench.define("fresh", autostart=True)
    bench.define("manual")
    bench.run(save_all)
    assert bench.run(load_all).result == "done"
    assert ("fresh", "start") in bench.runner.started
    assert "manual" not in bench.runner.qemus


def test_an_agent_that_is_told_to_stop_finishes_what_it_is_doing(bench: Bench) -> None:
    gate = bench.runner.gates["first", "save"] = Gate()

    async def close_meanwhile(manager: Manager) -> Job:
        job = manager.save_all(Survives.KEXEC)
        await gate.entered.wait()
        closing = asyncio.ensure_future(manager.close())
        gate.go.set()
        await closing
        return job

    assert bench.run(close_meanwhile).result == "done"
    assert statuses(bench) == dict.fromkeys(NAMES, "postmigrate")


def test_an_unused_vm_is_no_part_of_it(bench: Bench) -> None:
    bench.define("idle")
    assert bench.run(save_all).result == "done"

    async def state(manager: Manager) -> VmState:
        return manager.vm("idle").state

    assert bench.run(state) is VmState.STOPPED

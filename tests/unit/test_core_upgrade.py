# SPDX-License-Identifier: GPL-2.0-or-later
"""The upgrade as a transaction: what it does when all is well, and what it takes back when it is not."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Difference, Finding, Kernel, Policy, Survives, VmState
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.upgrade.ledger import IN_FLIGHT, NEXT, OVER, TAKEN_BACK, Kind, Phase
from cpr_agent.core.upgrade.preflight import UpgradeRequest, predict
from cpr_agent.errors import Busy, CprError, InvalidArgument, KernelRefused, QemuFailed, SaveFailed, WrongState
from cpr_agent.report.story import story_of
from tests.bench import Bench, ended
from tests.fakes import AgentKilled, Gate

NAMES = ("web1", "web2", "web3")
Act = Callable[[Manager], Awaitable[object]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Three VMs that run on dax devices."""
    bench = Bench(tmp_path)
    for name in NAMES:
        bench.define(name, bench.define_device(name))

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    bench.runner.started.clear()
    return bench


def until_kexec(bench: Bench, request: UpgradeRequest | None = None) -> Callable[[Manager], Awaitable[Job]]:
    """An upgrade, up to where systemd takes the host down; the agent ends then."""

    async def act(manager: Manager) -> Job:
        job = manager.upgrade(request or UpgradeRequest())
        waits = {asyncio.ensure_future(bench.kexec.started.wait()), asyncio.ensure_future(ended(manager, job))}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return job

    return act


def refused_upgrade(request: UpgradeRequest | None = None) -> Callable[[Manager], Awaitable[Job]]:
    async def act(manager: Manager) -> Job:
        return await ended(manager, manager.upgrade(request or UpgradeRequest()))

    return act


async def load_all(manager: Manager) -> Job:
    return await ended(manager, manager.load_all())


async def look(manager: Manager) -> dict[str, VmState]:
    return {name: vm.state for name, vm in manager.vms.items()}


def phases(bench: Bench) -> list[str]:
    return [event.removeprefix("upgrade-") for event in bench.records() if event.startswith("upgrade-")]


def statuses(bench: Bench) -> set[str]:
    return {qemu.status for qemu in bench.runner.qemus.values()}


def assert_all_run(bench: Bench, *, booted: tuple[str, ...] = ()) -> None:
    """Each guest runs, from where it was; none was booted but these."""
    assert bench.runner.violations == []
    assert set(bench.runner.qemus) == set(NAMES)
    assert statuses(bench) == {"running"}
    assert sorted(name for name, kind in bench.runner.started if kind == "start") == sorted(booted)
    for name in NAMES:
        assert bench.qemu(name).count == bench.runner.counts[name]
        assert "manifest.json" not in bench.files(name)
    assert not bench.kexec.promised
    assert not bench.kexec.ended_at_once
    assert bench.kernels.is_loaded is None


def test_all_guests_go_through_into_the_newest_kernel(bench: Bench) -> None:
    job = bench.run(until_kexec(bench))
    assert (job.state, job.step, job.cancellable) == (JobState.CANCELLED, "the host restarts", False), job
    assert bench.kernels.is_loaded == ("6.12.2", bench.kernels.line)
    assert bench.kexec.promised
    assert bench.kexec.ended_at_once == set(NAMES)
    assert statuses(bench) == {"postmigrate"}
    bench.reboot()
    assert set(bench.run(look).values()) == {VmState.SAVED}
    assert bench.run(load_all).result == "nothing to do"  # the second agent of this boot began by itself
    assert phases(bench) == ["checking", "saving", "saved", "committing", "booted", "loading", "done"]
    assert_all_run(bench)


def test_each_phase_is_durable_before_it_is_acted_on(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.reboot()
    bench.run(load_all)
    events = bench.records()
    assert events.index("upgrade-saving") < events.index("save-begin")
    assert events.index("upgrade-saved") > max(n for n, event in enumerate(events) if event == "saved")
    assert events.index("upgrade-booted") < events.index("upgrade-loading") < events.index("load-begin")


@pytest.mark.parametrize("failing", NAMES)
def test_one_that_cannot_be_saved_keeps_the_host_where_it_is(bench: Bench, failing: str) -> None:
    bench.runner.faults[failing, "save"] = SaveFailed("no room", vm=failing)
    job = bench.run(refused_upgrade())
    assert f"VM {failing}: could not be saved: no room" in job.result
    assert phases(bench) == ["checking", "saving", "rolling-back", "rolled-back"]
    assert not bench.kexec.started.is_set()
    assert_all_run(bench)


def test_a_qemu_that_dies_while_it_saves_costs_no_other_guest(bench: Bench) -> None:
    gate = bench.runner.gates["web2", "save"] = Gate()

    async def die(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        bench.runner.end("web2")
        bench.runner.faults["web2", "save"] = QemuFailed("QEMU is gone", vm="web2")
        gate.go.set()
        return await ended(manager, job)

    job = bench.run(die)
    assert "VM web2" in job.result
    assert statuses(bench) == {"running"}
    assert set(bench.runner.qemus) == {"web1", "web3"}
    assert bench.kernels.is_loaded is None


def test_a_state_that_does_not_read_back_as_it_was_written_takes_all_back(bench: Bench) -> None:
    async def spoil(manager: Manager) -> Job:
        store = manager.ports.store
        verify = store.verify

        def damaged(manifest: object) -> None:
            path = Path(manifest.vmstate.path)  # type: ignore[attr-defined]
            path.write_bytes(path.read_bytes()[:-1])
            verify(manifest)  # type: ignore[arg-type]

        store.verify = damaged  # type: ignore[method-assign]
        return await ended(manager, manager.upgrade(UpgradeRequest()))

    assert "is not the state that was saved" in bench.run(spoil).result
    assert_all_run(bench)


@pytest.mark.parametrize("place", ["findings", "plan", "load", "blocked"])
def test_what_stops_an_upgrade_is_found_before_a_guest_stops(bench: Bench, place: str) -> None:
    wrong = Finding(severity="error", code="x", what="the moon is full", remedy="wait a week")
    match place:
        case "findings":
            bench.kernels.wrong = [wrong]
        case "plan":
            bench.kexec.wrong = [wrong]
        case "load":
            bench.kernels.refusal = "the moon is full"
        case "blocked":
            bench.runner.blocked["web3"] = ["the moon is full"]
    old = dict(bench.runner.qemus)
    job = bench.run(refused_upgrade())
    assert job.state is JobState.FAILED
    assert "the moon is full" in job.result
    assert phases(bench) == ["checking", "refused"]
    assert bench.runner.qemus == old
    assert_all_run(bench)


def test_a_command_line_that_drops_the_memory_is_refused_with_the_difference(bench: Bench) -> None:
    job = bench.run(refused_upgrade(UpgradeRequest(append="root=/dev/sda quiet")))
    assert "lacks memmap=4G!8G" in job.result
    assert "--reuse-cmdline" in job.result
    assert_all_run(bench)


def test_words_can_be_added_to_the_command_line(bench: Bench) -> None:
    bench.run(until_kexec(bench, UpgradeRequest(append="debug", reuse_cmdline=True)))
    assert bench.kernels.is_loaded == ("6.12.2", f"{bench.kernels.line} debug")


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (UpgradeRequest(kernel="5.0"), KernelRefused, "kernel 5.0 is not installed"),
        (UpgradeRequest(back=True), KernelRefused, "no earlier upgrade"),
        (UpgradeRequest(back=True, drill=True), InvalidArgument, "exclude each other"),
        (UpgradeRequest(initrd="/boot/initrd.img"), InvalidArgument, "without a kernel image"),
        (UpgradeRequest(kernel_image="/etc/passwd"), InvalidArgument, "not below a directory"),
        (UpgradeRequest(kernel_image="/boot/../etc/passwd"), InvalidArgument, "not below a directory"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_at_once(
    bench: Bench, request_: UpgradeRequest, error: type, words: str
) -> None:
    async def ask(manager: Manager) -> None:
        with pytest.raises(error, match=words):
            manager.upgrade(request_)
        assert manager.jobs.current == {}

    bench.run(ask)


def test_a_dry_run_stops_no_guest_and_leaves_no_kernel(bench: Bench) -> None:
    old = dict(bench.runner.qemus)
    job = bench.run(refused_upgrade(UpgradeRequest(dry_run=True)))
    assert job.result == "done"
    assert phases(bench) == ["checking", "checked"]
    assert bench.runner.qemus == old
    assert_all_run(bench)


def test_a_dry_run_leaves_a_kernel_that_somebody_loaded(bench: Bench) -> None:
    bench.kernels.is_loaded = ("6.12.9", "theirs")
    assert bench.run(refused_upgrade(UpgradeRequest(dry_run=True))).result == "done"
    assert bench.kernels.is_loaded == ("6.12.9", "theirs")


def test_a_kexec_that_is_called_off_is_taken_back(bench: Bench) -> None:
    async def call_off(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await bench.kexec.started.wait()
        bench.kexec.fail("canceled")
        return await ended(manager, job)

    job = bench.run(call_off)
    assert "the kexec did not happen: canceled" in job.result
    assert phases(bench)[-3:] == ["committing", "rolling-back", "rolled-back"]
    assert bench.kexec.brought_back == 1
    assert_all_run(bench)


def test_an_agent_that_comes_back_after_a_shutdown_that_was_called_off_resumes_all(bench: Bench) -> None:
    """The gate's case: the VMs were stopped already, and so was the agent."""
    bench.run(until_kexec(bench))
    for name in NAMES:
        bench.runner.end(name)
    bench.kexec.fail()
    bench.run(look)
    assert phases(bench)[-2:] == ["rolling-back", "rolled-back"]
    assert_all_run(bench)


def test_an_agent_that_is_restarted_while_the_kexec_is_under_way_leaves_it_alone(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    assert set(bench.run(look).values()) == {VmState.SAVED}
    assert bench.kexec.promised
    bench.reboot()
    bench.run(load_all)
    assert_all_run(bench)


@pytest.mark.parametrize("act", ["start", "load", "resume", "discard"])
def test_between_commit_and_kexec_no_guest_is_let_run(bench: Bench, act: str) -> None:
    bench.define("web4", bench.define_device("web4"))

    async def meddle(manager: Manager) -> None:
        await until_kexec(bench)(manager)
        vm = manager.vm("web4" if act == "start" else "web1")
        with pytest.raises(Busy, match="on its way into another kernel"):
            await {"start": vm.start, "load": lambda: vm.load(LoadRequest()), "resume": vm.resume, "discard": vm.discard}[
                act
            ]()
        assert "on its way" in (await ended(manager, manager.load_and_start_all())).result
        assert "is under way (committing)" in (await ended(manager, manager.upgrade(UpgradeRequest()))).result

    bench.run(meddle)
    assert bench.kexec.promised


def test_two_upgrades_at_once(bench: Bench) -> None:
    """The second is refused, whichever act it is, and the first goes on as if there were none."""

    async def both(manager: Manager) -> None:
        manager.upgrade(UpgradeRequest())
        for other in (
            manager.upgrade(UpgradeRequest()),
            manager.save_all(Survives.KEXEC),
            manager.upgrade(UpgradeRequest()),
        ):
            await other.parked.wait()
            assert isinstance(other.error, Busy), other
        await bench.kexec.started.wait()

    bench.run(both)
    assert bench.kexec.promised
    assert phases(bench)[-1] == "committing"
    bench.reboot()
    bench.run(load_all)
    assert_all_run(bench)


def test_a_guest_that_somebody_lets_run_after_the_commit_stops_the_kexec(bench: Bench) -> None:
    async def by_hand(manager: Manager) -> None:
        await until_kexec(bench)(manager)
        bench.qemu("web1").by_hand("running")
        await manager.vm("web1").refresh()

    bench.run(by_hand)
    assert not bench.kexec.promised


def test_a_guest_that_is_started_during_the_save_is_found_before_the_commit(bench: Bench) -> None:
    bench.define("web4", bench.define_device("web4"))
    gate = bench.runner.gates["web3", "save"] = Gate()

    async def meanwhile(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        await manager.vm("web4").start()
        gate.go.set()
        return await ended(manager, job)

    assert "not saved: web4 (running)" in bench.run(meanwhile).result
    assert statuses(bench) == {"running"}
    assert len(bench.runner.qemus) == 4


def test_a_kernel_that_is_unloaded_meanwhile_is_noticed(bench: Bench) -> None:
    gate = bench.runner.gates["web3", "save"] = Gate()

    async def meanwhile(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        bench.kernels.is_loaded = None
        gate.go.set()
        return await ended(manager, job)

    assert "not loaded any more" in bench.run(meanwhile).result
    assert_all_run(bench)


def test_one_upgrade_at_a_time(bench: Bench) -> None:
    gate = bench.runner.gates["web3", "save"] = Gate()

    async def two(manager: Manager) -> tuple[Job, Job]:
        first = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        second = await ended(manager, manager.upgrade(UpgradeRequest()))
        gate.go.set()
        await bench.kexec.started.wait()
        return first, second

    _, second = bench.run(two)
    assert "guests are just being saved" in second.result


def test_cancel_takes_all_back_until_the_commit(bench: Bench) -> None:
    gate = bench.runner.gates["web3", "save"] = Gate()

    async def cancel(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        manager.jobs.cancel(job.id)
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert_all_run(bench)


def test_cancel_is_refused_after_the_commit(bench: Bench) -> None:
    async def cancel(manager: Manager) -> None:
        job = await until_kexec(bench)(manager)
        with pytest.raises(WrongState, match="can't be cancelled any more: the host restarts"):
            manager.jobs.cancel(job.id)

    bench.run(cancel)
    assert bench.kexec.promised


# -- cancelled, and cancelled again ---------------------------------------------------------------------------------------


def stop_at(bench: Bench, place: str) -> Gate:
    """A gate at which the agent waits once it gets there: at an operation of web2's QEMU, or a port's."""
    gate = Gate()

    async def passing() -> None:
        gate.entered.set()
        await gate.go.wait()

    match place:
        case "kernel loaded":
            load = bench.kernels.load

            async def load_and_wait(kernel: Kernel, command_line: str) -> None:
                await load(kernel, command_line)
                await passing()

            bench.kernels.load = load_and_wait  # type: ignore[method-assign]
        case "kernel unloaded":
            unload = bench.kernels.unload

            async def wait_and_unload() -> None:
                await passing()
                await unload()

            bench.kernels.unload = wait_and_unload  # type: ignore[method-assign]
        case "inhibitor":
            inhibit = bench.kexec.inhibit

            @contextlib.asynccontextmanager
            async def wait_and_inhibit(why: str) -> AsyncIterator[None]:
                await passing()
                async with inhibit(why):
                    yield

            bench.kexec.inhibit = wait_and_inhibit  # type: ignore[method-assign]
        case _:
            bench.runner.gates["web2", place] = gate
    return gate


async def cancel_thrice(job: Job, cancel: Callable[[], object]) -> None:
    """With enough turns of the loop in between for each cancellation to arrive; the job goes on."""
    for _ in range(3):
        cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert job.state is JobState.RUNNING


async def assert_excludes_another(manager: Manager) -> None:
    other = manager.save_all(Survives.KEXEC)
    await other.parked.wait()
    assert isinstance(other.error, Busy), other
    assert "guests are just being saved" in other.result


@pytest.mark.parametrize("place", ["blocked_reasons", "kernel loaded", "inhibitor", "save", "after-save"])
def test_a_job_that_is_cancelled_in_any_phase_leaves_all_as_it_was(bench: Bench, place: str) -> None:
    async def cancel(manager: Manager) -> Job:
        gate = stop_at(bench, place)
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        manager.jobs.cancel(job.id)
        await ended(manager, job)
        gate.go.set()
        return job

    assert bench.run(cancel).state is JobState.CANCELLED
    assert phases(bench)[-1] == ("rolled-back" if "save" in place else "refused")
    assert bench.kexec.inhibited == 0
    assert_all_run(bench)


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (UpgradeRequest(dry_run=True), ""),
        (UpgradeRequest(), "kernel loaded"),
        (UpgradeRequest(), "inhibitor"),
        (UpgradeRequest(), "until_saveable"),
    ],
)
def test_an_unload_that_is_cancelled_again_and_again_ends_before_the_next_upgrade_begins(
    bench: Bench, request_: UpgradeRequest, place: str
) -> None:
    path = bench.definitions / "web2.toml"
    path.write_text(path.read_text().replace("[save]", '[save]\nwhen-blocked = ["wait"]'))

    async def cancel(manager: Manager) -> Job:
        first = stop_at(bench, place) if place else None
        unload = stop_at(bench, "kernel unloaded")
        job = manager.upgrade(request_)
        if first:
            await first.entered.wait()
            manager.jobs.cancel(job.id)
        await unload.entered.wait()
        await cancel_thrice(job, lambda: manager.jobs.cancel(job.id))
        await assert_excludes_another(manager)
        assert bench.kernels.loaded()
        unload.go.set()
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert phases(bench) == ["checking", "refused"]
    assert_all_run(bench)


@pytest.mark.parametrize("act", ["upgrade", "save-all", "rollback"])
def test_a_roll_back_that_is_cancelled_again_and_again_ends_before_the_next_upgrade_begins(bench: Bench, act: str) -> None:
    """Job.Cancel is refused by then; whatever else cancels the job's task finds the rollback as deaf to it."""
    path = bench.definitions / "web2.toml"
    path.write_text(path.read_text().replace("order = 100", "order = 1"))  # the others are saved before it
    acts: dict[str, Callable[[Manager], Job]] = {
        "upgrade": lambda manager: manager.upgrade(UpgradeRequest()),
        "save-all": lambda manager: manager.save_all(Survives.KEXEC),
        "rollback": lambda manager: manager.rollback(),
    }

    async def cancel(manager: Manager) -> Job:
        if act == "rollback":
            await ended(manager, manager.save_all(Survives.KEXEC))
        tasks = asyncio.all_tasks()
        job = acts[act](manager)
        (task,) = asyncio.all_tasks() - tasks
        if act != "rollback":
            save = stop_at(bench, "save")
            await save.entered.wait()
            manager.jobs.cancel(job.id)
        cont = bench.runner.gates["web1", "cont"] = Gate()
        await cont.entered.wait()
        with pytest.raises(WrongState, match="can't be cancelled any more: rolling back"):
            manager.jobs.cancel(job.id)
        await cancel_thrice(job, task.cancel)
        await assert_excludes_another(manager)
        assert bench.qemu("web1").status == "postmigrate"
        cont.go.set()
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert phases(bench)[-2:] == ["rolling-back", "rolled-back"]
    assert_all_run(bench)


def test_a_kernel_without_an_inhibitor_does_not_stay(bench: Bench) -> None:
    @contextlib.asynccontextmanager
    async def refuse(why: str) -> AsyncIterator[None]:
        raise CprError(f"logind allows no inhibitor: {why}")
        yield

    bench.kexec.inhibit = refuse  # type: ignore[method-assign]
    assert "allows no inhibitor" in bench.run(refused_upgrade()).result
    assert phases(bench) == ["checking", "refused"]
    assert_all_run(bench)


# -- guests that a rollback must not let run ------------------------------------------------------------------------------


def saved_then(spoil: Callable[[], None]) -> Callable[[Manager], Awaitable[tuple[Job, tuple[str, ...]]]]:
    """All are saved; ``spoil``; and a rollback by hand, with the failures that the ledger has then."""

    async def act(manager: Manager) -> tuple[Job, tuple[str, ...]]:
        assert (await ended(manager, manager.save_all(Survives.KEXEC))).result == "done"
        spoil()
        job = await ended(manager, manager.rollback())
        return job, manager.ledger.require_current().failures

    return act


def test_a_roll_back_holds_a_guest_whose_ram_was_overwritten_and_resumes_the_others(bench: Bench) -> None:
    def overwrite() -> None:
        with (bench.root / "web2.dax").open("r+b") as ram:
            ram.seek(8192)
            ram.write(b"another guest's")

    job, failures = bench.run(saved_then(overwrite))
    assert job.state is JobState.FAILED
    assert "not every guest could be resumed" in job.result
    assert "he others were resumed (web1, web3), but not VM web2" in job.result
    assert [failure.partition(":")[0] for failure in failures] == ["VM web2"]
    assert {name: qemu.status for name, qemu in bench.runner.qemus.items()} == {
        "web1": "running",
        "web2": "postmigrate",
        "web3": "running",
    }
    assert bench.run(look)["web2"] is VmState.HELD
    assert "manifest.json" in bench.files("web2")


def test_an_agent_that_dies_in_the_middle_of_a_save_takes_a_paused_guest_back_too(bench: Bench) -> None:
    """Its state is stored by the next agent, as part of the same upgrade."""
    for name in ("web1", "web3"):  # saved after it
        path = bench.definitions / f"{name}.toml"
        path.write_text(path.read_text().replace("order = 100", "order = 1"))
    bench.qemu("web2").status = "paused"
    bench.runner.die_at = "before seal"
    with pytest.raises(AgentKilled):
        bench.run(until_kexec(bench))
    bench.runner.die_at = ""
    assert bench.run(drained) == {"web1": VmState.RUNNING, "web2": VmState.PAUSED, "web3": VmState.RUNNING}
    assert phases(bench)[-2:] == ["rolling-back", "rolled-back"]
    assert bench.runner.violations == []


@pytest.mark.parametrize("act", ["start", "resume"])
def test_a_roll_back_waits_for_whoever_just_then_wants_something_of_a_vm(bench: Bench, act: str) -> None:
    """Else any caller, also one whose call is refused, could keep guests stopped."""

    async def storm(manager: Manager) -> Job:
        assert (await ended(manager, manager.save_all(Survives.KEXEC))).result == "done"
        vm = manager.vm("web2")
        gate = bench.runner.gates["web2", "run_state"] = Gate()
        other = asyncio.ensure_future(vm.start() if act == "start" else vm.resume())
        await gate.entered.wait()
        job = manager.rollback()
        for _ in range(50):
            await asyncio.sleep(0)
        gate.go.set()
        await asyncio.gather(other, return_exceptions=True)
        return await ended(manager, job)

    assert bench.run(storm).result == "done"
    assert_all_run(bench)


async def drained(manager: Manager) -> dict[str, VmState]:
    await manager.jobs.drain(10)
    return await look(manager)


def test_a_roll_back_names_a_guest_whose_checkpoint_can_not_be_read_and_resumes_the_others(bench: Bench) -> None:
    def damage() -> None:
        (bench.root / "checkpoints/web2/manifest.json").write_text("{")

    job, failures = bench.run(saved_then(damage))
    assert job.state is JobState.FAILED
    assert "he others were resumed (web1, web3), but not VM web2" in job.result
    assert [failure.partition(":")[0] for failure in failures] == ["VM web2"]
    assert statuses(bench) == {"running", "postmigrate"}
    assert bench.qemu("web2").status == "postmigrate"
    assert "manifest.json" in bench.files("web2")


def test_a_fault_of_the_agents_own_in_one_resume_keeps_no_other_guest_stopped(bench: Bench) -> None:
    bench.runner.faults["web2", "cont"] = RuntimeError("a fault of the agent's own")
    job, failures = bench.run(saved_then(lambda: None))
    assert job.state is JobState.FAILED
    assert failures == ("VM web2: a fault of the agent's own",)
    assert bench.qemu("web1").status == bench.qemu("web3").status == "running"


# -- policies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy.SKIP_UNSAVEABLE, Policy.FORCE])
def test_what_cannot_be_saved_is_shut_down_and_started_again(bench: Bench, policy: Policy) -> None:
    bench.runner.blocked["web2"] = ["it plays the piano"]
    bench.run(until_kexec(bench, UpgradeRequest(policy=policy)))
    assert set(bench.runner.qemus) == bench.kexec.ended_at_once == {"web1", "web3"}
    bench.runner.blocked.clear()
    bench.reboot()
    assert bench.run(load_all).result == "done"
    assert_all_run(bench, booted=("web2",))


def test_a_roll_back_starts_again_what_was_shut_down(bench: Bench) -> None:
    bench.runner.blocked["web2"] = ["it plays the piano"]

    async def call_off(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE))
        await bench.kexec.started.wait()
        bench.kexec.fail()
        return await ended(manager, job)

    assert "started again: web2" in bench.run(call_off).result
    bench.runner.blocked.clear()
    assert_all_run(bench, booted=("web2",))


def test_a_plan_says_first_what_it_would_shut_down(bench: Bench) -> None:
    bench.runner.blocked["web2"] = ["it plays the piano"]

    async def ask(manager: Manager) -> list[Finding]:
        return await manager.plan_findings(manager.plan(UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE)))

    (found,) = [finding for finding in bench.run(ask) if finding.code == "will-be-shut-down"]
    assert (found.severity, found.vm) == ("warning", "web2")
    assert "it plays the piano" in found.what


def test_what_surrounds_the_agent_refuses_an_upgrade_as_a_whole_or_for_one_vm(bench: Bench) -> None:
    def wrong(vm: str) -> Finding:
        return Finding(severity="error", code="libvirt-hook", what="the hook is missing", remedy="mend it", vm=vm)

    bench.surroundings.wrong = [wrong("")]
    said = bench.run(refused_upgrade(UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE))).result
    assert "the hook is missing" in said
    assert_all_run(bench)
    bench.surroundings.wrong = [wrong("web2")]
    assert "web2" in bench.run(refused_upgrade()).result
    assert_all_run(bench)


def test_only_force_ends_a_qemu_that_does_not_answer(bench: Bench) -> None:
    bench.runner.faults["web2", "run_state"] = QemuFailed("no answer", vm="web2")
    assert "does not answer" in bench.run(refused_upgrade(UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE))).result
    bench.run(until_kexec(bench, UpgradeRequest(policy=Policy.FORCE)))
    assert set(bench.runner.qemus) == {"web1", "web3"}
    assert bench.kexec.promised


@pytest.mark.parametrize(
    ("ladder", "refused"),
    [('["shut-down"]', False), ('["wait", "shut-down"]', False), ('["refuse", "shut-down"]', True), ('["wait"]', True)],
)
def test_a_vm_has_a_ladder_of_its_own(bench: Bench, ladder: str, *, refused: bool) -> None:
    path = bench.definitions / "web2.toml"
    path.write_text(path.read_text().replace("[save]", f"[save]\nwhen-blocked = {ladder}"))
    bench.runner.blocked["web2"] = ["it plays the piano"]
    job = bench.run(until_kexec(bench))
    assert ("it plays the piano" in job.result) == refused
    assert bench.kexec.promised != refused


def test_a_blocker_that_goes_away_in_time_is_waited_for(bench: Bench) -> None:
    path = bench.definitions / "web2.toml"
    path.write_text(path.read_text().replace("[save]", '[save]\nwhen-blocked = ["wait"]\nblocked-wait = "5s"'))
    bench.runner.blocked["web2"] = ["it plays the piano"]
    gate = bench.runner.gates["web2", "until_saveable"] = Gate()

    async def finish(manager: Manager) -> None:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        assert statuses(bench) == {"running"}, "nobody is stopped while one is waited for"
        bench.runner.blocked.clear()
        gate.go.set()
        await bench.kexec.started.wait()
        assert job.step == "the host restarts"

    bench.run(finish)


def test_a_late_blocker_takes_all_back(bench: Bench) -> None:
    gate = bench.runner.gates["web2", "save"] = Gate()

    async def block(manager: Manager) -> Job:
        job = manager.upgrade(UpgradeRequest())
        await gate.entered.wait()
        bench.runner.faults["web2", "save"] = SaveFailed("blocked: it plays the piano", vm="web2")
        gate.go.set()
        return await ended(manager, job)

    assert "it plays the piano" in bench.run(block).result
    assert_all_run(bench)


# -- after boot, and back -------------------------------------------------------------------------------------------------


def test_guests_that_the_new_kernel_cannot_load_go_back_to_the_old_one(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.reboot()
    assert bench.host.release == "6.12.2"
    for name in ("web1", "web2"):
        bench.runner.faults[name, "load"] = QemuFailed("this kernel lacks what it needs", vm=name)
    assert "1 of 3 run" in bench.run(load_all).result
    assert phases(bench)[-1] == "held"
    assert bench.files("web1")[0] == "manifest.json"
    bench.run(until_kexec(bench, UpgradeRequest(back=True)))
    assert bench.kernels.is_loaded == ("6.12.1", bench.kernels.line)
    bench.reboot()
    bench.runner.faults.clear()
    assert bench.run(load_all).result == "done"
    assert bench.host.release == "6.12.1"
    assert_all_run(bench)


def test_the_way_back_is_known_after_dry_runs_refusals_and_drills(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.reboot()
    bench.run(load_all)
    assert bench.run(refused_upgrade(UpgradeRequest(dry_run=True))).result == "done"
    bench.runner.blocked["web1"] = ["a blocker"]
    assert "a blocker" in bench.run(refused_upgrade()).result
    bench.runner.blocked.clear()
    bench.run(until_kexec(bench, UpgradeRequest(drill=True)))
    bench.reboot()
    bench.run(load_all)
    bench.run(until_kexec(bench, UpgradeRequest(back=True)))
    assert bench.kernels.is_loaded == ("6.12.1", bench.kernels.line)


async def outcome(manager: Manager) -> tuple[str, str]:
    assert manager.ledger.current
    return manager.ledger.current.phase, manager.ledger.current.reason


def test_another_kernel_than_planned_is_on_record(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.kernels.is_loaded = ("6.12.0", "")
    bench.reboot()
    bench.run(load_all)
    assert bench.run(outcome) == ("done", "the host runs kernel 6.12.0, planned was 6.12.2")
    assert_all_run(bench)


def test_an_upgrade_that_a_power_cut_ended_was_none(bench: Bench) -> None:
    """And how long guests were off then says nothing of how long the next kexec takes."""
    bench.run(until_kexec(bench))
    bench.kexec.under_way = None
    bench.reboot()
    bench.run(load_all)
    assert bench.run(outcome) == ("rolled-back", "the host went down while committing, and was not started by a kexec")
    assert_all_run(bench)

    async def predicted(manager: Manager) -> str:
        await manager.jobs.drain(10)
        (found,) = [f for f in await manager.plan_findings(manager.plan(UpgradeRequest())) if f.code == "predicted-pause"]
        return found.what

    assert "is not known" in bench.run(predicted)


def test_an_upgrade_that_a_power_cut_ends_while_it_loads_is_still_one(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.reboot()
    bench.run(look)
    bench.reboot()
    bench.run(load_all)
    assert bench.run(outcome)[0] == "done"
    assert_all_run(bench)


def test_a_power_cut_in_the_middle_of_a_load_leaves_no_guest_out_of_the_upgrade(bench: Bench) -> None:
    """The next boot loads them all, and starts what was shut down, not just the one whose load was cut off."""
    bench.runner.blocked["web2"] = ["it plays the piano"]
    bench.run(until_kexec(bench, UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE)))
    bench.runner.blocked.clear()
    bench.reboot()
    bench.runner.die_at = "after load-begin"
    with contextlib.suppress(AgentKilled):
        bench.run(load_all)
    bench.runner.die_at = ""
    bench.reboot()
    bench.run(look)
    bench.run(load_all)
    assert_all_run(bench, booted=("web2",))

    async def loaded(manager: Manager) -> tuple[str, ...]:
        assert manager.ledger.current
        return (manager.ledger.current.phase, *manager.ledger.current.loaded)

    assert bench.run(loaded) == ("done", "web1", "web3")


def test_one_guests_load_that_is_finished_after_a_crash_does_not_end_an_upgrade_that_is_held(bench: Bench) -> None:
    bench.run(until_kexec(bench))
    bench.reboot()
    for name in ("web1", "web2"):
        bench.runner.faults[name, "load"] = QemuFailed("this kernel lacks what it needs", vm=name)
    bench.run(load_all)
    del bench.runner.faults["web1", "load"]
    bench.runner.die_at = "after load-begin"
    with contextlib.suppress(AgentKilled):
        bench.run(lambda manager: manager.vm("web1").load(LoadRequest()))
    bench.runner.die_at = ""
    assert bench.run(look) == {"web1": VmState.RUNNING, "web2": VmState.SAVED, "web3": VmState.RUNNING}
    assert bench.run(outcome)[0] == "held"


def test_rollback_has_nothing_to_do_before_and_after(bench: Bench) -> None:
    async def roll_back(manager: Manager) -> Job:
        return await ended(manager, manager.rollback())

    assert bench.run(roll_back).result == "nothing to do"
    bench.run(until_kexec(bench))
    bench.reboot()
    assert "no save that could be taken back" in str(bench.run(roll_back).error)
    bench.run(load_all)
    assert_all_run(bench)


def test_rollback_takes_an_admins_own_save_back(bench: Bench) -> None:
    async def save_and_roll_back(manager: Manager) -> Job:
        assert (await ended(manager, manager.save_all(Survives.KEXEC))).result == "done"
        return await ended(manager, manager.rollback())

    assert bench.run(save_and_roll_back).result == "done"
    assert_all_run(bench)


def test_a_save_by_hand_outlives_the_agent(bench: Bench) -> None:
    async def save(manager: Manager) -> Job:
        return await ended(manager, manager.save_all(Survives.KEXEC))

    bench.run(save)
    assert set(bench.run(look).values()) == {VmState.SAVED}
    bench.run(load_all)
    assert_all_run(bench)


# -- somebody types `systemctl kexec` -------------------------------------------------------------------------------------


async def before_kexec(manager: Manager) -> Job:
    return await ended(manager, manager.before_kexec())


def test_a_plain_kexec_is_saved_for(bench: Bench) -> None:
    bench.kexec.under_way = Survives.KEXEC
    assert bench.run(before_kexec).result == "done"
    assert bench.kexec.promised
    bench.reboot()
    assert bench.run(load_all).result == "done"
    assert_all_run(bench)


@pytest.fixture
def in_shm(bench: Bench) -> Iterator[Bench]:
    """web2 has its RAM in /dev/shm: a kexec would not keep it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        start_afresh_with(bench, f"{directory}/web2")
        yield bench


def start_afresh_with(bench: Bench, memory: str) -> None:
    bench.define("web2", memory)
    bench.runner.qemus.clear()
    bench.runner.forget_launches()

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    bench.runner.started.clear()


def test_a_soft_reboot_is_saved_for_also_with_ram_in_shared_memory(in_shm: Bench) -> None:
    bench = in_shm
    bench.kexec.under_way = Survives.SOFT_REBOOT
    assert bench.run(before_kexec).result == "done"
    assert (bench.kexec.promised, bench.kexec.outlived) == (True, Survives.SOFT_REBOOT)
    assert bench.kexec.ended_at_once == set(NAMES)
    bench.soft_reboot()
    assert bench.run(load_all).result == "done"
    assert phases(bench) == ["checking", "saving", "saved", "committing", "booted", "loading", "done"]
    assert_all_run(bench)
    ports = bench.ports()
    story = story_of("", ports.journal.records(), ports.history.all(), "host")
    assert (story.kind, story.kernel_before) == ("soft-reboot", story.kernel_after)
    assert [span.name for span in story.phases][:4] == ["check", "save", "shutdown", "userspace"]
    assert {guest.pause_s is not None for guest in story.guests} == {True}


def test_a_soft_reboot_is_refused_for_memory_that_it_takes_away(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # where tests have their files may be below /dev/shm
        start_afresh_with(bench, f"{directory}/web2")
        bench.kexec.under_way = Survives.SOFT_REBOOT
        job = bench.run(before_kexec)
        assert "does not survive a soft-reboot" in job.result, job.guests
        assert not bench.kexec.promised
        assert_all_run(bench)


def test_a_kexec_that_comes_in_place_of_the_soft_reboot_is_refused(in_shm: Bench) -> None:
    async def story(manager: Manager) -> None:
        in_shm.kexec.begin(Survives.SOFT_REBOOT)
        await before_kexec(manager)
        in_shm.kexec.under_way = Survives.KEXEC
        assert "does not survive a kexec: web2" in (await before_kexec(manager)).result
        assert in_shm.kexec.outlived is Survives.SOFT_REBOOT, "the gate knows"

    in_shm.run(story)


def test_a_soft_reboot_asks_whether_the_qemu_that_is_installed_can_take_the_guests(bench: Bench) -> None:
    bench.host.installed = ""
    bench.kexec.under_way = Survives.SOFT_REBOOT
    assert "is not there any more" in bench.run(before_kexec).result
    assert not bench.kexec.promised


@pytest.mark.parametrize("end", ["soft reboot", "kexec"])
def test_an_upgrade_that_a_soft_reboot_ended_has_its_guests_loaded_all_the_same(bench: Bench, end: str) -> None:
    bench.run(until_kexec(bench))
    bench.soft_reboot()
    if end == "kexec":
        bench.kexec.under_way = Survives.KEXEC
        bench.reboot()
    assert bench.run(load_all).result == "done"
    assert bench.kernels.is_loaded is None, "a reboot would be a kexec into it"
    assert_all_run(bench)


def test_a_soft_reboot_changes_nothing_of_the_way_back(bench: Bench) -> None:
    before = bench.host.kernel()
    bench.run(until_kexec(bench))
    bench.reboot()
    assert bench.run(load_all).result == "done"
    bench.kexec.under_way = Survives.SOFT_REBOOT
    assert bench.run(before_kexec).result == "done"
    bench.soft_reboot()
    assert bench.run(load_all).result == "done"
    assert bench.host.kernel() != before

    async def way_back(manager: Manager) -> str:
        return manager.ledger.booted.kernel_from if manager.ledger.booted else ""

    assert bench.run(way_back) == before


def test_one_that_is_held_and_unreadable_stops_no_kexec_of_the_others(bench: Bench) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest(need=Survives.KEXEC)), "web2")
    bench.runner.qemus.pop("web2")
    (manifest,) = (bench.root / "checkpoints/web2").glob("manifest*")
    manifest.write_text("{")
    bench.kexec.under_way = Survives.KEXEC
    assert bench.run(before_kexec).result == "done"
    assert bench.kexec.promised


def test_a_soft_reboot_that_does_not_come_is_taken_back(bench: Bench) -> None:
    async def call_off(manager: Manager) -> None:
        bench.kexec.begin(Survives.SOFT_REBOOT)
        await before_kexec(manager)
        (watch,) = manager.jobs.current.values()
        bench.kexec.fail()
        await ended(manager, watch)

    bench.run(call_off)
    assert phases(bench)[-1] == "rolled-back"
    assert_all_run(bench)


def test_a_plain_kexec_with_a_guest_that_cannot_be_saved_is_not_promised(bench: Bench) -> None:
    bench.kexec.under_way = Survives.KEXEC
    bench.runner.faults["web2", "save"] = SaveFailed("no room", vm="web2")
    assert "no room" in bench.run(before_kexec).result
    assert not bench.kexec.promised
    assert_all_run(bench)


def test_a_plain_kexec_that_does_not_come_is_taken_back(bench: Bench) -> None:
    async def call_off(manager: Manager) -> None:
        bench.kexec.begin()
        await before_kexec(manager)
        assert statuses(bench) == {"postmigrate"}
        (watch,) = manager.jobs.current.values()
        bench.kexec.fail()
        await ended(manager, watch)

    bench.run(call_off)
    assert_all_run(bench)


def test_the_hook_of_our_own_upgrade_finds_all_saved(bench: Bench) -> None:
    async def hook(manager: Manager) -> Job:
        await until_kexec(bench)(manager)
        return await ended(manager, manager.before_kexec())

    assert bench.run(hook).result == "done"
    assert phases(bench).count("saving") == 1


# -- killed anywhere ------------------------------------------------------------------------------------------------------


@dataclass
class Killed:
    """Two guests, and an agent that is killed in a story of theirs; then the next agent, or the next boot."""

    bench: Bench
    story: str
    end: str

    def prepare(self) -> None:
        bench = self.bench
        for name in NAMES[:2]:
            bench.define(name, bench.define_device(name), autostart=True)
        bench.run(self._start)
        bench.runner.started.clear()
        if self.story == "load":
            bench.run(until_kexec(bench))
            bench.reboot()
        if self.story == "one fails":
            bench.runner.faults["web2", "save"] = SaveFailed("no room", vm="web2")

    async def _start(self, manager: Manager) -> None:
        for vm in manager.vms.values():
            await vm.start()

    async def act(self, manager: Manager) -> None:
        bench = self.bench
        if self.story == "load":
            await load_all(manager)
        elif self.story == "by hand":
            await ended(manager, manager.save_all(Survives.KEXEC))
            await ended(manager, manager.rollback())
        else:
            job = await until_kexec(bench)(manager)
            if self.story == "called off" and bench.kexec.under_way:
                bench.kexec.fail()
                await ended(manager, job)

    def live_until(self, points: int) -> tuple[bool, set[str]]:
        """Whether the agent lived, and who was saved when it did not."""
        bench = self.bench
        bench.runner.life_left = points
        with contextlib.suppress(AgentKilled):
            bench.run(self.act)
        lived, bench.runner.life_left = bench.runner.agent_lives, None
        bench.runner.faults.clear()
        return lived, {name for name in NAMES[:2] if "manifest.json" in bench.files(name)}

    def go_on(self) -> None:
        bench = self.bench
        if self.end == "power-cut" or bench.kexec.under_way:  # a kexec that is under way goes on without the agent
            bench.reboot()
        bench.run(look)
        if self.end == "power-cut" or bench.host.boot > 1:
            bench.run(lambda manager: ended(manager, manager.load_and_start_all()))
        if self.story == "by hand" and self.end == "restart":
            bench.run(self._take_back)

    async def _take_back(self, manager: Manager) -> None:
        for vm in manager.vms.values():
            if vm.state is VmState.SAVED:
                await vm.resume()

    def assert_no_guest_is_lost(self, saved: set[str], where: str) -> None:
        bench = self.bench
        assert bench.runner.violations == [], where
        assert set(bench.runner.qemus) == set(NAMES[:2]), where
        assert statuses(bench) == {"running"}, where
        for name in NAMES[:2]:
            assert bench.qemu(name).count == bench.runner.counts[name], where
            assert "manifest.json" not in bench.files(name), where
            booted = (name, "start") in bench.runner.started
            assert not (booted and name in saved), f"{name} was saved, and booted afresh; {where}"
            assert not (booted and self.end == "restart"), f"{name} was lost; {where}"
        assert not bench.kexec.promised, where


@pytest.mark.parametrize("end", ["restart", "power-cut"])
@pytest.mark.parametrize("story", ["upgrade", "called off", "one fails", "load", "by hand"])
def test_an_agent_that_is_killed_anywhere_loses_no_guest(tmp_path: Path, story: str, end: str) -> None:
    """At each point at which it touches the world. After it: another agent; or the power is gone with it, and all that
    was not in persistent memory or on disk. Whoever was durably saved is loaded then, and nobody twice."""
    for points in range(1, 1000):
        root = tmp_path / str(points)
        root.mkdir()
        killed = Killed(Bench(root, witness="off"), story, end)  # the order of things alone must do
        killed.prepare()
        lived, saved = killed.live_until(points)
        killed.go_on()
        killed.assert_no_guest_is_lost(saved, f"killed at point {points}: {killed.bench.records()[-6:]}")
        if lived:
            return
    raise AssertionError("it never got done")


# -- prediction -----------------------------------------------------------------------------------------------------------


def timeline(vm: str, pause_s: float, *, kexec: bool = True, upgrade: str = "u1") -> GuestTimeline:
    return GuestTimeline(
        id=f"{vm}-{pause_s}", vm=vm, upgrade=upgrade, kernel_before="a", kernel_after="b", stopped_at=100.0, saved_at=101.0,
        shutdown_at=102.0 if kexec else 0.0, userspace_at=103.0 if kexec else 0.0, load_at=104.0, memory_at=105.0,
        resumed_at=100.0 + pause_s,
    )  # fmt: skip


def test_a_host_without_a_kexec_on_record_predicts_nothing() -> None:
    assert predict(["web1"], [timeline("web1", 5.0, kexec=False)]) is None
    assert predict([], [timeline("web1", 5.0)]) is None


def test_the_longest_of_the_guests_own_pauses_is_predicted() -> None:
    history = [timeline("web1", 5.0), timeline("web2", 20.0), timeline("web1", 7.0, upgrade="u2")]
    assert predict(["web1"], history) == (6.0, 2)
    assert predict(["web1", "web2"], history) == (20.0, 2)
    assert predict(["new"], history) == (7.0, 2)


def test_a_clock_that_was_stepped_does_not_decide() -> None:
    history = [timeline("web1", pause) for pause in (5.0, 6.0, -3600.0, 3607.0, 7.0)]
    predicted = predict(["web1"], history)
    assert predicted
    assert predicted[0] == 6.5


@pytest.mark.parametrize(("known", "words"), [(True, "20.0 s are expected"), (False, "none was measured yet")])
def test_a_pause_that_is_too_long_or_not_known_is_refused(bench: Bench, words: str, *, known: bool) -> None:
    async def ask(manager: Manager) -> Job:
        if known:
            manager.ports.history.add(timeline("web1", 20.0))
        return await ended(manager, manager.upgrade(UpgradeRequest(max_pause=10.0)))

    assert words in bench.run(ask).result
    assert_all_run(bench)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_pause_is_measured_right_though_the_clock_is_stepped(bench: Bench, step_s: float) -> None:
    async def save_step_load(manager: Manager) -> list[float]:
        await ended(manager, manager.save_all(Survives.KEXEC))
        bench.host.stepped_s = step_s
        await ended(manager, manager.load_all())
        return [timeline.pause_s for timeline in manager.ports.history.all()]

    pauses = bench.run(save_step_load)
    assert len(pauses) == 3
    assert all(0 < pause_s < 60 for pause_s in pauses), pauses


def test_no_room_for_state_is_found(bench: Bench) -> None:
    async def ask(manager: Manager) -> list[Finding]:
        manager.ports.store.room_bytes = lambda: 1 << 20  # type: ignore[method-assign]
        return await manager.plan_findings(manager.plan(UpgradeRequest()))

    (found,) = [finding for finding in bench.run(ask) if finding.code == "no-room"]
    assert "1 MiB are free for the device state of 3 VMs" in found.what


def test_the_memory_of_the_guests_decides_which_drivers_the_kernel_needs(bench: Bench) -> None:
    asked: list[set[str]] = []
    bench.devices.list()[0] = replace(bench.devices.list()[0], drivers=("device_dax", "nfit"))

    def findings(kernel: Kernel, drivers: set[str]) -> list[Finding]:  # noqa: ARG001
        asked.append(drivers)
        return []

    bench.kernels.findings = findings  # type: ignore[method-assign, assignment]
    bench.run(refused_upgrade(UpgradeRequest(dry_run=True)))
    assert asked == [{"device_dax", "nfit"}]


def test_phases_follow_a_table() -> None:
    assert set(NEXT) == set(Phase)
    reachable = {Phase.CHECKING} | set().union(*NEXT.values())
    assert reachable == set(Phase) - {Phase.BOOTED}, "only a new boot makes a phase BOOTED"
    assert all(NEXT[phase] for phase in IN_FLIGHT), "an upgrade in flight has a way on"
    assert {phase for phase in Phase if Phase.ROLLING_BACK in NEXT[phase]} == TAKEN_BACK - {Phase.ROLLING_BACK}
    assert {phase for phase in Phase if not NEXT[phase]} == OVER


def test_a_phase_that_may_not_follow_is_refused_and_leaves_no_record(bench: Bench) -> None:
    async def skip(manager: Manager) -> None:
        ledger = manager.ledger
        with pytest.raises(RuntimeError, match="there is no upgrade"):
            ledger.enter(Phase.SAVING)
        ledger.begin(Kind.KEXEC)
        with pytest.raises(RuntimeError, match="can't begin while another one is in checking"):
            ledger.begin(Kind.KEXEC)
        with pytest.raises(RuntimeError, match="phase committing can't follow checking"):
            ledger.enter(Phase.COMMITTING)

    bench.run(skip)
    assert phases(bench) == ["checking"]


@pytest.mark.parametrize(
    ("installed", "why"),
    [
        ("", "is not there any more"),
        ("another", "lacks what it needs: version of QEMU"),
        ("broken", "does not work: no such option"),
    ],
)
def test_a_qemu_that_could_not_load_the_guests_is_refused_before_any_stops(bench: Bench, installed: str, why: str) -> None:
    """It was replaced by an older one, say, since the guests were started."""
    bench.host.installed = installed
    bench.runner.lacking = [Difference("version of QEMU", "11.1", "10.0")]
    if installed == "broken":
        bench.runner.faults[("web2", "start")] = QemuFailed("no such option", vm="web2")
        bench.runner.lacking = []
    job = bench.run(refused_upgrade())
    assert job.state is JobState.FAILED
    assert why in str(job.error)
    assert bench.runner.beside == {}
    assert_all_run(bench, booted=())


def test_a_newer_qemu_is_asked_once(bench: Bench) -> None:
    bench.host.installed = "newer"

    async def check(manager: Manager) -> list[list[str]]:
        return [await manager.vm("web1").successor_reasons() for _ in range(3)]

    assert bench.run(check) == [[], [], []]
    assert bench.runner.started == [("web1", "load")]
    assert bench.runner.beside == {}
    assert statuses(bench) == {"running"}

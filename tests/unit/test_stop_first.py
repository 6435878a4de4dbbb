# SPDX-License-Identifier: GPL-2.0-or-later
"""Units that stop before the first guest does, and a host that has not been up for long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Finding, Seconds, Unit
from cpr_agent.core.upgrade import uptime
from cpr_agent.core.upgrade.dependents import Dependents
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from cpr_agent.core.upgrade.stop_first import obstacle
from cpr_agent.errors import SaveFailed
from tests.bench import Bench, ended
from tests.fakes import AgentKilled
from tests.unit.test_core_upgrade import phases, until_kexec

NAMES = ("web1", "web2")
GITLAB, WORKER = "gitlab.service", "worker.service"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two VMs that run on dax devices; gitlab.service is to stop first, and worker.service stops along."""
    bench = Bench(tmp_path, witness="off")
    for name in NAMES:
        bench.define(name, bench.define_device(name))
    bench.units.add(GITLAB, WORKER)
    bench.units.add(WORKER)
    bench.units.add("idle.service", active_state="inactive")
    stop_first(bench, GITLAB, "idle.service")

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    return bench


def stop_first(bench: Bench, *names: str, **more: Any) -> None:
    bench.settings = replace(bench.settings, upgrade=replace(bench.settings.upgrade, stop_first=names, **more))


def drill(bench: Bench) -> Callable[[Manager], Awaitable[Job]]:
    return until_kexec(bench, UpgradeRequest(drill=True))


async def findings(manager: Manager) -> list[Finding]:
    found = await manager.plan_findings(manager.plan(UpgradeRequest(drill=True)))
    return [one for one in found if one.code in ("stop-first", "stops-first", "minimum-uptime")]


async def look(manager: Manager) -> None:
    """An agent that recovers, and no more."""


def assert_as_before(bench: Bench) -> None:
    """All guests and all units run, and no guest was started afresh."""
    assert bench.runner.violations == []
    assert {qemu.status for qemu in bench.runner.qemus.values()} == {"running"}
    assert {name: unit.active_state for name, unit in bench.units.there.items()} == {
        **dict.fromkeys((GITLAB, WORKER), "active"),
        "idle.service": "inactive",
    }
    assert bench.kernels.is_loaded is None
    assert not bench.kexec.promised


def test_units_have_stopped_before_the_first_guest_does(bench: Bench) -> None:
    bench.run(drill(bench))
    assert bench.kexec.started.is_set()
    assert bench.units.acts == [("stop", GITLAB)], "what did not run is not stopped"
    assert bench.units.statuses == [{"running"}]
    assert phases(bench) == ["checking", "stopping", "saving", "saved", "committing"]
    events = bench.records()
    assert events.index("upgrade-stopping") < events.index("save-begin")


def test_the_record_names_all_that_stops_before_it_does(bench: Bench) -> None:
    recorded: list[Any] = []
    bench.runner.at[f"stop {GITLAB}"] = lambda: recorded.extend(bench.journal()[-1]["stopped_first"])
    bench.run(drill(bench))
    assert recorded == [GITLAB, WORKER]


def test_a_boot_after_the_kexec_starts_them_by_itself(bench: Bench) -> None:
    bench.run(drill(bench))
    bench.reboot()
    bench.run(lambda manager: ended(manager, manager.load_all()))
    assert phases(bench)[-1] == "done"
    assert ("start", GITLAB) not in bench.units.acts


def test_without_the_setting_nothing_is_asked_or_recorded(bench: Bench) -> None:
    stop_first(bench)
    bench.run(drill(bench))
    assert phases(bench) == ["checking", "saving", "saved", "committing"]
    assert bench.units.acts == []
    assert bench.run(findings) == []


def test_a_save_that_fails_starts_them_again_once_the_guests_run(bench: Bench) -> None:
    bench.runner.faults["web2", "save"] = SaveFailed("no room", vm="web2")
    job = bench.run(drill(bench))
    assert "no room" in job.result
    assert f"started again: {GITLAB}, {WORKER}" in job.result
    assert bench.units.acts == [("stop", GITLAB), ("start", GITLAB), ("start", WORKER)]
    assert bench.units.statuses[1] == {"running"}
    assert_as_before(bench)


def test_a_kexec_that_is_called_off_starts_them_again(bench: Bench) -> None:
    async def call_off(manager: Manager) -> Job:
        job = await drill(bench)(manager)
        bench.kexec.fail()
        return await ended(manager, job)

    assert "the kexec did not happen" in bench.run(call_off).result
    assert phases(bench)[-2:] == ["rolling-back", "rolled-back"]
    assert_as_before(bench)


def test_a_stop_that_hangs_is_bounded_and_said_and_no_guest_has_stopped(bench: Bench) -> None:
    stop_first(bench, GITLAB, stop_first_timeout=Seconds(0.05))
    bench.units.stuck.add(GITLAB)
    job = bench.run(drill(bench))
    assert job.state is JobState.FAILED
    assert f"{GITLAB} did not stop within 50 ms" in job.result
    assert "No guest was stopped; started again" in job.result
    assert "save-begin" not in bench.records()
    assert phases(bench) == ["checking", "stopping", "rolling-back", "rolled-back"]
    assert_as_before(bench)


def test_a_stop_that_fails_is_said(bench: Bench) -> None:
    bench.units.failing["stop", GITLAB] = f"{GITLAB}: systemd says canceled"
    job = bench.run(drill(bench))
    assert f"could not be stopped: {GITLAB}: systemd says canceled" in job.result
    assert "save-begin" not in bench.records()
    assert_as_before(bench)


def test_a_unit_that_does_not_come_back_is_named_and_holds_no_guest(bench: Bench) -> None:
    bench.runner.faults["web2", "save"] = SaveFailed("no room", vm="web2")
    bench.units.failing["start", WORKER] = f"{WORKER}: systemd says failed"
    job = bench.run(drill(bench))
    assert f"but not {WORKER}: systemd says failed" in job.result
    assert {qemu.status for qemu in bench.runner.qemus.values()} == {"running"}
    assert bench.journal()[-1]["not_started"] == [f"{WORKER}: systemd says failed"]
    assert phases(bench)[-1] == "rolled-back"


def test_a_job_that_is_cancelled_while_units_stop_starts_them_again(bench: Bench) -> None:
    bench.units.stuck.add(GITLAB)

    async def cancel(manager: Manager) -> Job:
        stopping = asyncio.Event()
        bench.runner.at[f"stop {GITLAB}"] = stopping.set
        job = manager.upgrade(UpgradeRequest(drill=True))
        await stopping.wait()
        manager.jobs.cancel(job.id)
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED
    assert phases(bench)[-1] == "rolled-back"
    assert_as_before(bench)


@pytest.mark.parametrize("end", ["restart", "power-cut"])
@pytest.mark.parametrize(
    "point",
    [
        *("before upgrade-stopping", "after upgrade-stopping", f"stop {GITLAB}", f"stop {GITLAB} done"),
        *("before upgrade-saving", "after upgrade-saving", "after upgrade-rolling-back"),
        *(f"start {GITLAB}", f"start {WORKER} done", "before upgrade-rolled-back"),
    ],
)
def test_an_agent_that_is_killed_around_a_stop_leaves_no_unit_down(bench: Bench, point: str, end: str) -> None:
    if "start" in point or "roll" in point:
        bench.runner.faults["web2", "save"] = SaveFailed("no room", vm="web2")
    bench.runner.die_at = point
    with pytest.raises(AgentKilled):
        bench.run(drill(bench))
    bench.runner.die_at = ""
    bench.runner.faults.clear()
    if end == "power-cut":
        bench.reboot()
        bench.run(lambda manager: ended(manager, manager.load_all()))
        assert phases(bench)[-1] in ("refused", "rolled-back")
        return
    bench.run(look)
    assert phases(bench)[-1] in ("refused", "rolled-back")
    assert_as_before(bench)


def test_a_rollback_by_hand_while_units_stop_waits_for_the_end(bench: Bench) -> None:
    stop_first(bench, GITLAB, stop_first_timeout=Seconds(0.05))
    bench.units.stuck.add(GITLAB)

    async def by_hand(manager: Manager) -> Job:
        stopping = asyncio.Event()
        bench.runner.at[f"stop {GITLAB}"] = stopping.set
        job = manager.upgrade(UpgradeRequest(drill=True))
        await stopping.wait()
        rollback = await ended(manager, manager.rollback())
        await ended(manager, job)
        return rollback

    assert bench.run(by_hand).result == "nothing to do"
    assert_as_before(bench)


# -- what may stop first --------------------------------------------------------------------------------------------------


def unit(name: str, *takes_along: str, **facts: Any) -> Unit:
    return Unit(name=name, takes_along=frozenset(takes_along), **facts)


UNITS = {
    one.name: one
    for one in (
        unit("free.service", aliases=frozenset({"free.service", "also-free.service"})),
        unit("iscsid.service", "srv-vms.mount"),
        unit("srv-vms.mount", "cpr-vm@web1.service", mount_point="/srv/vms"),
        unit("isos.mount", mount_point="/srv/isos"),
        unit("srv.mount", mount_point="/srv/iso"),
        unit("storage.target", "middle.service"),
        unit("middle.service", "bottom.service"),
        unit("bottom.service", "storage.target", "cpr-agent.service"),
        unit("ordered.service"),
        unit("wanted.service"),
        unit("wanted-by-part.service", "wanted-along.service"),
        unit("wanted-along.service"),
        unit("run-1.scope", startable=False),
        unit("with-scope.service", "run-1.scope"),
        unit("sda.device", stoppable=False),
        unit("gone.service", load_state="not-found", active_state="inactive"),
        unit("dbus.socket"),
        unit("cpr-agent.service"),
        unit(
            "cpr-load.service", wants=frozenset({"wanted.service"}), after=frozenset({"cpr-vm@web1.service", "dbus.socket"})
        ),
        unit(
            "cpr-vm@web1.service",
            after=frozenset({"ordered.service"}),
            wants=frozenset({"wanted-along.service"}),
        ),
    )
}
KNOWN = Dependents(
    UNITS,
    ("cpr-agent.service", "cpr-load.service", "dbus.socket"),
    {"cpr-vm@web1.service": "web1"},
    {"/srv/isos/a.iso": "web2"},
)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("free.service", ""),
        ("also-free.service", ""),
        ("srv.mount", ""),  # /srv/iso is no part of /srv/isos
        ("iscsid.service", "VM web1 (cpr-vm@web1.service) depends on it"),
        ("srv-vms.mount", "VM web1 (cpr-vm@web1.service) depends on it"),
        ("isos.mount", "VM web2 (/srv/isos/a.iso) depends on it"),
        ("storage.target", "the agent (cpr-agent.service) depends on it"),
        ("ordered.service", "VM web1 (cpr-vm@web1.service) depends on it"),
        ("wanted.service", "the agent (cpr-load.service) depends on it"),
        ("wanted-by-part.service", "VM web1 (cpr-vm@web1.service) depends on it"),
        ("cpr-vm@web1.service", "VM web1 depends on it"),
        ("cpr-agent.service", "the agent depends on it"),
        ("dbus.socket", "the agent depends on it"),
        ("with-scope.service", "run-1.scope could not be started again"),
        ("run-1.scope", "run-1.scope could not be started again"),
        ("sda.device", "systemd lets nobody stop sda.device by hand"),
        ("gone.service", "there is no unit gone.service on this host"),
        ("never-heard-of.service", "there is no unit never-heard-of.service on this host"),
        ("gitlab", "'gitlab' is not the name of a unit"),
        ("getty@.service", "'getty@.service' is not the name of a unit"),
        ("*.service", "'*.service' is not the name of a unit"),
        ("--now.service ", "'--now.service ' is not the name of a unit"),
        (f"{'x' * 248}.service", "is not the name of a unit"),
        ("", "'' is not the name of a unit"),
    ],
)
def test_what_a_vm_or_the_agent_depends_on_may_not_stop(name: str, why: str) -> None:
    said = obstacle(name, KNOWN)
    assert why in said
    assert bool(said) == bool(why)


@pytest.mark.parametrize("name", ["nonsense", "never-heard-of.service", "dbus.socket"])
def test_a_check_refuses_them_and_an_upgrade_stops_nothing(bench: Bench, name: str) -> None:
    bench.units.add("dbus.socket")
    stop_first(bench, GITLAB, name)
    (error,) = [finding for finding in bench.run(findings) if finding.severity == "error"]
    assert name in error.what
    assert "take it out of stop-first" in error.remedy
    job = bench.run(drill(bench))
    assert error.what in job.result
    assert phases(bench) == ["checking", "refused"]
    assert bench.units.acts == []
    for check in (Manager.findings, Manager.own_findings_of_all):  # without a plan
        assert error in bench.run(check)


def test_a_check_says_what_stops_and_what_would_start_it_again(bench: Bench) -> None:
    bench.units.add("gitlab.socket")
    bench.units.add(GITLAB, WORKER, triggered_by=frozenset({"gitlab.socket", "idle.service"}))
    warning, info = bench.run(findings)
    assert (warning.severity, info.severity) == ("warning", "info")
    assert f"{GITLAB} can be started again by gitlab.socket" in warning.what
    assert info.what == f"before the first guest stops: {GITLAB}, {WORKER}"
    stop_first(bench, GITLAB, "gitlab.socket")
    (info,) = bench.run(findings)
    assert info.what == f"before the first guest stops: {GITLAB}, gitlab.socket, {WORKER}"


def test_a_systemd_that_does_not_answer_is_an_error(bench: Bench) -> None:
    bench.units.there.clear()
    (error,) = bench.run(findings)
    assert error.severity == "error"
    assert "systemd has not told of its units" in error.what


# -- a host that has just started -----------------------------------------------------------------------------------------


def test_a_shutdown_that_systemd_would_delay_is_waited_for_before_a_guest_stops(bench: Bench) -> None:
    bench.kexec.least_uptime_s = bench.host.uptime_s() + 0.3
    (info,) = [one for one in bench.run(findings) if one.code == "minimum-uptime"]
    assert info.severity == "info"
    assert info.seconds == pytest.approx(0.3, abs=0.3)
    stopped_at: list[float] = []
    bench.runner.at["before save-begin"] = lambda: stopped_at.append(bench.host.uptime_s())
    bench.run(drill(bench))
    assert min(stopped_at) >= bench.kexec.least_uptime_s


def test_the_hook_of_a_kexec_by_hand_waits_too(bench: Bench) -> None:
    bench.kexec.least_uptime_s = bench.host.uptime_s() + 0.3
    stopped_at: list[float] = []
    bench.runner.at["before save-begin"] = lambda: stopped_at.append(bench.host.uptime_s())
    bench.kexec.begin()
    bench.run(lambda manager: ended(manager, manager.before_kexec()))
    assert min(stopped_at) >= bench.kexec.least_uptime_s


def test_a_delay_that_is_too_long_to_wait_for_is_refused(bench: Bench) -> None:
    bench.kexec.least_uptime_s = bench.host.uptime_s() + uptime.PATIENCE_S + 60
    job = bench.run(drill(bench))
    assert "systemd ends no shutdown of this host in the next" in job.result
    assert phases(bench) == ["checking", "refused"]
    assert "MinimumUptimeSec= lower" in job.result

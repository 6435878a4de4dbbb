# SPDX-License-Identifier: GPL-2.0-or-later
"""When the admin's hooks run, and what becomes of a guest whose hook fails: never is one stopped for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Finding, Manifest, Policy, Survives
from cpr_agent.core.vm import Vm
from cpr_agent.errors import Blocked, SaveFailed
from tests.bench import Bench, ended

NAMES = ("web1", "web2")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two VMs that run; web2 is saved first."""
    bench = Bench(tmp_path)
    for name, order in zip(NAMES, (1, 2), strict=True):
        bench.define(name, order=order)

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    return bench


async def save(vm: Vm) -> Manifest:
    return await vm.save(SaveRequest())


async def load(vm: Vm) -> str:
    await vm.load(LoadRequest())
    await vm.settled()
    return vm.run_state


async def save_all(manager: Manager) -> Job:
    return await ended(manager, manager.save_all(Survives.QEMU_RESTART))


def assert_all_run(bench: Bench) -> None:
    assert {qemu.status for qemu in bench.runner.qemus.values()} == {"running"}
    assert bench.runner.violations == []
    assert all("manifest.json" not in bench.files(name) for name in NAMES)


def test_hooks_run_around_a_save_and_never_while_its_guest_is_stopped(bench: Bench) -> None:
    bench.vm(save)
    bench.vm(load)
    assert [(phase, vm) for phase, vm, _ in bench.hooks.ran] == [
        *(("check", "web1"), ("pre-save", "web1"), ("post-load", "web1")),
    ]
    assert all(statuses["web1"] == "running" for statuses in bench.hooks.statuses)


def test_of_many_guests_none_is_stopped_before_the_last_pre_save_hook_is_done(bench: Bench) -> None:
    assert bench.run(save_all).state is JobState.DONE
    before = [s for (phase, _, _), s in zip(bench.hooks.ran, bench.hooks.statuses, strict=True) if phase == "pre-save"]
    assert len(before) == 2
    assert all(set(statuses.values()) == {"running"} for statuses in before)
    assert all(upgrade for phase, _, upgrade in bench.hooks.ran if phase == "pre-save")


def test_a_check_hook_vetoes_a_save(bench: Bench) -> None:
    bench.hooks.failing["check", "web1"] = "the backup runs"
    with pytest.raises(Blocked, match="check.d/10-test: the backup runs"):
        bench.vm(save)
    assert_all_run(bench)
    assert "save-begin" not in bench.records()


def test_a_check_tells_the_veto(bench: Bench) -> None:
    bench.hooks.failing["check", "web1"] = "the backup runs"

    async def check(manager: Manager) -> list[Finding]:
        return await manager.findings()

    (found,) = [finding for finding in bench.run(check) if finding.code == "hook"]
    assert (found.vm, found.severity) == ("web1", "error")
    assert "the backup runs" in found.what


def test_a_veto_of_one_refuses_the_save_of_all(bench: Bench) -> None:
    bench.hooks.failing["check", "web2"] = "not today"
    job = bench.run(save_all)
    assert job.state is JobState.FAILED
    assert "VM web2" in job.result
    assert "not today" in job.result
    assert not [phase for phase, _, _ in bench.hooks.ran if phase == "pre-save"]
    assert_all_run(bench)


def test_a_pre_save_hook_that_fails_refuses_the_save_before_any_guest_stops(bench: Bench) -> None:
    bench.hooks.failing["pre-save", "web1"] = "could not flush"
    job = bench.run(save_all)
    assert job.state is JobState.FAILED
    assert "could not flush" in job.result
    assert "save-begin" not in bench.records()
    assert bench.records()[-1] == "upgrade-refused"
    assert_all_run(bench)
    with pytest.raises(SaveFailed, match="could not flush"):
        bench.vm(save)
    assert_all_run(bench)


def test_a_guest_whose_pre_save_hook_fails_is_shut_down_where_the_policy_says_so(bench: Bench) -> None:
    bench.hooks.failing["pre-save", "web1"] = "could not flush"

    async def skip(manager: Manager) -> Job:
        return await ended(manager, manager.save_all(Survives.QEMU_RESTART, Policy.SKIP_UNSAVEABLE))

    assert bench.run(skip).state is JobState.DONE
    assert set(bench.runner.qemus) == {"web2"}


def test_a_post_load_hook_that_fails_is_told_and_undoes_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.hooks.failing["post-load", "web1"] = "the switch said no"
    bench.vm(save)
    assert bench.vm(load) == "running"
    (timeline,) = bench.history()
    assert timeline.hook_problems == ("the hook /etc/cpr-agent/hooks.d/post-load.d/10-test: the switch said no",)
    assert "the switch said no" in caplog.text
    assert_all_run(bench)


def test_a_new_qemu_for_a_guest_has_its_hooks_too(bench: Bench) -> None:
    async def refresh(vm: Vm) -> str:
        how = await vm.replace_qemu()
        await vm.settled()
        return how

    assert bench.vm(refresh) == "beside"
    assert [phase for phase, _, _ in bench.hooks.ran] == ["check", "pre-save", "post-load"]
    bench.hooks.failing["pre-save", "web1"] = "no"
    with pytest.raises(SaveFailed, match="the guest was not stopped|The guest was not stopped"):
        bench.vm(refresh)
    assert_all_run(bench)


@pytest.mark.parametrize("phase", ["check", "pre-save"])
def test_an_agent_that_dies_in_a_hook_has_stopped_nobody(bench: Bench, phase: str) -> None:
    bench.dies(f"hook {phase}", save)
    bench.vm(lambda vm: vm.refresh())
    assert_all_run(bench)

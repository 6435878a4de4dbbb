# SPDX-License-Identifier: GPL-2.0-or-later
"""Any sequence of upgrades, crashes, restarts, reboots and hands on the admin's socket: what no such sequence may reach."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Policy, Survives, VmState
from cpr_agent.core.upgrade.ledger import EVENT, IN_FLIGHT, NEXT, Phase
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from cpr_agent.errors import CprError, QemuFailed
from tests.bench import Bench
from tests.fakes import AgentKilled

NAMES = ("web1", "web2")
Act = Callable[[Manager], Awaitable[object]]


def through(start: Callable[[Manager], Job]) -> Act:
    """The job, up to its end or to where it waits for the host's."""

    async def act(manager: Manager) -> None:
        start(manager)
        await manager.jobs.drain(10)

    return act


JOBS: dict[str, Act] = {
    "upgrade": through(lambda manager: manager.upgrade(UpgradeRequest())),
    "skip": through(lambda manager: manager.upgrade(UpgradeRequest(policy=Policy.SKIP_UNSAVEABLE))),
    "drill": through(lambda manager: manager.upgrade(UpgradeRequest(drill=True))),
    "save all": through(lambda manager: manager.save_all(Survives.KEXEC)),
    "load all": through(lambda manager: manager.load_all()),
    "rollback": through(lambda manager: manager.rollback()),
    "refresh all": through(lambda manager: manager.refresh_all()),
}
ANNOUNCED = ("resume", "rollback", "save-undone")
FAULTS: tuple[str, ...] = (
    "start",
    "connect",
    "run_state",
    "save",
    "after-save",
    "load",
    "after-load",
    "cont",
    "after-cont",
    "sleep_problem",
)
FAULTS += ("suspend", "after-suspend", "wake", "after-wake")
lives = st.none() | st.integers(1, 120)
names = st.sampled_from(NAMES)


class AnyHistory(RuleBasedStateMachine):
    """Two VMs on persistent memory; no witness, so that the order of things alone must do."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="cpr-agent-test-", dir="/dev/shm"))
        self.bench = Bench(self.root, witness="off")
        self.bench.units.add("slow.service", "along.service")
        self.bench.units.add("along.service")
        as_usual = self.bench.settings
        self.bench.settings = replace(as_usual, upgrade=replace(as_usual.upgrade, stop_first=("slow.service",)))
        self.gone: set[object] = set()
        """Checkpoints that were announced to be over, and were gone when the world was looked at."""
        self.looked_at = 0
        for name in NAMES:
            self.bench.define(name, self.bench.define_device(name))

        async def start(manager: Manager) -> None:
            for vm in manager.vms.values():
                await vm.start()

        self.bench.run(start)

    def teardown(self) -> None:
        """At last the next agent makes sense of what is left: each checkpoint is whole, or not there."""

        async def look(manager: Manager) -> set[VmState]:
            await manager.jobs.drain(10)
            return {vm.state for vm in manager.vms.values()}

        self.bench.runner.faults.clear()
        self.bench.kexec.under_way = None
        try:
            assert {VmState.HELD, VmState.SUSPENDED}.isdisjoint(self.bench.run(look)), (
                "the agent alone puts guests to sleep"
            )
            self.no_state_is_loaded_onto_ram_that_moved_on()
            self.no_checkpoint_runs_twice()
            units = self.bench.units.there.values()
            assert {unit.active_state for unit in units} == {"active"}, "what was stopped for an upgrade is started again"
        finally:
            shutil.rmtree(self.root)

    def live(self, act: Act, points: int | None) -> None:
        """One agent's life; it is killed after so many touches of the world."""
        self.bench.runner.life_left = points
        with contextlib.suppress(AgentKilled, CprError):
            self.bench.run(act)
        self.bench.runner.life_left = None

    @rule(name=st.sampled_from(sorted(JOBS)), points=lives)
    def a_job(self, name: str, points: int | None) -> None:
        self.live(JOBS[name], points)

    @rule(vm=names, act=st.sampled_from(["save", "load", "resume", "start", "replace_qemu"]), points=lives)
    def an_act(self, vm: str, act: str, points: int | None) -> None:
        def do(manager: Manager) -> Awaitable[object]:
            one = manager.vm(vm)
            return (
                one.save(SaveRequest())
                if act == "save"
                else one.load(LoadRequest())
                if act == "load"
                else getattr(one, act)()
            )

        self.live(do, points)

    @rule(points=lives)
    def a_restart(self, points: int | None) -> None:
        async def nothing(manager: Manager) -> None:
            await manager.jobs.drain(10)

        self.live(nothing, points)

    @rule()
    def the_host_starts_anew(self) -> None:
        """By the kexec that was under way, or because the power went."""
        self.bench.reboot()

    @precondition(lambda self: self.bench.kexec.under_way)
    @rule()
    def the_kexec_is_called_off(self) -> None:
        self.bench.kexec.under_way = None

    @precondition(lambda self: not self.bench.kexec.under_way)
    @rule(points=lives)
    def somebody_types_systemctl_kexec(self, points: int | None) -> None:
        async def hook(manager: Manager) -> None:
            self.bench.kexec.begin()
            await through(lambda manager: manager.before_kexec())(manager)
            if not self.bench.kexec.promised:  # the hook cancels it
                self.bench.kexec.under_way = None

        self.live(hook, points)
        if not self.bench.kexec.promised:
            self.bench.kexec.under_way = None

    @rule(vm=names)
    def a_qemu_dies(self, vm: str) -> None:
        self.bench.runner.end(vm)

    @rule(vm=names, paused=st.booleans())
    def a_hand_on_the_admins_socket(self, vm: str, *, paused: bool) -> None:
        """Of a QEMU that answers the agent, too: what a hand does to any other the witness must tell, and there is none."""
        qemu, faults = self.bench.runner.qemus.get(vm), self.bench.runner.faults
        if not {(vm, "connect"), (vm, "run_state")}.isdisjoint(faults):
            return
        if qemu and qemu.status in ("running" if paused else "paused", "" if paused else "postmigrate"):
            self.live(lambda manager: self.meddle(manager, vm, "paused" if paused else "running"), None)

    async def meddle(self, manager: Manager, vm: str, status: str) -> None:
        if qemu := self.bench.runner.qemus.get(vm):
            qemu.by_hand(status)
        await manager.vm(vm).refresh()

    @rule(vm=names, fault=st.none() | st.sampled_from(FAULTS))
    def a_fault(self, vm: str, fault: str | None) -> None:
        runner = self.bench.runner
        runner.faults = {(vm, fault): QemuFailed(f"{fault} failed", vm=vm)} if fault else {}

    @rule(vm=names, blocked=st.booleans())
    def a_blocker(self, vm: str, *, blocked: bool) -> None:
        self.bench.runner.blocked = {vm: ["it plays the piano"]} if blocked else {}

    @rule(vm=names, has=st.booleans())
    def a_device_of_the_host(self, vm: str, *, has: bool) -> None:
        """A guest that has one sleeps while it is saved."""
        self.bench.runner.vfio = {vm: ["net0 (vfio-pci)"]} if has else {}

    # -- what must hold at any time -----------------------------------------------------------------------------------

    @invariant()
    def no_state_is_loaded_onto_ram_that_moved_on(self) -> None:
        assert self.bench.runner.violations == []

    @invariant()
    def no_checkpoint_runs_twice(self) -> None:
        """ "resume", "rollback" and "save-undone" only announce: until the checkpoint is out of the world its guest has not
        run, and an agent that was killed in between leaves it for a load."""
        records = self.bench.journal()
        runs = Counter(record["checkpoint"] for record in records if record["event"] == "resumed")
        assert all(count == 1 for count in runs.values())
        spent: set[object] = set()
        for number, record in enumerate(records):
            if record["event"] == "load-begin":
                gone = self.gone if number >= self.looked_at else set()
                assert record["checkpoint"] not in spent | gone, "a checkpoint whose guest has run is loaded again"
            if record["event"] in ("resumed", "resumed-by-hand"):
                spent.add(record["checkpoint"])
        self.gone |= {record["checkpoint"] for record in records if record["event"] in ANNOUNCED} - self.live_checkpoints()
        self.looked_at = len(records)

    def live_checkpoints(self) -> set[object]:
        paths = (self.root / "checkpoints").glob("*/manifest.json")
        return {json.loads(path.read_bytes())["manifest"]["id"] for path in paths}

    @invariant()
    def no_guest_runs_while_it_can_still_be_loaded(self) -> None:
        """But for one that somebody let run on another socket while no agent looked."""
        for name, qemu in self.bench.runner.qemus.items():
            if qemu.status == "running":
                assert "manifest.json" not in self.bench.files(name)

    @invariant()
    def a_promise_to_the_gate_is_true(self) -> None:
        if self.bench.kexec.promised:
            assert all(qemu.status != "running" for qemu in self.bench.runner.qemus.values())
            named = {self.bench.runner.qemus.get(name) for name in self.bench.kexec.ended_at_once} - {None}
            assert all(qemu.status == "postmigrate" for qemu in named if qemu)
        else:
            assert not self.bench.kexec.ended_at_once

    @invariant()
    def phases_follow_their_table(self) -> None:
        last: dict[object, tuple[Phase, object]] = {}
        for record in self.bench.journal():
            if str(record["event"]).startswith(EVENT):
                phase = Phase(str(record["event"]).removeprefix(EVENT))
                if record["upgrade"] in last:
                    before, boot = last[record["upgrade"]]
                    anew = before in IN_FLIGHT and boot != record["boot"] and phase is Phase.BOOTED
                    dead_check = before is Phase.CHECKING and phase is Phase.REFUSED
                    assert anew or dead_check or phase in NEXT[before], f"{before} -> {phase}"
                else:
                    assert phase is Phase.CHECKING
                last[record["upgrade"]] = (phase, record["boot"])


EXAMPLES = int(os.environ.get("CPR_TEST_EXAMPLES", "40"))
"""`make test-faults` asks for many more."""
AnyHistory.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=20)
TestAnyHistory = AnyHistory.TestCase

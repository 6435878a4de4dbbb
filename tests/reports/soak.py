# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight guests for hours: sequences of tests/reports/sequences.py, saves, loads and refreshes, and faults among them.

In each round every guest lives through a few steps, and is looked at. Then all are saved and loaded, or refreshed, in one
of several ways, again and again while faults happen at random instants. At last what was done is put right, as systemd or
an admin would, and each guest is looked at again. A guest whose QEMU was killed may be lost with it; then it is started
afresh.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cpr_agent.bus.client import CallError, Client, NullWatcher, options
from cpr_agent.host.runner import SECOND
from tests.bus.conftest import QEMUS
from tests.faults.judge import Harm, Problem
from tests.kexec_lab import kill_and_wait
from tests.lab import ROOT, Lab, private_bus, until
from tests.reports.sequences import STANDS, STEPS, Seen, Step, Subject, harms, look, subject

GUESTS = 8
FAULTS_AN_HOUR = 1000
STATE_BYTES = 96 << 20
"""Of the file system that the agent keeps its state on: it has room for as many timelines as the agent keeps."""
SETTLED_S = 180.0
LOADS = 20
"""Nothing stands in the way any more when a round ends; a few may meet a QEMU that hangs still."""
UNHEARD = (CallError, OSError, EOFError, AssertionError)
"""What a caller gets while agent, bus or QEMU is away."""


@dataclass
class Run:
    lab: Lab
    rng: random.Random
    up: threading.Event = field(default_factory=threading.Event)
    """Cleared while an agent is away that was ended here."""
    subjects: dict[str, Subject] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    killed: set[str] = field(default_factory=set)
    """VMs whose QEMU was killed in this round."""
    loads: Counter[str] = field(default_factory=Counter)
    """How often one was tried at the end of this round."""
    faults: Counter[str] = field(default_factory=Counter)
    harm: Counter[Harm] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)

    # --- faults

    def inject(self, rng: random.Random) -> None:
        for _ in range(rng.randint(8, 16)):
            threading.Event().wait(rng.uniform(0, 1))
            fault = rng.choice(FAULTS)
            if fault(self):
                self.faults[fault.__name__] += 1

    def pid(self, name: str) -> int:
        """As the agent has it, without asking it; 0 if no QEMU is there."""
        place = f"{name}{SECOND}" if (self.lab.run / "second" / name).exists() else name
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((self.lab.run / "launched" / f"{place}.pid").read_text().split()[0])
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return pid if f"guest={name}".encode() in words else 0  # else another process has its number now
        return 0

    def kill_agent(self) -> bool:
        self.up.clear()
        self.lab.end_agent(signal.SIGKILL)
        self.revive()
        return True

    def revive(self) -> None:
        """As systemd would; one that finds its disk full may end again."""
        with contextlib.suppress(AssertionError):
            self.lab.start_agent()
        self.up.set()

    def restart_bus(self) -> bool:
        self.up.clear()
        self.lab.end_bus()
        self.lab.agent_ended()
        self.lab.restart_bus()
        self.revive()
        return True

    def hang(self) -> bool:
        """A QEMU that stands still for a while, as one does whose storage is away."""
        pid = self.pid(self.rng.choice(sorted(self.subjects)))
        if pid:
            _send(pid, signal.SIGSTOP)
            threading.Timer(self.rng.uniform(0.1, 4), _send, (pid, signal.SIGCONT)).start()
        return bool(pid)

    def kill_qemu(self) -> bool:
        name = self.rng.choice(sorted(self.subjects))
        pid = self.pid(name)
        if pid:
            self.killed.add(name)
            kill_and_wait(pid)
        return bool(pid)

    def fill_disk(self) -> bool:
        filler = self.lab.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        threading.Timer(self.rng.uniform(0.1, 3), filler.unlink, (True,)).start()
        return True

    def cancel_job(self) -> bool:
        """Whatever job is there."""

        async def cancel() -> bool:
            async with Client.connected(self.lab.address) as client:
                names = await client.call("/org/cpragent1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
                jobs = [path for path in names if "/job/" in path]
                for path in jobs:
                    await client.call(path, "org.cpragent1.Job", "Cancel")
                return bool(jobs)

        with contextlib.suppress(*UNHEARD):
            return asyncio.run(asyncio.wait_for(cancel(), 10))
        return False

    # --- a round

    def round(self) -> None:
        with ThreadPoolExecutor(GUESTS) as pool:
            steps = {
                name: [Step(self.rng.choice(sorted(STEPS)), self.rng.randrange(256)) for _ in range(self.rng.randint(0, 3))]
                for name in self.subjects
            }
            before = dict(zip(steps, pool.map(lambda name: self.live(name, steps[name]), steps), strict=True))
            ends = self.end(pool)
            found = dict(zip(before, pool.map(lambda name: self.judge(name, before[name]), before), strict=True))
            for name, problems in found.items():
                for problem in problems:
                    self.harm[problem.harm] += 1
                    print(f"HARM {problem.harm}: {name} ({steps[name]}, {ends}): {problem.text}", flush=True)
            again = [name for name in found if found[name] or name in self.killed or self.refused[name] > 1]
            list(pool.map(self.renew, again))
        self.killed.clear()

    def end(self, pool: ThreadPoolExecutor) -> list[str]:
        """One act after the other, for as long as there is trouble; and one in peace. Returns their names."""
        trouble = threading.Thread(target=self.inject, args=(random.Random(self.rng.random()),))
        trouble.start()
        ends = []
        while True:
            in_peace = not trouble.is_alive()
            if in_peace:
                self.revive_if_gone()
            end = self.rng.choice(ENDS)
            ends.append(end.__name__)
            self.up.wait(SETTLED_S)
            end(self, pool)
            if in_peace:
                return ends

    def live(self, name: str, steps: list[Step]) -> Seen | None:
        """None if a command has ended its QEMU, which is then as good as killed."""
        on = self.subjects[name]
        try:
            for step in steps:
                on.take(step)
            return look(on)
        except (OSError, ValueError):
            until(lambda: not self.pid(name), f"{name} is gone")
            self.killed.add(name)
            said = (self.lab.root / f"var/log/cpr-agent/{name}.log").read_text()[-1000:]
            print(f"the QEMU of {name} has ended by itself ({steps}): {said}", flush=True)
            return None

    def revive_if_gone(self) -> None:
        (self.lab.state / "filler").unlink(missing_ok=True)
        agent = self.lab._agent
        if agent and agent.poll() is not None:
            self.lab.start_agent()

    def judge(self, name: str, before: Seen | None) -> list[Problem]:
        on = self.subjects[name]
        try:
            self.loads[name] = 0
            until(lambda: self.settled(name), f"{name} stands or runs", SETTLED_S)
            if before is None or (name in self.killed and not self.pid(name)):
                return []
            return harms(on, before)
        except UNHEARD as error:
            return [Problem(Harm.LOST, f"{error}; {self.state(name)}")]

    def state(self, name: str) -> str:
        with contextlib.suppress(*UNHEARD):
            return self.subjects[name].guest.state
        return ""

    def settled(self, name: str) -> bool:
        """Loads what is saved, as an admin would; True once there is nothing more to do."""
        guest = self.subjects[name].guest
        state = self.state(name)
        if state == "saved":
            with contextlib.suppress(*UNHEARD):
                self.loads[name] += 1
                guest.load()
            assert self.loads[name] < LOADS, f"no load of {LOADS} succeeds: {self.lab.log.read_text()[-2000:]}"
            return False
        if not self.pid(name) and name in self.killed:
            return state in ("stopped", "failed")
        with contextlib.suppress(*UNHEARD):
            if state == "paused" and self.subjects[name].status == "postmigrate":  # its save failed, and it stands there
                guest.call("Resume")
                guest.admin("stop")
            return state in STANDS and self.subjects[name].status in STANDS
        return False

    def renew(self, name: str) -> None:
        """Another guest of that name, with other disks."""
        guest = self.subjects[name].guest
        for member, *body in (("Stop", "s", "hard"), ("Discard",)):
            with contextlib.suppress(CallError):
                guest.call(member, *body)
        until(lambda: not self.pid(name), f"{name} is stopped")
        guest.console.unlink()
        shutil.rmtree(self.subjects[name].files)
        self.refused[name] = 0
        self.start(name)

    def start(self, name: str) -> None:
        qemus = list(QEMUS.values())
        self.subjects[name] = subject(self.lab, name, qemus[int(name.removeprefix("web")) % len(qemus)])

    # --- how a round ends

    def told(self, name: str, how: str, *act: Callable[[], None]) -> None:
        try:
            for one in act:
                one()
            self.ends[how] += 1
        except CallError as error:
            self.ends[f"{how}: {error.kind}"] += 1
            self.refused[name] += error.kind == "Blocked"
        except UNHEARD:
            self.ends[f"{how}: unheard"] += 1

    def each_saved(self, pool: ThreadPoolExecutor) -> None:
        guests = [on.guest for on in self.subjects.values()]
        list(pool.map(lambda guest: self.told(guest.name, "save and load", guest.save, guest.load), guests))

    def each_refreshed(self, pool: ThreadPoolExecutor) -> None:
        guests = [on.guest for on in self.subjects.values()]
        list(pool.map(lambda g: self.told(g.name, "refresh", lambda: g.call("Refresh", "a{sv}", {})), guests))

    def all_saved(self, _pool: ThreadPoolExecutor) -> None:
        self.told("", "SaveAll", lambda: self.job("SaveAll", survives="qemu-restart"))
        self.told("", "LoadAll", lambda: self.job("LoadAll"))

    def all_refreshed(self, _pool: ThreadPoolExecutor) -> None:
        self.told("", "RefreshAll", lambda: self.job("RefreshAll", in_turn=False))

    def all_refreshed_in_turn(self, _pool: ThreadPoolExecutor) -> None:
        self.told("", "RefreshAll in turn", lambda: self.job("RefreshAll", in_turn=True))

    def all_rolled_back(self, _pool: ThreadPoolExecutor) -> None:
        self.told("", "SaveAll", lambda: self.job("SaveAll", survives="qemu-restart"))
        self.told("", "Rollback", lambda: self.job("Rollback"))

    def job(self, member: str, **given: bool | str) -> None:
        """Its result is one of the ends."""

        async def run() -> str:
            async with Client.connected(self.lab.address) as client:
                job = await client.start_job(member, None if member == "Rollback" else options(**given))
                return (await job.end(NullWatcher())).result

        self.ends[f"{member}: {asyncio.run(run())[:40]}"] += 1


FAULTS: list[Callable[[Run], bool]] = [
    *(Run.kill_agent, Run.kill_agent, Run.restart_bus, Run.hang, Run.hang, Run.fill_disk, Run.cancel_job, Run.cancel_job),
    *(Run.kill_qemu,),
]
ENDS = [
    Run.each_saved,
    Run.each_refreshed,
    Run.all_saved,
    Run.all_refreshed,
    Run.all_refreshed_in_turn,
    Run.all_rolled_back,
]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def started(rng: random.Random) -> Iterator[Run]:
    """Eight guests of a lab whose agent keeps its state on a file system that can be full."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpr-soak-")))
        shm = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpr-soak-", dir="/dev/shm")))
        tiny = base / "tiny.elf"
        subprocess.run([ROOT / "scripts/guest/build-tiny", tiny], check=True)
        lab = Lab(base / "root", shm, stack.enter_context(private_bus(base)), tiny, next(iter(QEMUS.values())))
        mount = ("mount", "-t", "tmpfs", "-o", f"size={STATE_BYTES},mode=755", "tmpfs")
        subprocess.run([*mount, lab.state], check=True)
        stack.callback(lambda: subprocess.run(["umount", "--lazy", lab.state], check=True))
        lab.exports.mkdir()
        stack.callback(lab.close)
        lab.start_agent()
        run = Run(lab, rng)
        run.up.set()
        with ThreadPoolExecutor(GUESTS) as pool:
            list(pool.map(run.start, [f"web{number}" for number in range(1, GUESTS + 1)]))
        try:
            yield run
        finally:
            shutil.copy(lab.log, ROOT / "build/soak.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    chosen = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    print(f"seed {chosen.seed}; the agent's log will be in build/soak.log", flush=True)
    begun = time.monotonic()
    with started(random.Random(chosen.seed)) as run:
        rounds = 0
        while (ran_s := time.monotonic() - begun) < chosen.hours * 3600:
            run.round()
            rounds += 1
            print(f"{ran_s:.0f} s, round {rounds}: faults {run.faults.total()}", flush=True)
        for about in (run.ends, run.faults):
            print(", ".join(f"{name} {count}" for name, count in sorted(about.items())))
    lost, twice = run.harm[Harm.LOST], run.harm[Harm.LOADED_TWICE]
    print(f"faults {run.faults.total()}, guests lost {lost}, loaded twice {twice}, different {run.harm[Harm.CORRUPTED]}")
    return 1 if run.harm.total() or run.faults.total() < FAULTS_AN_HOUR * chosen.hours else 0


if __name__ == "__main__":
    sys.exit(main())

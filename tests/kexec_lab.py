# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab whose host can be upgraded: real QEMUs and a real agent, with a kexec that only the lab's files know of."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpr_agent.bus.client import CallError
from tests.lab import Lab, until

NEVER = "never"


class KexecLab:
    """``lab``'s ordinary agent is replaced by tests.bus.mortal_agent, with guests' RAM that a kexec keeps."""

    def __init__(self, lab: Lab, guests: int) -> None:
        self.lab = lab
        self.passed: list[str] = []
        os.mkfifo(lab.root / "kexec-said")
        lab.end_agent()
        self.agent(NEVER)
        self.guests = [lab.guest(f"web{number}") for number in range(1, guests + 1)]
        for guest in self.guests:
            guest.start()
        for guest in self.guests:
            guest.until_counts()

    def agent(self, point: str) -> None:
        """Start one that dies at ``point``."""
        (self.lab.root / "points").unlink(missing_ok=True)
        self.lab.start_agent((sys.executable, "-m", "tests.bus.mortal_agent", point), mortal=point != NEVER)

    def points(self) -> list[str]:
        """What the agent has passed since it was started."""
        return (self.lab.root / "points").read_text().splitlines()

    @property
    def under_way(self) -> bool:
        return (self.lab.root / "kexec").exists()

    @property
    def promised(self) -> bool:
        return (self.lab.root / "kexec-ready").exists()

    @property
    def boot(self) -> int:
        path = self.lab.root / "boot"
        return int(path.read_text()) if path.exists() else 0

    def upgrade(self) -> str:
        """Run one until it fails, the agent dies, or the host would go down; returns the result, or ""."""
        result: list[str] = []

        def run() -> None:
            try:
                result.append(self.lab.job("Upgrade"))
            except CallError:
                self.lab.agent_ended()
                result.append("the agent is gone")

        caller = threading.Thread(target=run, daemon=True)
        caller.start()
        until(lambda: result or self.under_way, "the upgrade ends, or the kexec begins")
        return "" if self.under_way else result[0]

    @contextlib.contextmanager
    def stopped_at(self, point: str) -> Iterator[list[str]]:
        """Run an upgrade with an agent that stands still at ``point`` for what is done inside; yields its result, later."""
        self.lab.end_agent()
        self.agent(f"stop {point}")
        agent = self.lab._agent
        assert agent
        result: list[str] = []
        caller = threading.Thread(target=lambda: result.append(self.upgrade()))
        caller.start()
        until(lambda: state(agent.pid) == "T", f"the agent gets to: {point}")
        yield result
        agent.send_signal(signal.SIGCONT)
        caller.join()

    def call_off(self, said: str = "canceled") -> None:
        """What `systemctl cancel` does; an agent that does not wait yet will see that it is over."""
        (self.lab.root / "kexec").unlink()
        with contextlib.suppress(OSError):  # nobody reads
            fifo = os.open(self.lab.root / "kexec-said", os.O_WRONLY | os.O_NONBLOCK)
            with open(fifo, "w") as told:  # noqa: PTH123
                print(said, file=told)

    def reboot(self) -> None:
        """The host goes down with all that runs, and comes back with disk and persistent memory; no agent runs yet."""
        agent = self.lab._agent
        if agent and agent.poll() is None:
            self.lab.end_agent(signal.SIGKILL)
        for path in self.lab.run.glob("vm/*/pid"):
            kill_and_wait(int(path.read_text().split()[0]))
            path.unlink()
        for record in self.lab.run.glob("launched/*.json"):
            record.unlink()
        (self.lab.root / "boot").write_text(str(self.boot + 1))
        (self.lab.root / "by-kexec").unlink(missing_ok=True)
        if self.under_way:
            (self.lab.root / "kexec").rename(self.lab.root / "by-kexec")
        (self.lab.root / "kexec-ready").unlink(missing_ok=True)


def state(pid: int) -> str:
    """Field 3 of /proc/PID/stat (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill_and_wait(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.suppress(ProcessLookupError), open(fd):  # noqa: PTH123 - a descriptor
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        until(lambda: _readable(fd), f"process {pid} ends")


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@dataclass
class Story:
    """Something done to a lab in which the agent is killed at ``point``; then what an admin or the next boot would do."""

    name: str

    def prepare(self, lab: KexecLab) -> None:
        """With an agent that lives."""
        if self.name == "load":
            assert lab.upgrade() == ""
            lab.reboot()

    def act(self, lab: KexecLab) -> None:
        """With an agent that may die."""
        match self.name:
            case "upgrade":
                lab.upgrade()
            case "rollback":
                if lab.upgrade() == "":
                    lab.call_off()
                    until(lambda: settled(lab) or dead(lab), "it is taken back")
            case "load":
                try:
                    lab.lab.job("LoadAll")
                except CallError:
                    lab.lab.agent_ended()

    def finish(self, lab: KexecLab) -> None:
        """A kexec that is under way goes on; the next agent does the rest by itself, or is asked to as at each boot."""
        if lab.under_way:
            lab.reboot()
        if dead(lab):
            lab.agent(NEVER)
        if lab.boot:
            lab.lab.job("LoadAll")
        for guest in lab.guests:
            guest.until_state("running")


def dead(lab: KexecLab) -> bool:
    agent = lab.lab._agent
    return agent is None or agent.poll() is not None


def settled(lab: KexecLab) -> bool:
    """Whether the last upgrade came to an end."""
    try:
        shown: dict[str, Any] = lab.lab.client(lambda client: client.properties("/org/cpragent1", "Manager"))
    except CallError:
        return False
    return shown["LastUpgrade"].get("phase") in ("rolled-back", "refused", "done", "held")


def assert_nobody_noticed(lab: KexecLab) -> None:
    """Each guest is the one that it was, runs once, and can't be loaded again."""
    for guest in lab.guests:
        guest.assert_unbroken()
        assert "manifest.json" not in guest.checkpoint_files()
    assert not lab.promised
    assert not loaded_twice(lab.lab.state / "journal"), "a checkpoint was resumed twice"


def loaded_twice(journal: Path) -> list[str]:
    """Checkpoints that were loaded after their guest ran."""
    spent: set[str] = set()
    bad = []
    for line in journal.read_text().splitlines():
        record = json.loads(line.partition(" ")[2])
        if record["event"] in ("load-begin", "resume") and record["checkpoint"] in spent:
            bad.append(record["checkpoint"])
        if record["event"] in ("resumed", "rollback"):
            spent.add(record["checkpoint"])
    return bad


def every_point(lab: KexecLab, story: Story) -> list[str]:
    """The points that the story passes, found by living through it once."""
    kill_at(lab, story, NEVER)
    return lab.passed


def kill_at(lab: KexecLab, story: Story, point: str) -> bool:
    """Live through the story with an agent that is killed there; returns whether it was."""
    story.prepare(lab)
    if not dead(lab):
        lab.lab.end_agent()
    lab.agent(point)
    story.act(lab)
    killed = dead(lab)
    lab.passed = lab.points()
    story.finish(lab)
    assert_nobody_noticed(lab)
    return killed

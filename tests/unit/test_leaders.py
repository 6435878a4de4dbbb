# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that stands for a VM towards systemd-machined: the real program, by the real launcher, in the real shells."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cpr_agent.daemon import PROGRAMS
from cpr_agent.host import leaders
from cpr_agent.host.leaders import FIFO, UnitLeaders, leader_command, make_fifo
from cpr_agent.host.runner import RunFiles
from tests.samples import launch
from tests.unit.test_runners import open_memory

PATIENCE_S = 20.0
UNIT = "cpr-vm@web1.service"
POWEROFF, REBOOT = signal.SIGRTMIN + 4, signal.SIGINT
QEMU = """
import sys
from cpr_agent.vm.launch import _start_leader
_start_leader(sys.argv[1:], above=20)
import os
print(sorted(map(int, os.listdir("/proc/self/fd")))[-2:], flush=True)
sys.stdin.read()
"""
"""Stands for the launcher, and for QEMU after that."""


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    (tmp_path / "web1").mkdir()
    make_fifo(tmp_path / "web1" / FIFO, None)
    return tmp_path


@pytest.fixture
def qemu(tickets: Path) -> Iterator[subprocess.Popen[str]]:
    command = leader_command(PROGRAMS.launcher, tickets / "web1" / FIFO)
    with subprocess.Popen(
        [sys.executable, "-c", QEMU, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        yield qemu
        qemu.kill()


def leader_of(qemu: subprocess.Popen[str]) -> int:
    assert qemu.stdout
    assert qemu.stdout.readline()
    while not (pid := UnitLeaders(Path()).leader(qemu.pid)):  # it is not the shell yet
        os.sched_yield()
    wait_until_it_reads(pid)
    return pid


def wait_until_it_reads(pid: int) -> None:
    """Its traps are set then. No event tells of it."""
    while "pipe" not in Path(f"/proc/{pid}/wchan").read_text():
        os.sched_yield()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await story()

    asyncio.run(bounded())


def test_each_signal_of_machined_s_is_a_word_to_the_agent(
    tickets: Path, qemu: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaders, "DEAF_S", 0.01)
    pid = leader_of(qemu)

    async def story() -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()
        ears = UnitLeaders(tickets)
        ears.hear(UNIT, heard.put_nowait)
        for number, word in ((POWEROFF, "poweroff"), (REBOOT, "reboot"), (POWEROFF, "poweroff")):
            os.kill(pid, number)
            assert await heard.get() == word
        ears.unhear(UNIT)

    run(story)
    os.kill(pid, POWEROFF)  # nobody hears it, and the leader is not held up
    os.kill(pid, REBOOT)
    assert UnitLeaders(tickets).leader(qemu.pid) == pid


def test_the_leader_ends_with_its_qemu_and_has_nothing_of_it(tickets: Path, qemu: subprocess.Popen[str]) -> None:
    pid = leader_of(qemu)
    open_files = {fd.name: str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert open_files.pop("0").startswith("pipe:")
    assert set(open_files.values()) == {"/dev/null", str(Path(PROGRAMS.launcher).with_name("machine-leader"))}
    pidfd = os.pidfd_open(pid)
    qemu.kill()
    qemu.wait()

    async def story() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        await ended.wait()
        asyncio.get_running_loop().remove_reader(pidfd)

    run(story)
    os.close(pidfd)
    assert UnitLeaders(tickets).leader(qemu.pid) == 0


def test_what_is_written_without_end_is_heard_ever_more_seldom(tickets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a QEMU that a guest has taken over."""
    monkeypatch.setattr(leaders, "DEAF_S", 0.01)
    writer = os.open(tickets / "web1" / FIFO, os.O_RDWR | os.O_NONBLOCK)
    heard: list[float] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        enough = asyncio.Event()

        def hear(word: str) -> None:
            assert word == "poweroff"
            heard.append(loop.time())
            os.write(writer, b"poweroff\n../../etc\n\xff\n")
            if len(heard) == 5:
                enough.set()

        ears = UnitLeaders(tickets)
        ears.hear(UNIT, hear)
        os.write(writer, b"poweroff\n" * 100)
        await enough.wait()
        ears.unhear(UNIT)

    run(story)
    os.close(writer)
    pauses = [after - before for before, after in itertools.pairwise(heard)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 0.1


def test_one_that_waits_until_it_is_heard_is_no_new_one_each_time() -> None:
    before_s = leaders.DEAF_S
    heard = 0
    for _ in range(20):
        before_s = leaders.deafness(before_s, silent_s=0.0)
    assert before_s == leaders.DEAFEST_S
    while before_s > leaders.DEAF_S:
        before_s = leaders.deafness(before_s, silent_s=before_s)
        heard += 1
    assert heard > 5


def test_a_ticket_brings_a_leader_only_where_one_is_wanted(tmp_path: Path) -> None:
    async def story(*, wanted: bool) -> bytes:
        files = RunFiles(tmp_path / "run", tmp_path / "log", PROGRAMS._replace(open_memory=open_memory))
        with files.ticket(launch(user="root", log=str(tmp_path / "web1.log")), "web1", leader=wanted) as offer:
            return offer._message[0]

    assert b"machine-leader" not in asyncio.run(story(wanted=False))
    assert not (tmp_path / "run/tickets/web1" / FIFO).exists()
    assert b"machine-leader" in asyncio.run(story(wanted=True))
    assert (tmp_path / "run/tickets/web1" / FIFO).is_fifo()


def test_a_fifo_that_the_agent_hears_at_is_kept_by_the_next_start(tickets: Path) -> None:
    path = tickets / "web1" / FIFO
    before = path.stat().st_ino
    assert make_fifo(path, None).stat().st_ino == before
    path.unlink()
    path.write_text("no FIFO")
    assert make_fifo(path, None).is_fifo()

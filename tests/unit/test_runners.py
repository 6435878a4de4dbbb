# SPDX-License-Identifier: GPL-2.0-or-later
"""A start that is cancelled: the process that it would have become is found, and ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import pytest

from cpr_agent.core.model import Launch, MemoryIdentity
from cpr_agent.daemon import PROGRAMS
from cpr_agent.host.processes import ProcessPlace
from cpr_agent.host.runner import MAX_LOG_BYTES, Programs, RunFiles
from cpr_agent.host.systemd import UnitPlace
from cpr_agent.host.tickets import Offer
from tests.samples import launch


class SlowSystemd:
    """Stands for host.systemd.Systemd: a unit has a process once its job is done, and the job needs no caller for that."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.boots = False
        self.modes: list[str] = []
        self._job: asyncio.Task[None] | None = None

    def booting(self) -> bool:
        return self.boots

    async def start_unit(self, name: str, mode: str) -> str:  # noqa: ARG002
        self.modes.append(mode)
        self._job = asyncio.ensure_future(self._start())
        self.asked.set()
        await asyncio.shield(self._job)
        return "done"

    async def _start(self) -> None:
        await self.go.wait()
        self.processes.append(process())

    def main_pid(self, name: str) -> int:  # noqa: ARG002
        return next((process.pid for process in self.processes if process.poll() is None), 0)

    def kill_unit(self, name: str) -> None:  # noqa: ARG002
        for process in self.processes:
            process.kill()
            process.wait()

    def forget_failure(self, name: str) -> None:
        pass

    def reload(self) -> None:
        pass


def process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])


def open_memory(node: str, wanted: MemoryIdentity) -> int:  # noqa: ARG001
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def files(tmp_path: Path, programs: Programs = PROGRAMS) -> RunFiles:
    return RunFiles(tmp_path / "run", tmp_path / "log", programs._replace(open_memory=open_memory))


class Installed:
    """Stands for host.systemd.Setup, which has nothing to install."""

    async def vm(self, launch: Launch, run_dir: Path, places: tuple[str, str]) -> None:
        pass


def test_a_unit_whose_start_is_cancelled_is_ended_by_a_kill(tmp_path: Path) -> None:
    async def story() -> None:
        slow = SlowSystemd()
        place = UnitPlace("web1", "web1", files(tmp_path), slow, Installed())  # type: ignore[arg-type]  # all that is used
        start = asyncio.ensure_future(place.start(launch(user="root", log=str(tmp_path / "web1.log"))))
        await slow.asked.wait()
        start.cancel()
        await asyncio.sleep(0)
        slow.go.set()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert await place.pid()
        await place.kill()
        assert not await place.pid()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("boots", "kind", "mode"),
    [
        (True, "load", "ignore-dependencies"),
        (True, "start", "replace"),
        (False, "load", "replace"),
    ],
)
def test_a_guest_that_is_loaded_while_the_host_boots_does_not_wait_for_the_order_of_its_unit(
    tmp_path: Path, *, boots: bool, kind: Literal["start", "load"], mode: str
) -> None:
    async def story() -> None:
        systemd = SlowSystemd()
        systemd.boots = boots
        place = UnitPlace("web1", "web1", files(tmp_path), systemd, Installed())  # type: ignore[arg-type]  # all that is used
        start = asyncio.ensure_future(place.start(launch(user="root", log=str(tmp_path / "web1.log"), kind=kind)))
        await systemd.asked.wait()
        start.cancel()
        systemd.go.set()
        with pytest.raises(asyncio.CancelledError):
            await start
        await place.kill()
        assert systemd.modes == [mode]

    asyncio.run(story())


def test_the_signal_that_has_ended_a_unit_is_told_but_for_a_kill(tmp_path: Path) -> None:
    class Ended(SlowSystemd):
        def main_signal(self, name: str) -> int:
            return 31 if name == "cpr-vm@web1.service" else 0

    async def story() -> None:
        ended = Ended()
        place = UnitPlace("web1", "web1", files(tmp_path), ended, Installed())  # type: ignore[arg-type]  # all that is used
        assert await place.ended_by(0.0) == 31
        ended.processes.append(process())
        assert await place.ended_by(0.0) == 0
        await place.kill()
        assert await place.ended_by(0.0) == 0

    asyncio.run(story())


def test_a_process_whose_start_is_cancelled_leaves_no_zombie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text("import signal\nsignal.pause()\n")
    waits, until_ready = asyncio.Event(), Offer.until_ready

    async def wait(offer: Offer, pid: int, timeout_s: float) -> bool:
        waits.set()
        return await until_ready(offer, pid, timeout_s)

    monkeypatch.setattr(Offer, "until_ready", wait)

    async def story() -> None:
        place = ProcessPlace("web1", "web1", files(tmp_path, PROGRAMS._replace(launcher=str(launcher))))
        start = asyncio.ensure_future(place.start(launch(user="root", log=str(tmp_path / "web1.log"))))
        await waits.wait()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        pid = await place.pid()
        record = files(tmp_path).pid_file("web1")
        assert int(record.read_text().split()[0]) == pid
        assert record.parent.stat().st_mode & 0o777 == 0o700  # root's, or a VM's user could name any process
        await place.kill()
        for _ in range(10):  # the loop reaps it, once it is told
            await asyncio.sleep(0)
        assert pid
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(story())


def test_a_directory_in_the_place_of_the_admin_s_socket_keeps_no_qemu_from_its_place(tmp_path: Path) -> None:
    """The VM's user owns the directory that it is in."""
    run_files = files(tmp_path)
    (run_files.directory("web1") / "admin.sock/full").mkdir(parents=True)
    run_files.adopt("web1")
    assert run_files.own("web1") == "web1:b"
    run_files.point_admin("web1")
    run_files.adopt("web1")
    assert run_files.own("web1") == "web1"


def test_the_log_of_a_qemu_that_is_about_to_end_is_bounded_too(tmp_path: Path) -> None:
    run_files = files(tmp_path)
    run_files.log("web1").parent.mkdir()
    for log in (run_files.log("web1"), Path(f"{run_files.log('web1')}.1")):
        log.write_bytes(b"x" * (MAX_LOG_BYTES + 1))
        run_files.trim_logs()
        assert log.stat().st_size < MAX_LOG_BYTES

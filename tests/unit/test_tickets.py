# SPDX-License-Identifier: GPL-2.0-or-later
"""The ticket of a start: handed over once, to the VM's user alone, and never left lying."""

from __future__ import annotations

import asyncio
import marshal
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cpr_agent.core.model import MemoryIdentity
from cpr_agent.daemon import PROGRAMS
from cpr_agent.host.runner import RunFiles
from cpr_agent.host.tickets import Offer, offered
from cpr_agent.vm.launch import TICKET, RefusedError, take_ticket
from tests.samples import launch

NOBODY = 65534
SOURCE = Path(__file__).parents[2] / "agent"


def test_a_ticket_is_good_for_one_start_and_brings_its_descriptors(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.write_text("RAM")

    async def story() -> None:
        with (
            file.open() as ram,
            offered(tmp_path / TICKET, Offer(marshal.dumps({"argv": ["qemu"]}), [ram.fileno()], [0]), None),
        ):
            _, ticket, (fd,) = await asyncio.to_thread(take_ticket, str(tmp_path))
            assert ticket == {"argv": ["qemu"]}
            assert os.read(fd, 3) == b"RAM"
            os.close(fd)
            with pytest.raises(RefusedError, match="there is no ticket"):
                take_ticket(str(tmp_path))

    asyncio.run(story())


def test_the_launcher_says_that_it_is_ready_or_is_seen_to_have_ended(tmp_path: Path) -> None:
    async def story(*, ready: bool) -> bool:
        with offered(tmp_path / TICKET, Offer(marshal.dumps({}), [], [0]), None) as offer:
            agent, _, _ = await asyncio.to_thread(take_ticket, str(tmp_path))
            if ready:
                agent.send(b"R")
            agent.close()
            return await offer.until_ready(os.getpid(), 60)

    assert asyncio.run(story(ready=True))
    assert not asyncio.run(story(ready=False))


def test_no_ticket_outlives_its_offer(tmp_path: Path) -> None:
    async def story() -> None:
        with offered(tmp_path / TICKET, Offer(marshal.dumps({}), [], [0]), None):
            pass
        with pytest.raises(RefusedError, match="there is no ticket"):
            take_ticket(str(tmp_path))

    asyncio.run(story())


def test_an_answer_that_is_no_ticket_starts_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        with offered(tmp_path / TICKET, Offer(b"{}", [], [0]), None), pytest.raises(RefusedError, match="gave no ticket"):
            await asyncio.to_thread(take_ticket, str(tmp_path))

    asyncio.run(story())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_gets_none_and_the_vm_s_own_still_does(tmp_path: Path) -> None:
    """The socket is open to everybody here: the answer depends on who asks."""
    ask = (
        f"import os, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid(int(sys.argv[1]))\n"
        f"sys.path.insert(0, {str(SOURCE)!r})\n"
        f"from cpr_agent.vm.launch import take_ticket; print(take_ticket({str(tmp_path)!r})[1])"
    )

    def asked(uid: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", ask, str(uid)], capture_output=True, text=True, check=False)

    async def story() -> None:
        for parent in (tmp_path, *tmp_path.parents):
            parent.chmod(parent.stat().st_mode | 0o011)
        with offered(tmp_path / TICKET, Offer(marshal.dumps({"argv": ["qemu"]}), [], [NOBODY]), None):
            (tmp_path / TICKET).chmod(0o666)
            assert "gave no ticket" in (await asyncio.to_thread(asked, NOBODY - 1)).stderr
            assert "qemu" in (await asyncio.to_thread(asked, NOBODY)).stdout

    asyncio.run(story())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_a_vm_s_user_owns_is_the_directories_of_its_sockets_alone(tmp_path: Path) -> None:
    """By enumeration, so that a file that is added counts."""

    def open_memory(node: str, wanted: MemoryIdentity) -> int:  # noqa: ARG001
        return os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT, 0o600)

    async def story() -> list[Path]:
        files = RunFiles(tmp_path / "run", tmp_path / "log", PROGRAMS._replace(open_memory=open_memory))
        plan = launch(user="nobody", log=str(tmp_path / "log/web1.log"), sockets={"/run/cpr-agent/vm/web1/agent.sock": 11})
        with files.ticket(plan, "web1"):
            directory = files.ticket_directory("web1")
            files.pid_file("web1").write_text("1 1")
            assert (directory / TICKET).stat().st_uid == NOBODY
            assert stat.S_IMODE((directory / TICKET).stat().st_mode) == 0o600
        return [path for path in tmp_path.rglob("*") if path.stat().st_uid == NOBODY or path.stat().st_mode & 0o002]

    assert sorted(asyncio.run(story())) == [tmp_path / "run/vm/web1", tmp_path / "run/vm/web1:b"]

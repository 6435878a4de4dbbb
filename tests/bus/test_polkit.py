# SPDX-License-Identifier: GPL-2.0-or-later
"""What polkit says is what happens to callers other than root; without a clear yes it is a no."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cpr_agent.bus.authority import Authority, TimedOutError
from cpr_agent.bus.contract import BUS_NAME
from cpr_agent.bus.contract import ROOT as OBJECT
from cpr_agent.bus.library import Message, MessageFlag
from cpr_agent.bus.service import Service
from tests.lab import PATIENCE_S, ROOT, Lab, let_others_in

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

AS_NOBODY = (
    "import os; from cpr_agent.cli.main import main; import cpr_agent.cli.tables, rich.console, rich.table; "
    "os.setgroups([]); os.setgid(65534); os.setuid(65534); main()"
)


@pytest.fixture
def polkit(lab: Lab) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(answer: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bus.fake_polkit", lab.address, answer],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    let_others_in(lab)
    yield start
    for process in started:
        process.terminate()
        process.wait(PATIENCE_S)
        assert process.stdout
        process.stdout.close()


def cprctl_as_nobody(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *arguments],
        env={**os.environ, "CPR_AGENT_BUS_ADDRESS": lab.address},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def asked(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().split()[0]


def test_who_is_authorized_may(lab: Lab, polkit: Callable[[str], subprocess.Popen[str]]) -> None:
    guest = lab.running()
    authority = polkit("yes")
    for arguments, action in (
        (("list",), "inspect"),
        (("save", "web1", "--survives", "qemu-restart"), "save"),
        (("load", "web1"), "load"),
    ):
        ended = cprctl_as_nobody(lab, *arguments, "--json")  # rich would import more while it draws, and nobody may read it
        assert ended.returncode == 0, ended
        assert asked(authority) == f"org.cpragent1.{action}"
        if action != "inspect":
            assert asked(authority) == "org.cpragent1.inspect"  # cprctl shows the VM afterwards
        else:
            assert asked(authority) == "org.cpragent1.inspect"  # each VM's properties
    guest.assert_unbroken()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("no", "not authorized to save virtual machines. Nothing was done. Use sudo"),
        ("challenge", "not authorized to save virtual machines. Nothing was done. Use sudo"),
        ("error", "could not be checked whether you may do this (out of order)"),
    ],
)
def test_who_is_not_authorized_may_not(
    lab: Lab, polkit: Callable[[str], subprocess.Popen[str]], answer: str, said: str
) -> None:
    guest = lab.running()
    polkit(answer)
    ended = cprctl_as_nobody(lab, "save", "web1")
    assert ended.returncode == 77, ended
    assert said in ended.stderr
    assert "org.cpragent1" not in ended.stderr
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


def test_a_file_is_a_guest_s_ram_for_root_alone(lab: Lab, polkit: Callable[[str], subprocess.Popen[str]]) -> None:
    """The agent makes such a file, with the rights of root."""
    polkit("yes")
    path = lab.shm / "ram"
    refused = cprctl_as_nobody(lab, "adopt", "web1", f"--device={path}", "--yes", "--json")
    assert refused.returncode == 77, refused
    assert "root alone" in refused.stderr
    assert not path.exists()
    by_device = cprctl_as_nobody(lab, "adopt", "web1", "--device=/dev/dax0.0", "--yes", "--json")
    assert "root alone" not in by_device.stderr


CALL_AS_NOBODY = """
import asyncio, os, sys
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag
from dbus_next.message import Message
os.setgroups([]); os.setgid(65534); os.setuid(65534)

async def main(address, flags):
    bus = await MessageBus(address).connect()
    where = ("org.cpragent1", "/org/cpragent1", "org.cpragent1.Manager", "Reload")
    reply = await bus.call(Message(*where, flags=MessageFlag(int(flags))))
    print(reply.error_name, *reply.body)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("flags", "asked_with"), [(MessageFlag.NONE, "0"), (MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION, "1")]
)
def test_polkit_may_ask_the_user_only_if_the_call_allows_that(
    lab: Lab, polkit: Callable[[str], subprocess.Popen[str]], flags: MessageFlag, asked_with: str
) -> None:
    authority = polkit("challenge")
    command = [sys.executable, "-c", CALL_AS_NOBODY, lab.address, str(flags.value)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert "org.cpragent1.Error.AccessDenied" in said
    assert ("Call again with interactive authorization" if asked_with == "0" else "Use sudo") in said
    assert authority.stdout
    assert authority.stdout.readline().split() == ["org.cpragent1.manage-vms", asked_with]


def test_a_password_that_nobody_types_is_not_waited_for_any_more(
    lab: Lab, polkit: Callable[[str], subprocess.Popen[str]]
) -> None:
    authority = polkit("silence")

    async def ask() -> None:
        bus = await Service.connect(lab.address)
        caller = str(bus.unique_name)
        call = Message(BUS_NAME, OBJECT, f"{BUS_NAME}.Manager", "Reload", sender=caller)
        call.flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        asking = Authority(bus, interactive_timeout_s=0.1)
        asking._uids[caller] = asyncio.create_task(_somebody())
        with pytest.raises(TimedOutError, match="did not answer within"):
            await asking.require(call, f"{BUS_NAME}.manage-vms")
        await asking._uid(caller)  # an answer to this means that all before it was sent
        bus.disconnect()

    asyncio.run(ask())
    assert authority.stdout
    assert authority.stdout.readline().split() == ["org.cpragent1.manage-vms", "1"]
    assert authority.stdout.readline() == "cancelled\n"


async def _somebody() -> int:
    return 1000

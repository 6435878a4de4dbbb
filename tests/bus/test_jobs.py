# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: seen from outside while they run, cancelled, and in the way of other calls."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cpr_agent.bus.client import CallError, Client, plain
from cpr_agent.bus.contract import read_contract
from cpr_agent.bus.library import Message, Variant
from cpr_agent.bus.service import ENDED_JOBS
from tests.lab import PATIENCE_S, Guest, Lab, script

ROOT = "/org/cpragent1"
MANAGER = "org.cpragent1.Manager"


@pytest.fixture
def waiting(lab: Lab, tmp_path: Path) -> Guest:
    """Saved, and its next QEMU waits for a writer at the FIFO "gate", as long as there is one."""
    gate = tmp_path / "gate"
    qemu = script(
        tmp_path / "qemu",
        f'#!/bin/sh\ncase "$*" in *-incoming*) [ ! -e {gate} ] || read line <{gate};; esac\nexec {lab.qemu} "$@"\n',
    )
    guest = lab.guest(qemu=qemu)
    guest.start()
    guest.until_counts()
    guest.save()
    os.mkfifo(gate)
    return guest


async def signals(client: Client) -> asyncio.Queue[tuple[str, list[Any]]]:
    """The Manager's signals from here on."""
    queue: asyncio.Queue[tuple[str, list[Any]]] = asyncio.Queue()

    def on_message(message: Message) -> bool:
        if message.interface == MANAGER and message.member in ("JobNew", "JobRemoved"):
            queue.put_nowait((message.member, message.body))
        return False

    client._bus.add_message_handler(on_message)
    daemon = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch")
    await client._send(Message(*daemon, signature="s", body=[f"type='signal',interface='{MANAGER}'"]))
    return queue


async def main_pid(client: Client) -> int:
    return int((await client.vm_properties("web1"))["MainPID"])


async def until_loading(client: Client, old: int) -> None:
    """Until another QEMU than the ``old`` one is there, which waits at the gate."""
    while (shown := await client.vm_properties("web1"))["State"] != "loading" or shown["MainPID"] in (0, old):
        pass  # each look is a call over the bus


def test_a_job_can_be_watched_and_cancelled(lab: Lab, waiting: Guest, tmp_path: Path) -> None:
    async def cancel() -> None:
        async with Client.connected(lab.address) as client, asyncio.timeout(PATIENCE_S):
            queue = await signals(client)
            old = await main_pid(client)
            path = await client.manager("LoadAll", "a{sv}", {})
            name, (number, job) = await queue.get()
            assert (name, job) == ("JobNew", path)
            await until_loading(client, old)
            shown = await client.properties(path, "Job")
            assert (shown["Id"], shown["Kind"], shown["State"]) == (number, "load-all", "running")
            assert shown["Step"] == "loading web1"
            assert (shown["Cancellable"], shown["Progress"], shown["EndedAt"]) == (True, 0.0, 0.0)
            assert shown["Guests"]["web1"]["step"] == "loading"
            assert (await client.properties(ROOT, "Manager"))["Jobs"] == [path]
            xml = await client.call(path, "org.freedesktop.DBus.Introspectable", "Introspect")
            live = {e.attrib["name"]: e for e in ElementTree.fromstring(xml).iter("interface")}  # noqa: S314 - our own
            contract = read_contract()["org.cpragent1.Job"]
            assert ElementTree.tostring(live["org.cpragent1.Job"]).split() == ElementTree.tostring(contract.xml).split()
            await client.call(path, "org.cpragent1.Job", "Cancel")
            assert await queue.get() == ("JobRemoved", [number, path, "cancelled", {}])
            shown = await client.properties(path, "Job")  # who comes late can still read it
            assert (shown["State"], shown["Result"], shown["Cancellable"]) == ("cancelled", "cancelled", False)
            assert shown["Guests"]["web1"]["step"] == "failed"
            assert shown["StartedAt"] < shown["EndedAt"]
            assert (await client.properties(ROOT, "Manager"))["Jobs"] == []
            with pytest.raises(CallError, match="is over"):
                await client.call(path, "org.cpragent1.Job", "Cancel")

    asyncio.run(cancel())
    assert waiting.state == "saved"
    assert waiting.pid == 0
    (tmp_path / "gate").unlink()
    waiting.load()
    waiting.assert_unbroken()


def test_a_load_of_all_beside_another_is_refused(lab: Lab, waiting: Guest, tmp_path: Path) -> None:
    async def beside() -> None:
        async with Client.connected(lab.address) as client, asyncio.timeout(PATIENCE_S):
            queue = await signals(client)
            old = await main_pid(client)
            await client.manager("LoadAll", "a{sv}", {})
            await until_loading(client, old)
            await client.manager("LoadAll", "a{sv}", {})
            while (news := await queue.get())[0] != "JobRemoved":
                pass
            assert plain(news[1][3])["kind"] == "Busy"
            await asyncio.to_thread((tmp_path / "gate").write_text, "go\n")
            assert (await queue.get())[1][2] == "done"

    asyncio.run(beside())
    waiting.assert_unbroken()


def test_an_ended_job_stays_for_a_while_and_many_do_not(lab: Lab) -> None:
    """A caller who makes one after the other can't fill the agent with them."""

    async def many() -> list[str]:
        async with Client.connected(lab.address) as client:
            for _ in range(ENDED_JOBS + 8):
                await client.run_job("LoadAll", {})
            return list(await client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"))

    assert asyncio.run(many()) == [f"{ROOT}/job/{number}" for number in range(9, ENDED_JOBS + 9)]


def test_a_call_can_wait_for_the_end_of_its_job(lab: Lab, waiting: Guest, tmp_path: Path) -> None:
    """As cpr-load.service calls it: by busctl alone."""
    wait = {"wait": Variant("b", True)}

    async def over(answer: str) -> Any:
        async with Client.connected(lab.address) as client, asyncio.timeout(PATIENCE_S):
            old = await main_pid(client)
            loading = asyncio.create_task(client.manager("LoadAll", "a{sv}", wait))
            await until_loading(client, old)
            assert not loading.done()
            await (asyncio.to_thread((tmp_path / "gate").write_text, "go\n") if answer else cancel(client))
            return await loading

    async def cancel(client: Client) -> None:
        (job,) = (await client.properties(ROOT, "Manager"))["Jobs"]
        await client.call(job, "org.cpragent1.Job", "Cancel")

    with pytest.raises(CallError, match=r"\(load-all\) was cancelled"):
        asyncio.run(over(""))
    assert asyncio.run(over("go")).startswith(f"{ROOT}/job/")
    waiting.assert_unbroken()
    nothing = lab.client(lambda client: client.manager("LoadAll", "a{sv}", wait))
    assert nothing.startswith(f"{ROOT}/job/")
    waiting.save()
    manifest = lab.state / "checkpoints/web1/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(CallError, match="manifest.*cannot be read") as failed:
        lab.client(lambda client: client.manager("LoadAll", "a{sv}", wait))
    assert failed.value.kind == "LoadFailed"


def test_a_vm_in_the_middle_of_a_load_is_busy(lab: Lab, waiting: Guest, tmp_path: Path) -> None:
    async def meet() -> None:
        async with Client.connected(lab.address) as client, asyncio.timeout(PATIENCE_S):
            old = await main_pid(client)
            loading = asyncio.create_task(client.vm("web1", "CprLoad", "sa{sv}", "", {}))
            await until_loading(client, old)
            for member, signature, body in (
                ("CprSave", "ssa{sv}", ["", "reboot", {}]),
                ("CprLoad", "sa{sv}", ["", {}]),
                ("Stop", "s", ["hard"]),
                ("Start", "", []),
                ("Discard", "", []),
            ):
                with pytest.raises(CallError, match="in the middle of load") as caught:
                    await client.vm("web1", member, signature, *body)
                assert caught.value.kind == "Busy"
            await asyncio.to_thread((tmp_path / "gate").write_text, "go\n")
            await loading

    asyncio.run(meet())
    waiting.assert_unbroken()


def test_an_agent_that_is_killed_in_the_middle_of_a_load_goes_on_with_it(lab: Lab, waiting: Guest, tmp_path: Path) -> None:
    async def kill() -> None:
        async with Client.connected(lab.address) as client, asyncio.timeout(PATIENCE_S):
            old = await main_pid(client)
            loading = asyncio.create_task(client.vm("web1", "CprLoad", "sa{sv}", "", {}))
            await until_loading(client, old)
            await asyncio.to_thread(lab.end_agent, 9)
            with pytest.raises(CallError):
                await loading

    asyncio.run(kill())
    (tmp_path / "gate").write_text("go\n")  # that QEMU becomes one that waits for a state
    (tmp_path / "gate").unlink()  # before there is an agent, whose own load would wait at it
    lab.start_agent()
    waiting.until_state("running")
    waiting.assert_unbroken()


def test_findings_and_managed_objects_are_plain_data(lab: Lab, waiting: Guest) -> None:
    async def look() -> Any:
        async with Client.connected(lab.address) as client:
            objects = await client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
            return plain(objects)

    objects = asyncio.run(look())
    assert list(objects) == [f"{ROOT}/vm/web1"]
    shown = objects[f"{ROOT}/vm/web1"]["org.cpragent1.VM"]
    assert set(shown) == set(read_contract()["org.cpragent1.VM"].properties)
    assert shown["State"] == "saved"
    assert waiting.state == "saved"

# SPDX-License-Identifier: GPL-2.0-or-later
"""The hook under a real libvirtd, with a stand-in for the agent: when libvirt calls it, and what becomes of a refusal."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.domains.hook_server import HookRequest, HookServer
from tests.libvirt.bed import RELEASES
from tests.libvirt.conftest import root_of
from tests.libvirt.lab import Domain, LibvirtLab, libvirt_lab

GATE = "/run/cpr-agent/gate"
ADDED = """<qemu:commandline>
  <qemu:arg value='-object'/>
  <qemu:arg value='memory-backend-file,id=cpr-ram,mem-path={gate}/web1/ram,share=on,size={size}'/>
  <qemu:arg value='-machine'/>
  <qemu:arg value='memory-backend=cpr-ram'/>
</qemu:commandline>"""
SIZE = 64 << 20


class StandIn:
    """In the agent's place, outside of the bed: it opens the gate in ``prepare``, and refuses what it is told to refuse."""

    def __init__(self, lab: LibvirtLab) -> None:
        self.heard: list[tuple[str, str]] = []
        self.refused = ""
        self._gate = lab.bed.path(GATE)
        self._ram = lab.bed.shm / "web1"
        self._gate.mkdir(parents=True)
        self._server = HookServer(lab.bed.path("/run/cpr-agent/hook.sock"), self._decide)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    async def _decide(self, request: HookRequest) -> str:
        assert request.domain == "web1"
        assert request.waiting
        self.heard.append((request.operation, request.sub_operation))
        if request.operation == self.refused:
            return "its guest waits for another one"
        if request.operation == "prepare":
            (self._gate / "web1").mkdir()
            (self._gate / "web1/ram").symlink_to(self._ram)
        elif (self._gate / "web1").exists():
            shutil.rmtree(self._gate / "web1")
        return ""

    async def _open(self) -> None:
        self._server.open()

    def open(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def calls(self) -> list[tuple[str, str]]:
        heard, self.heard = self.heard, []
        return heard


START = [("prepare", "begin"), ("started", "begin")]
END = [("release", "end")]


@pytest.fixture(params=list(RELEASES))
def domain(request: pytest.FixtureRequest, tmp_path: Path, tiny: Path) -> Iterator[Domain]:
    """With the part that an adoption adds, and no agent."""
    root_of(request.param)
    with libvirt_lab(request.param, tmp_path, tiny) as lab:
        domain = lab.domain()
        xml = domain.virsh("dumpxml", "--inactive")
        namespace = "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' "
        xml = xml.replace("<domain ", namespace, 1).replace(
            "<metadata>", "<metadata><cpr:vm xmlns:cpr='urn:org.cpragent1:domain:1'/>"
        )
        domain.define_xml(xml.replace("</domain>", ADDED.format(gate=GATE, size=SIZE) + "</domain>"))
        ram = lab.bed.shm / "web1"
        ram.touch(mode=0o666)
        ram.chmod(0o666)
        os.truncate(ram, SIZE)
        yield domain


@pytest.fixture
def agent(domain: Domain) -> Iterator[StandIn]:
    stand_in = StandIn(domain.lab)
    stand_in.open()
    yield stand_in
    stand_in.close()


def test_libvirt_asks_before_a_start_and_before_a_saved_guest_goes_on(domain: Domain, agent: StandIn) -> None:
    domain.virsh("start")
    assert agent.calls() == START
    mapped = domain.bed.run("cat", f"/proc/{domain.qemu_pid}/maps").stdout
    assert str(domain.bed.shm / "web1") in mapped
    domain.virsh("managedsave")
    assert agent.calls() == END
    domain.virsh("start")
    assert agent.calls() == START
    domain.bed.restart_libvirtd()
    assert domain.libvirt_state == "running"
    domain.virsh("destroy")
    assert agent.calls() == END


def test_a_refusal_shows_in_virsh_and_changes_nothing(domain: Domain, agent: StandIn) -> None:
    agent.refused = "prepare"
    assert "cpr-agent: its guest waits for another one" in domain.refused("start")
    assert agent.calls() == [*START[:1], *END]
    assert domain.libvirt_state == "shut off"
    agent.refused = ""
    domain.virsh("start")
    domain.virsh("managedsave")
    image = domain.image().read_bytes()
    for agent.refused in ("prepare", "started"):
        assert "cpr-agent: its guest waits for another one" in domain.refused("start")
        assert domain.libvirt_state == "shut off"
        assert domain.image().read_bytes() == image
    agent.refused = ""
    domain.virsh("start")


def test_without_an_agent_no_way_of_libvirt_s_reaches_the_memory(domain: Domain) -> None:
    domain.bed.path(GATE).mkdir(parents=True)
    with domain.untouched():
        said = domain.refused("start")
        assert "cpr-agent: the agent does not answer" in said
        domain.refused("start", "--force-boot")
        domain.bed.path("/etc/libvirt/hooks/qemu.d/cpr-agent").unlink()
        assert "No such file or directory" in domain.refused("start"), "the gate is closed, whoever starts it"
        with domain.bed.path("/etc/libvirt/qemu.conf").open("a") as settings:
            settings.write('user = "root"\ngroup = "root"\n')
        domain.bed.restart_libvirtd()
        assert "No such file or directory" in domain.refused("start"), "for a QEMU of root's, too"


def test_a_domain_that_is_not_adopted_starts_without_an_agent(domain: Domain) -> None:
    plain = domain.lab.domain("plain")
    plain.virsh("start")
    assert plain.libvirt_state == "running"
    plain.virsh("managedsave")
    plain.virsh("start")
    plain.virsh("destroy")


def test_a_domain_that_is_not_adopted_starts_while_the_agent_hangs(domain: Domain) -> None:
    path = domain.bed.path("/run/cpr-agent/hook.sock")
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        plain = domain.lab.domain("plain")
        plain.virsh("start")
        assert plain.libvirt_state == "running"

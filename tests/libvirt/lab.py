# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/lab.py on a bed: a private bus, a real agent, a real libvirtd, domains as virt-install writes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.lab import ROOT, Guest, Lab, QmpRefused, private_bus, until
from tests.libvirt.bed import ENVIRONMENT, Bed, Inside
from tests.libvirt.domains import QCOW2, domain_xml

IMAGES = "/var/lib/libvirt/images"
SAVED = "/var/lib/libvirt/qemu/save"
AGENT = ("/usr/sbin/cpr-agentd", "--runner", "process")


class Domain(Guest):
    """A domain with the tiny guest, as its admin sees it in virsh and in cprctl."""

    lab: LibvirtLab

    @property
    def bed(self) -> Bed:
        return self.lab.bed

    def virsh(self, act: str, *options: str, check: bool = True) -> str:
        return self.bed.virsh(act, self.name, *options, check=check)

    @property
    def libvirt_state(self) -> str:
        return self.virsh("domstate")

    @property
    def xml(self) -> ElementTree.Element:
        return ElementTree.fromstring(self.virsh("dumpxml", "--inactive"))  # noqa: S314 - libvirt's own

    def define_xml(self, xml: str) -> None:
        path = self.lab.root / f"{self.name}.xml"
        path.write_text(xml)
        self.bed.virsh("define", str(path))

    @property
    def qemu_pid(self) -> int:
        """One of the bed's; 0 if it does not run."""
        try:
            return int(self.bed.path(f"/run/libvirt/qemu/{self.name}.pid").read_text())
        except FileNotFoundError:
            return 0

    def adopt(self, *options: str) -> None:
        """Its RAM gets a file, as an own VM's does."""
        done = self.lab.cprctl("adopt", self.name, "--yes", f"--device={self.ram}", *options)
        assert done.returncode == 0, done.stderr

    def admin(self, command: str, /, **arguments: Any) -> Any:
        """By libvirt's pass-through: a domain has no monitor for admins."""
        reply = json.loads(self.virsh("qemu-monitor-command", json.dumps({"execute": command, "arguments": arguments})))
        if "return" not in reply:
            raise QmpRefused(reply)
        return reply["return"]

    def refused(self, act: str, *options: str) -> str:
        """virsh must fail, and say why; returns that."""
        result = self.bed.run("virsh", "--quiet", act, self.name, *options, check=False)
        assert result.returncode, f"virsh {act} {self.name} was to fail, and did not: {result.stdout}"
        return result.stderr

    def until_libvirt(self, state: str) -> None:
        until(lambda: self.libvirt_state == state, f"{self.name} is {state} to libvirt, it is {self.libvirt_state}")

    def forget_console(self) -> None:
        """What the guest has said before does not count."""
        self.console.write_bytes(b"")

    def digest(self) -> str:
        """Of its RAM."""
        with self.ram.open("rb") as ram:
            return hashlib.file_digest(ram, "sha256").hexdigest()

    def assert_whole_to_libvirt(self) -> None:
        """A save by hand contains its RAM: the capability, which would leave that out, is off."""
        image = self.lab.root / f"{self.name}.by-hand"
        self.virsh("save", str(image))
        self.until_state("stopped")
        self.ram.write_bytes(b"\xaa" * self.ram.stat().st_size)
        self.bed.virsh("restore", str(image))
        image.unlink()
        self.assert_unbroken()

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever is tried, its RAM stays as it was."""
        before = self.digest()
        yield
        assert self.digest() == before, f"the RAM of {self.name} was written to"

    def image(self) -> Path:
        """What `virsh managedsave` would have left, and what `virsh start` takes up."""
        return self.bed.path(f"{SAVED}/{self.name}.save")


class LibvirtLab(Lab):
    """The agent runs in the bed, with the bed's own Python and the paths of an installed one."""

    program = AGENT

    def __init__(self, bed: Bed, bus: tuple[str, subprocess.Popen[str]], tiny: Path) -> None:
        self.bed = bed
        super().__init__(bed.scratch / "root", bed.shm, bus, tiny, "/usr/bin/qemu-system-x86_64")
        self.definitions = bed.path("/etc/cpr-agent/vms")
        self.state = bed.path("/var/lib/cpr-agent")
        self.run = bed.path("/run/cpr-agent")
        for directory in (self.definitions, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        kernel = bed.path(f"{IMAGES}/tiny.elf")
        shutil.copy(tiny, kernel)
        kernel.chmod(0o644)
        self.root.chmod(0o755)
        self.tiny = Path(IMAGES) / "tiny.elf"

    def settings(self, **sections: dict[str, object]) -> None:
        super().settings(**sections)
        place = self.bed.path("/etc/cpr-agent/agent.toml")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / "etc/cpr-agent/agent.toml", place)

    def _spawn(self, program: tuple[str, ...]) -> Inside:
        if program[0] == sys.executable:  # one of the tests
            program = ("/usr/bin/python3", *program[1:], "--root=/", f"--files={self.root}")
        with self.log.open("ab") as log:
            return self.bed.popen(*program, f"--bus-address={self.address}", stderr=log, env=self.environment())

    @property
    def agent_process(self) -> subprocess.Popen[Any]:
        assert self._agent
        return self._agent

    def environment(self) -> dict[str, str]:
        """Of what runs in the bed."""
        return {
            **ENVIRONMENT,
            "PYTHONPATH": f"{ROOT / 'agent'}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CPR_AGENT_BUS_ADDRESS": self.address,
        }

    def domain(self, name: str = "web1", *, size_mib: int = 64, disks: str = "", boot: str = "", **more: str) -> Domain:
        """Define one, shut off, with the tiny guest, a qcow2 disk and what else virt-install gives a guest; ``more`` is for
        domain_xml."""
        console = self.root / f"{name}.console"
        boot = boot or f"<kernel>{self.tiny}</kernel>"
        if not disks:
            path = f"{IMAGES}/{name}.qcow2"
            self.bed.run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
            disks = QCOW2.format(path=path)
        number = len(list(self.root.glob("*.xml"))) + 1
        domain = Domain(self, name, self.shm / name, console)
        domain.define_xml(domain_xml(name, size_mib, boot, console, disks, number=number, **more))
        return domain

    def upgrade_libvirt(self) -> None:
        """From Debian 13 to its backports, QEMU left as it is. libvirtd is not restarted."""
        self.bed.install_from("backports", "libvirt*", "python3-libvirt")

    def upgrade_qemu(self) -> None:
        self.bed.install_from("backports", "qemu-*", "seabios")

    def running_domain(self, name: str = "web1", *, size_mib: int = 64, **options: str) -> Domain:
        """Adopted, started, and counting."""
        domain = self.domain(name, size_mib=size_mib, **options)
        domain.adopt()
        domain.start()
        domain.until_counts()
        return domain


class DomainLab(LibvirtLab):
    """For the suites of own VMs: each guest is an adopted domain."""

    def guest(self, name: str = "web1", *more: str, qemu: str | None = None, **memory: Any) -> Domain:
        if more or qemu or memory:
            pytest.skip("a domain's QEMU is libvirt's to start")
        domain = self.domain(name)
        domain.adopt()
        return domain


@contextlib.contextmanager
def libvirt_lab(  # noqa: PLR0913 - what differs between tests
    release: str,
    directory: Path,
    tiny: Path,
    *,
    kind: type[LibvirtLab] = LibvirtLab,
    ram: str = "",
    quiet: bool = False,
) -> Iterator[LibvirtLab]:
    """A bed with libvirtd running; the agent is not started. ``ram`` is where libvirt's own file RAM goes."""
    shm = Path(tempfile.mkdtemp(prefix="cpr-agent-test-", dir="/dev/shm"))
    bed = Bed(release, directory / "bed", shm)
    try:
        with private_bus(bed.scratch) as bus:
            if ram:
                bed.path(ram).mkdir()
                bed.configure(memory_backing_dir=ram)
            bed.start_libvirtd()
            lab = kind(bed, bus, tiny)
            try:
                yield lab
            finally:
                lab.close()
                for log in (lab.log, bed.scratch / "libvirtd.log"):
                    if log.exists() and not quiet:
                        print(f"--- {log}\n{log.read_text()}")
    finally:
        bed.close()
        shutil.rmtree(shm)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The least that saves and loads domains with their RAM in place, through libvirt's own API: it proves nothing, checks
nothing, and can take nothing back. Runs where libvirtd does, with Debian's python3-libvirt alone; a thread and a connection
for each domain.

    bare_domains.py watch NAME            a line "suspended TIME" or "resumed TIME" (epoch s) for each of libvirt's events
    bare_domains.py save-and-load NAME…   once "go" comes on stdin; a line with the seconds that it took all, for each "go"
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import libvirt_qemu

MONITORS = Path("/run/bare-domains")
IMAGES = Path("/var/lib/libvirt/qemu/save")
_EVENTS = {libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended", libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed"}
_SNAPSHOT = """<domainsnapshot>
  <memory snapshot='external' file='{image}'/>
  <disks><disk name='vda' snapshot='no'/></disks>
</domainsnapshot>"""


def watch(name: str) -> None:
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.open("qemu:///system")

    def tell(_connection: object, _domain: object, event: int, _detail: int, _: object) -> None:
        if event in _EVENTS:
            print(_EVENTS[event], time.time(), flush=True)

    connection.domainEventRegisterAny(connection.lookupByName(name), libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, tell, None)
    print("ready", flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


class BareDomain:
    """It was shut off, and runs; its second monitor connects to ``MONITORS``/NAME when it starts."""

    def __init__(self, name: str) -> None:
        self._connection = libvirt.open("qemu:///system")
        self._domain = self._connection.lookupByName(name)
        self._image = MONITORS / f"{name}.image"
        self._managed = IMAGES / f"{name}.save"
        self._monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._monitor.bind(str(MONITORS / name))
        (MONITORS / name).chmod(0o666)
        self._monitor.listen()
        self._domain.create()
        self._monitor.accept()[0].close()

    def save(self) -> None:
        self._ask(_capability(state=True))
        self._domain.suspend()
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        self._domain.snapshotCreateXML(_SNAPSHOT.format(image=self._image), flags)
        xml = self._connection.saveImageGetXMLDesc(str(self._image), libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
        self._connection.saveImageDefineXML(str(self._image), xml, libvirt.VIR_DOMAIN_SAVE_RUNNING)
        shutil.copyfile(self._image, self._managed)
        _sync(self._managed)
        _sync(self._managed.parent)
        self._image.unlink()
        self._domain.destroy()

    def load(self) -> None:
        with ThreadPoolExecutor(1) as thread:
            connected = thread.submit(self._prepare)
            self._domain.create()
            connected.result()
        self._ask(_capability(state=False))

    def _prepare(self) -> None:
        """The capability, before libvirt has the image loaded."""
        monitor, _ = self._monitor.accept()
        with monitor, monitor.makefile("rw") as stream:
            stream.readline()
            for command in ('{"execute": "qmp_capabilities"}', _capability(state=True)):
                stream.write(command + "\n")
                stream.flush()
                if "error" in stream.readline():
                    raise RuntimeError(f"QEMU refused {command}")

    def _ask(self, command: str) -> None:
        libvirt_qemu.qemuMonitorCommand(self._domain, command, 0)


def _capability(*, state: bool) -> str:
    arguments = {"capabilities": [{"capability": "x-ignore-shared", "state": state}]}
    return json.dumps({"execute": "migrate-set-capabilities", "arguments": arguments})


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_and_load(names: list[str]) -> None:
    MONITORS.mkdir(exist_ok=True)
    domains = [BareDomain(name) for name in names]
    print("ready", flush=True)
    with ThreadPoolExecutor(len(domains)) as threads:
        for _ in sys.stdin:
            begun = time.monotonic()
            list(threads.map(BareDomain.save, domains))
            list(threads.map(BareDomain.load, domains))
            print(time.monotonic() - begun, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.argv[2])
    else:
        save_and_load(sys.argv[2:])

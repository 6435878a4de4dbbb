# SPDX-License-Identifier: GPL-2.0-or-later
# ruff: noqa: N802 - names of python3-libvirt
"""A libvirt without a daemon: domains in memory and as files where libvirt has them, by the API of python3-libvirt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cpr_agent.errors import QemuRefused, QemuUnreachable

T = TypeVar("T")
EMULATOR = "/usr/bin/qemu-system-x86_64"
SECURE, INACTIVE = 1, 2
"""VIR_DOMAIN_XML_SECURE and VIR_DOMAIN_XML_INACTIVE of libvirt/libvirt-domain.h."""


@dataclass
class Snapshot:
    name: str
    memory: str

    def getName(self) -> str:
        return self.name

    def getXMLDesc(self, flags: int) -> str:
        assert flags == 0
        return f"<domainsnapshot><name>{self.name}</name><memory snapshot='{self.memory}'/></domainsnapshot>"


@dataclass
class Domain:
    xml: str
    active: bool = False
    persistent: bool = True
    saved: bool = False
    snapshots: list[Snapshot] = field(default_factory=list)

    def name(self) -> str:
        match = re.search(r"<name>(.*?)</name>", self.xml)
        assert match
        return match[1]

    def XMLDesc(self, flags: int) -> str:
        """Without its passwords for who does not ask for them."""
        assert flags & INACTIVE
        return self.xml if flags & SECURE else re.sub(r" passwd='[^']*'", "", self.xml)

    def isActive(self) -> int:
        return int(self.active)

    def isPersistent(self) -> int:
        return int(self.persistent)

    def hasManagedSaveImage(self, flags: int) -> int:
        assert flags == 0
        return int(self.saved)

    def listAllSnapshots(self, flags: int) -> list[Snapshot]:
        assert flags == 0
        assert self.persistent, "libvirt refuses that"
        return self.snapshots


class FakeLibvirt:
    """Connection and session in one. ``normalise`` is what becomes of XML that is defined."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "etc/libvirt/qemu"
        self.directory.mkdir(parents=True)
        self.conf = self.directory.parent / "qemu.conf"
        self.domains: dict[str, Domain] = {}
        self.version = 10_000_000
        self.is_away = False
        self.normalise: Callable[[str], str] = lambda text: text
        self.refusal = ""
        self.defined: list[str] = []

    def add(self, text: str, **state: Any) -> Domain:
        domain = Domain(text, **state)
        self.domains[domain.name()] = domain
        self._write(domain)
        return domain

    def _write(self, domain: Domain) -> None:
        (self.directory / f"{domain.name()}.xml").write_text(f"<!-- by libvirt -->\n\n{domain.xml}")

    async def ask(self, domain: str, deed: str, work: Callable[[Any], T]) -> T:
        if self.is_away:
            raise QemuUnreachable(f"libvirt has not {deed}", vm=domain)
        return work(self)

    def listAllDomains(self, flags: int) -> list[Domain]:
        assert flags == 0
        return list(self.domains.values())

    def defineXML(self, text: str) -> Domain:
        if self.refusal:
            raise QemuRefused(self.refusal)
        name = Domain(text).name()
        self.defined.append(name)
        self.domains[name].xml = self.normalise(text)
        self._write(self.domains[name])
        return self.domains[name]

    def getVersion(self) -> int:
        return self.version

    def getDomainCapabilities(self, emulator: None, arch: None, machine: None, kind: None, flags: int) -> str:
        assert (emulator, arch, machine, kind, flags) == (None, None, None, None, 0)
        return f"<domainCapabilities>\n  <path>{EMULATOR}</path>\n</domainCapabilities>"

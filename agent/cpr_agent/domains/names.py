# SPDX-License-Identifier: GPL-2.0-or-later
"""Names by which an adopted domain, libvirt's hook, QEMU and the agent find each other."""

from __future__ import annotations

from pathlib import Path

import msgspec

NAMESPACE = "urn:org.cpragent1:domain:1"
"""Of the element ``vm`` in an adopted domain's metadata. The hook looks for this text in the XML that libvirt gives it."""
PREFIX = "cpr"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
"""Of ``<qemu:commandline>`` (libvirt, docs/drvqemu.rst, "Pass-through of arbitrary QEMU commands")."""
QEMU_PREFIX = "qemu"
MONITOR_ID = "cpragent"
"""Of the character device by which QEMU connects to the agent; no dash, so that it is not one of an own VM's."""


class Places(msgspec.Struct, frozen=True):
    """Below ``run`` (/run/cpr-agent), in directories that only root can change."""

    run: Path

    @property
    def hook(self) -> Path:
        """The socket at which the agent answers libvirt's hook."""
        return self.run / "hook.sock"

    @property
    def gates(self) -> Path:
        return self.run / "gate"

    @property
    def monitors(self) -> Path:
        return self.run / "monitor"

    def gate(self, domain: str) -> Path:
        """The path of the domain's RAM for QEMU: a link to its memory, there while the agent allows it."""
        return self.gates / domain / "ram"

    def monitor(self, domain: str) -> Path:
        """The socket that the domain's QEMU connects to."""
        return self.monitors / domain

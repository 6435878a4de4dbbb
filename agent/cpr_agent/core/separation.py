# SPDX-License-Identifier: GPL-2.0-or-later
"""What keeps a VM apart from the others, as far as an admin has to do something for it (ADR 24). Looks at files, and asks
no QEMU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpr_agent.core.model import Finding, MemoryIdentity, Ram
from cpr_agent.core.ports import Ports

SHARED_USER, SHARED_DEVICE = "shared-user", "shared-device"
OPEN_IMAGE, CLOSED_IMAGE = "open-image", "closed-image"
NOT_OF_AN_UPGRADE = (SHARED_USER, SHARED_DEVICE, OPEN_IMAGE)
"""They are so whether the host gets another kernel or not."""


def image_findings(ports: Ports, vm: str, user: str, arguments: Sequence[str]) -> list[Finding]:
    """Blocking."""
    found = []
    for path in ports.definitions.images(arguments):
        access = ports.files.access(path, user)
        if access.closed:
            what = f"its user {user} can't open {path}: {access.closed} does not let it in"
            why = "it could not be started or loaded"
            simple, bits = ("chmod o+x", "x") if access.on_the_way else (f"chown {user}", "rw")
            remedy = f"{simple} {access.closed}; or setfacl -m u:{user}:{bits} {access.closed}"
            found.append(Finding(severity="warning", code=CLOSED_IMAGE, what=what, why=why, remedy=remedy, vm=vm))
        elif access.loose:
            what, why = f"any user of this host can read its image {path}", "so can the QEMU of each other VM"
            remedy = f"chmod o= {path}"
            found.append(Finding(severity="warning", code=OPEN_IMAGE, what=what, why=why, remedy=remedy, vm=vm))
    return found


def sharing_findings(
    vm: str, user: str, users: Mapping[str, str], ram: Ram, claims: Sequence[tuple[str, MemoryIdentity]]
) -> list[Finding]:
    """``users`` and ``claims`` are those of the other VMs."""
    found = []
    if sharing := sorted(other for other, theirs in users.items() if theirs == user != ""):
        what = f"it shares its user {user} with {', '.join(sharing)}"
        why = "the QEMU of each can reach what belongs to the others: RAM in files, disks, sockets"
        remedy = "see /usr/share/doc/cpr-agent/confinement.md, A user for each VM"
        found.append(Finding(severity="info", code=SHARED_USER, what=what, why=why, remedy=remedy, vm=vm))
    devices = {one.uuid for one in ram if one.kind == "devdax"}
    if sharing := sorted({other for other, one in claims if one.kind == "devdax" and one.uuid in devices}):
        what = f"it shares its dax device with {', '.join(sharing)}"
        why = "a device is open to a QEMU as a whole: that of each can reach the RAM of the others"
        remedy = "give each a namespace of its own: /usr/share/doc/cpr-agent/memory.md"
        found.append(Finding(severity="info", code=SHARED_DEVICE, what=what, why=why, remedy=remedy, vm=vm))
    return found

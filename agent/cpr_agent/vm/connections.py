# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU of somebody else's making is connected to, and whether that is still there without who has started it.

A character device is a server, which makes its socket, or a client, for whom somebody must listen before QEMU starts:
swtpm, virtiofsd and other backends of vhost-user. libvirt and Proxmox VE start those with a guest, and end them with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from cpr_agent.vm.foreign import Option

DIES = re.compile(
    r"/dev/fdset/|/var/lib/libvirt/qemu/(?:domain|channel)[-/]|/(?:var/)?run/libvirt/|/(?:var/)?run/(?:qemu-server/|qmeventd)"
)
"""What is there only while libvirt runs the domain, or Proxmox VE the guest."""


SWTPM, VIRTIOFSD = "swtpm", "virtiofsd"
_KIND = {"-device": "driver", "-object": "qom-type", **dict.fromkeys(("-netdev", "-nic", "-net"), "type")}
"""The key that says what an option makes."""


class Peer(msgspec.Struct, frozen=True):
    """A character device. ``who`` listens at ``where`` if it is a client; "" where it waits to be connected to."""

    client: bool
    dies: bool
    where: str
    who: str = ""


class Connections:
    """``lost`` has each part that can't work here by what options call it (``chardev:tpm``, ``netdev:net0``), with why."""

    def __init__(self, options: Iterable[Option]) -> None:
        self.lost: dict[str, str] = {}
        self._peers: dict[str, Peer] = {}
        self._companions: dict[str, str] = {}
        options = list(options)
        self._companions |= {user[0]: user[1] for option in options if (user := companion_of(option))}
        for option in options:
            if option.name == "-chardev":
                id_ = option.value.keys.get("id", "")
                self._peers[id_] = peer = _peer(option, self._companions.get(id_, ""))
                if peer.who and (peer.dies or option.value.first("backend") != "socket"):
                    self.lost[f"chardev:{id_}"] = f"{peer.who} is started by who has started that QEMU, and ends with it"
        missing = self._companions.keys() - self._peers.keys()
        self.lost |= {f"chardev:{id_}": f"{self._companions[id_]} has no socket there" for id_ in missing}
        for option in options:
            if option.name in ("-tpmdev", "-netdev") and (why := self.why_lost(option)):
                self.lost[f"{option.name[1:]}:{option.value.keys.get('id', '')}"] = why

    def why_lost(self, option: Option) -> str:
        """Why an option can't work: what it needs, or is, is not there. "" if it can."""
        keys = option.value.keys
        if option.name == "-chardev":
            return self.lost.get(f"chardev:{keys.get('id', '')}", "")
        names = [f"{kind}:{keys[kind]}" for kind in ("chardev", "tpmdev", "netdev") if kind in keys]
        return next((self.lost[name] for name in names if name in self.lost), "")

    def peer(self, option: Option) -> Peer:
        return self._peers[option.value.keys.get("id", "")]


def companion_of(option: Option) -> tuple[str, str] | None:
    """The character device by which an option needs another program, and which that is."""
    keys = option.value.keys
    if option.name == "-tpmdev" and option.value.first("type") == "emulator":
        return keys.get("chardev", ""), SWTPM
    kind = vhost_user(option)
    if kind == "vhost-user":
        return keys.get("chardev", ""), "the switch's vhost-user port"
    if kind and "chardev" in keys:
        return keys["chardev"], VIRTIOFSD if kind.startswith("vhost-user-fs") else f"the backend of {kind}"
    return None


def vhost_user(option: Option) -> str:
    """The device, network or object by which an option lets another program have the guest's RAM; "" if it does not."""
    kind = option.value.first(_KIND.get(option.name, ""))
    if option.name in ("-netdev", "-nic", "-net"):
        return kind if kind == "vhost-user" else ""
    return kind if option.name in _KIND and kind.startswith(("vhost-user-", "cryptodev-vhost-user")) else ""


def _peer(option: Option, who: str) -> Peer:
    keys = option.value.keys
    where = keys.get("path") or (f"{keys.get('host', 'localhost')}:{keys['port']}" if "port" in keys else "")
    client = option.value.first("backend") == "socket" and not option.value.on("server")
    return Peer(client, "fd" in keys or bool(DIES.search(option.text)), where, who)

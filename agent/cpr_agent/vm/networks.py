# SPDX-License-Identifier: GPL-2.0-or-later
"""Networks of a QEMU of somebody else's making, as one that a VM's unit starts can have them.

That one inherits no descriptors, and its sandbox forbids it to start programs (``spawn=deny``, cmdline.SANDBOX): neither a
script for a tap interface nor the helper of a bridge. Interfaces with a name it can open.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import keyed, option
from cpr_agent.vm.connections import DIES
from cpr_agent.vm.foreign import Value

FD_KEYS = ("fd", "fds", "vhostfd", "vhostfds")
NO_PROGRAMS = "with its sandbox QEMU starts no programs"


def forbidden_programs(arguments: Sequence[str]) -> list[str]:
    """Networks for which QEMU starts a program before its guest runs, unless its sandbox was told to let it."""
    try:
        sandbox = [keyed(value) for value in option(arguments, "-sandbox")]
        if sandbox and sandbox[-1].get("spawn", "allow") != "deny":
            return []
        values = [Value(value) for value in option(arguments, "-netdev", "-nic", "-net")]
    except InvalidArgument:
        return []  # QEMU says it better
    return [f"{value} ({program})" for value in values if (program := _program_of(value))]


def _program_of(value: Value) -> str:
    kind = value.first("type")
    if kind == "bridge" or (kind == "tap" and "helper" in value.keys):
        return "the helper of its bridge"
    if kind == "tap" and set(FD_KEYS[:2]).isdisjoint(value.keys) and value.keys.get("script") not in ("no", ""):
        return "the script of its interface"
    return "passt" if kind == "passt" else ""


def at_home(value: Value, interface: str) -> tuple[str | None, str]:
    """An argument of -netdev, -nic or -net as it can be, or None where it can stay; and why, "" if there is nothing to say.
    ``interface`` is a name for a tap interface that has none."""
    kind = value.first("type")
    by_descriptor = not set(FD_KEYS).isdisjoint(value.keys)
    if kind == "bridge" or (kind == "tap" and (by_descriptor or not {"helper", "br"}.isdisjoint(value.keys))):
        have = f"have a tap interface {interface} at boot, or name another"
        why = "its descriptor dies with who opened it" if by_descriptor else f"{NO_PROGRAMS}, and a bridge's helper is one"
        vhost = not {"vhostfd", "vhostfds"}.isdisjoint(value.keys)
        return str(_tap(value.without(*FD_KEYS, "helper", "br"), interface, vhost=vhost)), f"{why}: {have}"
    if kind == "tap" and value.keys.get("script") != "no":
        name = value.keys.get("ifname") or interface
        why = f"{NO_PROGRAMS}, and its script is one: have the tap interface {name} at boot, in its bridge"
        return str(_tap(value, name)), why
    if kind == "passt" or by_descriptor or (kind in ("stream", "dgram", "socket") and DIES.search(str(value))):
        kept = [f"{key}={value.keys[key]}" for key in ("id", "model", "mac", "macaddr") if key in value.keys]
        why = NO_PROGRAMS if kind == "passt" else "what it was connected to dies with who has started that QEMU"
        return ",".join(["user", *kept]), f"{why}: the guest is behind QEMU's own NAT now"
    if kind == "user" and not {"smb", "guestfwd"}.isdisjoint(value.keys):
        return None, f"{NO_PROGRAMS}: smb= and the commands of guestfwd= do not work"
    return None, ""


def _tap(value: Value, name: str, *, vhost: bool = False) -> Value:
    more: dict[str, str | bool] = {"ifname": name, "script": "no", "downscript": "no"} | ({"vhost": True} if vhost else {})
    return value.without(*more).with_(**more).renamed("type", "tap")

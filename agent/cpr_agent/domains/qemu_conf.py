# SPDX-License-Identifier: GPL-2.0-or-later
"""/etc/libvirt/qemu.conf, as far as it decides about adopted domains (virConfParse() in libvirt's src/util/virconf.c)."""

from __future__ import annotations

import re
from pathlib import Path

Value = str | list[str]
_TOKEN = re.compile(
    r"""(?P<skipped>[\s,]+ | \#[^\n]*)
      | (?P<name>[A-Za-z_][\w.-]*)[ \t]*=\s*
      | (?P<open>\[) | (?P<close>\])
      | "{3}(?P<long>.*?)"{3} | "(?P<double>[^"]*)" | '(?P<single>[^']*)' | (?P<number>-?\d+)""",
    re.VERBOSE | re.DOTALL,
)
DEFAULT_DEVICES = (
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/dev/ptmx",
    "/dev/kvm",
    "/dev/userfaultfd",
)
"""defaultDeviceACL of libvirt's src/qemu/qemu_cgroup.c; cgroup_device_acl takes its place as a whole."""


def read(path: Path) -> dict[str, Value]:
    """Empty without the file. Raises ValueError with the line that can't be read, OSError."""
    try:
        return parse(path.read_text(errors="replace"))
    except FileNotFoundError:
        return {}


def parse(text: str) -> dict[str, Value]:
    """Numbers are strings as well. The last value of a name counts. Raises ValueError."""
    found: dict[str, Value] = {}
    name, items, at = "", None, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        kind = match.lastgroup if match else None
        if match is None or (
            kind != "skipped" and (kind == "name") == bool(name)
        ):  # a name without a value, or the reverse
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line} can't be read")
        at = match.end()
        if kind == "name":
            name, items = match["name"], None
        elif kind == "open":
            items = found[name] = []
        elif kind == "close":
            name, items = "", None
        elif kind != "skipped" and items is not None:
            items.append(match[kind or ""])
        elif kind != "skipped":
            found[name], name = match[kind or ""], ""
    if name:
        raise ValueError(f"{name} has no value")
    return found


def devices(conf: dict[str, Value]) -> list[str]:
    """The nodes that each domain sees in its /dev, beside those of its own disks and devices."""
    value = conf.get("cgroup_device_acl")
    return value if isinstance(value, list) else list(DEFAULT_DEVICES)


def text(conf: dict[str, Value], name: str, default: str) -> str:
    value = conf.get(name, default)
    return value if isinstance(value, str) else default

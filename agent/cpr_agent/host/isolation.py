# SPDX-License-Identifier: GPL-2.0-or-later
"""What of the host one VM's unit may see and open: its user, a drop-in, and an AppArmor profile (ADR 24).

The agent is confined itself. It writes these files to a directory of root's, and cpr-vm-setup@NAME.service
(units/set-up-vm) installs them: for good, so that no load after a kexec has to wait for that.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cpr_agent.core.model import Launch
from cpr_agent.files import make_private_directory, write_atomically
from cpr_agent.host.users import groups_beside, uid_of_user

UNITS = Path("/etc/systemd/system")
PROFILES = Path("/etc/apparmor.d")
_DROP_IN = "50-cpr-agent.conf"
_VALUES = re.compile(r'(?<!,),(?!,)|"')
"""Between the values of QEMU's keyed options, in which a comma is doubled, and of JSON in one of them."""
_PATH = re.compile(r"(?:^|[=:])(/[^/].*)")
_GENERAL = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx")
"""In each private /dev (systemd.exec(5), PrivateDevices=)."""
_SHOWN = ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock")
"""To each VM, by cpr-vm@.service."""
_NOT_A_PLACE = re.compile(r"/(proc|dev/(fd|fdset|dax|pts|hugepages)|run/cpr-agent)(/|\d|$)")
_SHM = "/dev/shm/"  # noqa: S108 - looked at, and not written to
_VFIO = ("/dev/vfio", "/dev/iommu")
_SYSTEM = re.compile(r"/(usr|etc|proc|sys|root|home|boot)(/|$)")
"""No word of a command line opens what is in there."""
_NO_IMAGES = re.compile(r"/(dev|run|var/log)(/|$)")
_SHELL = "/{usr/,}bin/{sh,dash,bash} mrix,"
"""It stops the unit. In each profile, and not in what all have in common: a profile is installed anew when its own text
changes, and a guest that an older agent has started would be cut off."""


class Made(msgspec.Struct, frozen=True):
    drop_in: str
    profile: str


class Installer:
    """``staged`` is root's alone; ``units`` and ``profiles`` are where systemd and AppArmor look. units/set-up-vm deletes
    what it has installed to the end."""

    def __init__(self, staged: Path, units: Path = UNITS, profiles: Path = PROFILES) -> None:
        self._staged = staged
        self._units = units
        self._profiles = profiles

    def stage(self, launch: Launch, made: Made, places: tuple[str, str]) -> bool:
        """Whether something is to be installed: it is there for cpr-vm-setup@NAME.service then. Raises OSError."""
        wanted = {self._units / f"cpr-vm@{place}.service.d" / _DROP_IN: made.drop_in for place in places}
        wanted[self._profiles / f"cpr-vm.{launch.vm}.vm"] = made.profile
        installed = not (self._staged / launch.vm).exists() and all(_text(path) == text for path, text in wanted.items())
        if installed and _exists(launch.user):
            return False
        self._stage(launch.vm, launch.user, {"unit.conf": made.drop_in, "profile": made.profile})
        return True

    def stage_user(self, vm: str, user: str) -> bool:
        """Likewise of its user alone."""
        if _exists(user):
            return False
        self._stage(vm, user, {})
        return True

    def _stage(self, vm: str, user: str, files: dict[str, str]) -> None:
        directory = self._staged / vm
        shutil.rmtree(directory, ignore_errors=True)
        make_private_directory(directory)
        uid = uid_of_user(user)
        account = f'u {user} {uid} "Virtual machine {vm} of cpr-agent" / -\n' if uid else ""
        for name, text in {"sysusers.conf": account, **files}.items():
            write_atomically(directory / name, text.encode(), durable=False)


def made_for(launch: Launch, run_dir: Path, places: tuple[str, str]) -> Made:
    """Looks at what its command line names, on storage that may hang. Blocking."""
    return Made(drop_in_of(launch, run_dir, places), profile_of(launch, run_dir, places))


def drop_in_of(launch: Launch, run_dir: Path, places: tuple[str, str]) -> str:
    """For the VM's units; what all have in common is in units/cpr-vm@.service."""
    own = [f"{run_dir}/vm/{place}" for place in places]
    devices, files = _devices(launch), [path for path in _paths(launch) if path.startswith(_SHM)]
    lines = [
        "# Made by cpr-agent from the VM's definition; the next start makes it anew.",
        "[Service]",
        f"User={launch.user}",
        "Group=",
        f"SupplementaryGroups={' '.join(groups_beside(launch.user))}",
        f"AppArmorProfile=-{profile_name(launch.vm)}",
        *(f"BindPaths={_quoted('-' + path)}" for path in (*own, *files, *devices)),
        *(f"DeviceAllow={_quoted(path)} rw" for path in devices if not path.startswith(_VFIO)),
    ]
    if _VFIO[0] in devices:
        lines += ["DeviceAllow=/dev/vfio/vfio rw", "DeviceAllow=char-vfio rw", "DeviceAllow=/dev/iommu rw"]
    return "\n".join(lines) + "\n"


def profile_of(launch: Launch, run_dir: Path, places: tuple[str, str]) -> str:
    """Its AppArmor profile (apparmor.d(5)); what all have in common is in policies/apparmor/abstractions/cpr-vm."""
    ram = [node for node in launch.nodes if not node.startswith("/dev/dax")]
    rules = [
        _SHELL,
        *(_rule(f"{run_dir}/vm/{place}/", "**", "rwk") for place in places),
        *(_rule(f"{run_dir}/tickets/{place}/", "*", "rw") for place in places),
        *(_rule(path, "", "rwk") for path in ram),
        *(["/dev/dax* rw,"] if len(ram) < len(launch.nodes) else []),
        *(["/dev/vfio/** rw,"] if _VFIO[0] in _devices(launch) else []),
    ]
    for path in _paths(launch):
        rules += [] if _SYSTEM.match(path) else _rules_of(path)
        if (real := os.path.realpath(path)) != path and not (_SYSTEM.match(real) or _NO_IMAGES.match(real)):
            rules += _rules_of(real)  # AppArmor knows no symbolic links
    lines = [
        "# Made by cpr-agent from the VM's definition; the next start makes it anew. Further rules go into local/cpr-vm.",
        "abi <abi/3.0>,",
        "include <tunables/global>",
        "",
        f'profile "{profile_name(launch.vm)}" flags=(attach_disconnected) {{',
        "  include <abstractions/cpr-vm>",
        *(f"  {rule}" for rule in dict.fromkeys(rules)),
        "  include if exists <local/cpr-vm>",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _rules_of(path: str) -> list[str]:
    """For what a command line names: a directory as a whole, such as one that the guest shares; an image with the snapshots
    that are named after it, and the images that it may stand on."""
    if _NO_IMAGES.match(path):
        return [_rule(path, "", "rwk")]
    if _is_directory(path):
        return [_rule(path, "", "r"), _rule(path, "/**", "rwk")]
    parent = str(Path(path).parent)
    beside = [_rule(parent, "/**", "r")] if parent != "/" else []
    return [_rule(path, "", "rwk"), _rule(path, "{.,-}*", "rwk"), *beside]


def _is_directory(path: str) -> bool:
    """False also for what can't be looked at, or is no path at all, such as a kernel's long command line."""
    try:
        return stat.S_ISDIR(Path(path).stat().st_mode)
    except OSError:
        return False


def profile_name(vm: str) -> str:
    return f"cpr-vm.{vm}"


def _paths(launch: Launch) -> list[str]:
    """The places that its command line names, whatever for, and what it has open besides."""
    named = [path for word in launch.base_argv[1:] for path in _named(word)]
    return list(dict.fromkeys((*named, *launch.opened)))


def _named(word: str) -> Iterator[str]:
    for value in _values(word):
        match = _PATH.search(value)
        path = os.path.normpath(match[1]) if match else ""
        if path and not _NOT_A_PLACE.match(path):
            yield path


def _values(word: str) -> Iterator[str]:
    if word.startswith("{"):
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            yield from _texts(msgspec.json.decode(word))
            return
    for value in _VALUES.split(word):
        yield value.replace(",,", ",")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _devices(launch: Launch) -> list[str]:
    """Nodes in /dev that it needs beyond those that each VM has."""
    own = [path for path in _paths(launch) if path.startswith("/dev/") and path not in (*_GENERAL, *_SHOWN)]
    found = [path for path in own if _is_node(path)]
    return [*found, *_VFIO] if any("vfio" in word for word in launch.base_argv) else found


def _is_node(path: str) -> bool:
    """Also one that is not there yet. A directory would show the devices of others, too."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return not path.startswith(_SHM)
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def _quoted(text: str) -> str:
    """A word of systemd.syntax(7)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _rule(path: str, pattern: str, access: str) -> str:
    """No character of ``path`` stands for others."""
    escaped = re.sub(r'([\\"*?\[\]{}^])', r"\\\1", path)
    return f'"{escaped}{pattern}" {access},'


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError):
        return ""

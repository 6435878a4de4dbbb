# SPDX-License-Identifier: GPL-2.0-or-later
"""What of libvirt's settings on this host speaks against adopted domains; implements core.ports.Surroundings.

It reads files alone. A host without adopted domains costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cpr_agent.core.model import Finding
from cpr_agent.core.paths import why_swappable
from cpr_agent.domains import apparmor, qemu_conf
from cpr_agent.text import printable

HOOK = "etc/libvirt/hooks/qemu.d/cpr-agent"
CONF = "etc/libvirt/qemu.conf"
DAEMONS = {"libvirtd": "run/libvirtd.pid", "virtqemud": "run/virtqemud.pid"}
"""Each writes its file as it starts."""
AT_SHUTDOWN = ("etc/default/libvirt-guests", "etc/sysconfig/libvirt-guests")
FORMATS = ("save_image_format", "snapshot_image_format")
AUTO_SHUTDOWN = ("auto_shutdown_try_save", "auto_shutdown_try_shutdown", "auto_shutdown_poweroff")
_ON_SHUTDOWN = re.compile(r"^\s*(?:export\s+)?ON_SHUTDOWN=[\"']?(\w+)", re.MULTILINE)


class LibvirtSurroundings:
    """``adopted`` gives the nodes of each adopted domain's memory, and ``heard`` when the hook was last heard of (epoch s;
    0 if it never was)."""

    def __init__(
        self, root: Path, adopted: Callable[[], Mapping[str, Sequence[str]]], heard: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._root = root
        self._adopted = adopted
        self._heard = heard

    def findings(self) -> list[Finding]:
        if not self._adopted():
            return []
        found = [*self._hook(), *self._other_hooks_findings(), *self._libvirt_guests()]
        conf = self._root / CONF
        try:
            settings = qemu_conf.read(conf)
        except (ValueError, OSError) as error:
            what = f"{conf}: {printable(str(error))}"
            why = "whether domains can be saved, and open their memory, is not known"
            return [*found, _error("libvirt-conf", what, why, f"mend {conf}")]
        after = f", then: {self._restart}"
        return [
            *found,
            *_auto_shutdown(conf, settings, after),
            *_image_formats(conf, settings, after),
            *_root_user(conf, settings, after),
        ]

    def findings_of(self, vm: str) -> list[Finding]:
        nodes = self._adopted().get(vm)
        if nodes is None:
            return []
        conf = self._root / CONF
        try:
            settings = qemu_conf.read(conf)
        except (ValueError, OSError):
            return []  # the host's finding
        return [*self._hidden(conf, settings, vm, nodes), *(self._apparmor(vm, nodes) if self._confined(settings) else ())]

    def _hidden(self, conf: Path, settings: dict[str, qemu_conf.Value], vm: str, nodes: Sequence[str]) -> Iterator[Finding]:
        seen = qemu_conf.devices(settings)
        for node in nodes:
            if node.startswith("/dev/dax") and node not in seen:
                others = [
                    f"/dev/{path.name}" for path in sorted((self._root / "dev").glob("dax*"))
                ]  # it may be one of these
                whole = ", ".join(f'"{one}"' for one in dict.fromkeys((*seen, node, *others)))  # after the next boot
                yield _error(
                    "libvirt-device-acl",
                    f"cgroup_device_acl in {conf} does not list {node}",
                    "its QEMU would not see its memory, and not start",
                    f"cgroup_device_acl = [ {whole} ], then: {self._restart}",
                    vm=vm,
                )

    @property
    def _restart(self) -> str:
        """What makes libvirt read its settings again."""
        return "systemctl restart " + next(
            (name for name, file in DAEMONS.items() if (self._root / file).exists()), "libvirtd"
        )

    def _hook(self) -> Iterator[Finding]:
        hook = self._root / HOOK
        why = "adopted domains are not started, and saved ones are not loaded, unless libvirt can ask the agent"
        reinstall = "install the package again, for Debian with --option DPkg::Options::=--force-confmiss"
        try:
            changed = hook.stat().st_ctime
            swappable = why_swappable(hook)
        except OSError as error:
            yield _error("libvirt-hook", f"libvirt's hook {hook} is not there: {error.strerror}", why, reinstall)
            return
        if not os.access(hook, os.X_OK):
            yield _error("libvirt-hook", f"libvirt's hook {hook} is not executable", why, f"chmod 755 {hook}")
        elif swappable:
            yield _error("libvirt-hook", f"libvirt's hook {hook} runs as root: {swappable}", why, f"chown root: {hook}")
        elif not self._seen(changed):
            for daemon, file in DAEMONS.items():
                if (started := _time_of(self._root / file)) and started < changed:
                    what = f"{daemon} was started before its hook {hook} was there, and may not know it"
                    yield _warning("libvirt-hook", what, why, f"systemctl restart {daemon}; its guests run on")

    def _seen(self, changed: float) -> bool:
        """A daemon that knew of any hook as it started looks for all of them at each call (virHookCall())."""
        others = [path for path in self._other_hooks() if _time_of(path) < changed]
        return self._heard() > changed or any(
            _time_of(path) < (_time_of(self._root / file)) for path in others for file in DAEMONS.values()
        )

    def _other_hooks(self) -> list[Path]:
        ours = self._root / HOOK
        try:
            beside = sorted(path for path in ours.parent.iterdir() if path != ours)
        except OSError:
            beside = []
        return [path for path in (ours.parents[1] / "qemu", *beside) if path.is_file() and os.access(path, os.X_OK)]

    def _other_hooks_findings(self) -> Iterator[Finding]:
        for path in self._other_hooks():
            yield _warning(
                "libvirt-other-hook",
                f"{path} is a hook of libvirt's as well",
                "if it fails in `started`, libvirt ends the QEMU of a guest that was just loaded, whatever the agent says",
                "have it fail in `prepare` alone",
            )

    def _libvirt_guests(self) -> Iterator[Finding]:
        for path in (self._root / name for name in AT_SHUTDOWN):
            try:
                said = _ON_SHUTDOWN.findall(path.read_text(errors="replace"))
            except OSError:
                continue
            if (said or ["suspend"])[-1] == "suspend":
                yield _warning(
                    "libvirt-guests",
                    f"libvirt-guests.service saves all guests that run when the host is shut down ({path}: ON_SHUTDOWN)",
                    "an upgrade has saved adopted ones before, but a plain restart writes their whole RAM to the disk",
                    f"ON_SHUTDOWN=shutdown in {path}",
                )
            return

    def _confined(self, settings: dict[str, qemu_conf.Value]) -> bool:
        try:
            enabled = (self._root / "sys/module/apparmor/parameters/enabled").read_text().strip() == "Y"
        except OSError:
            enabled = False
        drivers = settings.get("security_driver", "apparmor")
        return enabled and "apparmor" in ([drivers] if isinstance(drivers, str) else drivers)

    def _apparmor(self, vm: str, nodes: Sequence[str]) -> Iterator[Finding]:
        root = self._root / "etc/apparmor.d"
        rules = apparmor.rules_text(root)
        if not rules:  # libvirt has no profiles for QEMU here
            return
        local, why = root / apparmor.LOCAL, "its QEMU would not start: AppArmor refuses"
        monitor = f"/run/cpr-agent/monitor/{vm}"
        if not apparmor.may_write(rules, monitor):
            what = f"libvirt's AppArmor rules for QEMU do not include {root / apparmor.DROP_INS}/cpr-agent"
            yield _error("libvirt-apparmor", what, why, f"echo '{apparmor.INCLUDE}' >>{local}", vm=vm)
        for node in nodes:
            if not node.startswith("/dev/dax") and not apparmor.may_write(rules, node):
                what = f"no AppArmor rule lets libvirt's QEMUs open its memory {node}"
                yield _error("libvirt-apparmor", what, why, f"echo '  {node} rw,' >>{local}", vm=vm)


def _auto_shutdown(conf: Path, settings: dict[str, qemu_conf.Value], after: str) -> Iterator[Finding]:
    for name in AUTO_SHUTDOWN:
        if (value := qemu_conf.text(settings, name, "none")) not in ("none", "transient"):
            yield _error(
                "libvirt-auto-shutdown",
                f'{name} = "{printable(value)}" in {conf}',
                "libvirt ends or saves guests as soon as a shutdown is announced, before the agent saves them",
                f'{name} = "none"{after}',
            )


def _image_formats(conf: Path, settings: dict[str, qemu_conf.Value], after: str) -> Iterator[Finding]:
    for name in FORMATS:
        if (value := qemu_conf.text(settings, name, "raw")) != "raw":
            what, why = (
                f'{name} = "{printable(value)}" in {conf}',
                "a domain's state can't be loaded in place from such an image",
            )
            yield _error("libvirt-image-format", what, why, f'{name} = "raw"{after}')


def _root_user(conf: Path, settings: dict[str, qemu_conf.Value], after: str) -> Iterator[Finding]:
    if qemu_conf.text(settings, "user", "") in ("root", "0", "+0"):
        yield _warning(
            "libvirt-user",
            f"libvirt runs QEMU as root ({conf}: user)",
            "a guest that takes its QEMU over has the host; and a QEMU of root's makes a file where a device is missing",
            f"take user and group out of {conf}{after}",
        )


def _time_of(path: Path) -> float:
    """When it was put there (epoch s); 0 if it is not there."""
    try:
        return path.stat().st_ctime
    except OSError:
        return 0.0


def _error(code: str, what: str, why: str, remedy: str, *, vm: str = "") -> Finding:
    return Finding(severity="error", code=code, what=what, why=why, remedy=remedy, vm=vm)


def _warning(code: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(severity="warning", code=code, what=what, why=why, remedy=remedy)

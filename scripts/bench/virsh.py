# SPDX-License-Identifier: GPL-2.0-or-later
"""What an administrator has without the agent: ``virsh managedsave`` and ``virsh start``, on a session libvirtd of our own.

A libvirtd that is root's would read the host's configuration, so that this one is nobody's. Needs root to become that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from scripts.bench.machine import console_lines
from tests.lab import until

NAME = "bench"
_NOBODY = 65534
_DOMAIN = """<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>{size_mib}</memory><vcpu>1</vcpu>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel></os>
  <devices>
    <emulator>{qemu}</emulator>
    <serial type='file'><source path='{console}' append='on'/><target type='isa-serial'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
_SUBSCRIBED_S = 0.5
"""virsh does not say when it has subscribed to events; one that came too late would fail the run, not falsify it."""


class Libvirt:
    """RAM is a shared file in /dev/shm, as the agent's guests have it; libvirt writes it to its save file all the same."""

    def __init__(self, directory: Path, qemu: str, tiny: Path) -> None:
        self._directory, self._qemu, self._tiny = directory, qemu, tiny
        self._console = directory / "console"

    def __enter__(self) -> Self:
        directory = self._directory
        self._ram = Path(tempfile.mkdtemp(prefix="cpr-agent-bench-", dir="/dev/shm"))
        (directory / "config/libvirt").mkdir(parents=True)
        (directory / "run").mkdir()
        (directory / "config/libvirt/qemu.conf").write_text(
            f'memory_backing_dir = "{self._ram}"\nsecurity_driver = "none"\n'
        )
        directory.parent.chmod(0o755)  # the guest's kernel is there
        for place in (self._ram, directory, *directory.rglob("*")):
            os.chown(place, _NOBODY, _NOBODY)
        self._daemon = self._as_nobody("libvirtd")
        until(lambda: self._as_nobody("virsh", "version").wait() == 0, "libvirtd is there")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._as_nobody("virsh", "destroy", NAME).wait()
        self._daemon.terminate()
        self._daemon.wait(60)
        shutil.rmtree(self._ram)
        shutil.rmtree(self._directory)

    def start(self, size_mib: int) -> None:
        domain = self._directory / "domain.xml"
        domain.write_text(
            _DOMAIN.format(name=NAME, size_mib=size_mib, kernel=self._tiny, qemu=self._qemu, console=self._console)
        )
        self._virsh("define", str(domain))
        self._virsh("start", NAME)
        console_lines(self._console, 3)

    @property
    def ram(self) -> Path:
        return max(self._ram.rglob("*"), key=lambda path: path.stat().st_size)

    def save_and_start(self) -> float:
        """Seconds from when the guest stopped to when it ran again, by libvirt's own events of its life."""
        times: dict[str, float] = {}
        with self._as_nobody("virsh", "event", "--loop", "--timestamp", "--event", "lifecycle", NAME) as events:
            time.sleep(_SUBSCRIBED_S)
            self._virsh("managedsave", NAME)
            self._virsh("start", NAME)
            assert events.stdout
            for line in events.stdout:
                stamp, _, said = line.partition(": ")
                for word in ("Suspended", "Resumed"):
                    if f": {word} " in said:
                        times[word] = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S.%f%z").timestamp()
                if "Resumed" in times:
                    break
            events.terminate()
        return times["Resumed"] - times["Suspended"]

    def _virsh(self, *arguments: str) -> None:
        virsh = self._as_nobody("virsh", *arguments)
        said, _ = virsh.communicate()
        if virsh.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {said}")

    def _as_nobody(self, *command: str) -> subprocess.Popen[str]:
        places = {f"XDG_{name}": str(self._directory / path) for name, path in _XDG.items()}
        return subprocess.Popen(
            command,
            env={**os.environ, **places, "LIBVIRT_DEFAULT_URI": "qemu:///session", "LC_ALL": "C.UTF-8"},
            user=_NOBODY,
            group=_NOBODY,
            extra_groups=[],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


_XDG = {"CONFIG_HOME": "config", "RUNTIME_DIR": "run", "CACHE_HOME": "cache", "DATA_HOME": "data"}

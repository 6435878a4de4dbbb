# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of its own for a real libvirtd in system mode: a cached root of Debian under an overlay, in namespaces with an
init, its own /run, /dev, /var and network. Everything in it ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab import PATIENCE_S, ROOT, until

RELEASES = {"12": "9.0/7.2", "13": "11.3/10.0", "backports": "12.9/11.1"}
"""Of Debian, to the versions of libvirt and QEMU there."""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
HOOK = "/etc/libvirt/hooks/qemu.d/cpr-agent"
_CONFIGURATION = {
    # Nothing here has a security label, or a cgroup; what libvirt's log daemon would do, files do.
    "qemu.conf": 'security_driver = "none"\ncgroup_controllers = []\nstdio_handler = "file"\n',
    "libvirtd.conf": 'auth_unix_rw = "none"\n',
}


def find_root(release: str) -> Path:
    """Raises FileNotFoundError."""
    command = ["scripts/libvirt-root", "path", release]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    if not found:
        raise FileNotFoundError(
            f"no root of Debian {release} with libvirt here; build it: scripts/libvirt-root build {release}"
        )
    return Path(found)


class Inside(subprocess.Popen[str]):
    """A process in the bed. Signals reach itself; those that nsenter got would stay there."""

    def __init__(self, bed: Bed, command: tuple[str, ...], **options: Any) -> None:
        self._inner = 0
        spaces = ("--mount", "--pid", "--net")
        super().__init__(
            ["nsenter", f"--target={bed.pid}", *spaces, "--", "setpriv", "--pdeathsig=KILL", *command], **options
        )

    @property
    def outer_pid(self) -> int:
        """Its pid as this machine's processes have it."""
        if not self._inner:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
            self._inner = int(until(lambda: children.read_text(), "nsenter has a child").split()[0])
        return self._inner

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.outer_pid, number)


class Bed:
    """``scratch`` and ``shm`` have the same paths inside and outside."""

    def __init__(self, release: str, scratch: Path, shm: Path) -> None:
        self.release, self.scratch, self.shm = release, scratch, shm
        root = str(find_root(release))
        scratch.mkdir(parents=True, exist_ok=True)
        for directory in (scratch, *scratch.parents):  # QEMU's user has to get there
            if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
                directory.chmod(0o755)
        shm.chmod(0o755)
        self._outer = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--"),
                *(str(ROOT / "tests/libvirt/enter-bed"), root, str(scratch), str(ROOT), str(shm)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._outer.stdout
        if self._outer.stdout.readline().strip() != "ready":
            raise RuntimeError(f"no bed could be made for Debian {release}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self.pid = int(children.read_text().split()[0])
        for name, text in _CONFIGURATION.items():
            with self.path(f"/etc/libvirt/{name}").open("a") as file:
                file.write(text)
        self._libvirtd: Inside | None = None
        self.install_hook()

    def configure(self, **settings: str) -> None:
        """In qemu.conf, for the next libvirtd."""
        with self.path("/etc/libvirt/qemu.conf").open("a") as file:
            file.writelines(f'{name} = "{value}"\n' for name, value in settings.items())

    def install_hook(self) -> None:
        """As the package has it; libvirtd sees it when it starts."""
        hook = self.path(HOOK)
        hook.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "units/libvirt-hook", hook)
        hook.chmod(0o755)

    def path(self, inside: str | Path) -> Path:
        """Where a path of the bed is for this machine's processes."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def popen(self, *command: str, **options: Any) -> Inside:
        return Inside(self, command, **({"text": True, "env": ENVIRONMENT} | options))

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run it to its end; raises AssertionError with what it said, if it failed."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(*command, **(pipes | options)) as process:
            try:
                said, complained = process.communicate(timeout=PATIENCE_S * 2)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        result = subprocess.CompletedProcess(command, process.returncode, said, complained)
        assert not check or not result.returncode, f"{' '.join(command)}: {complained or said}"
        return result

    def virsh(self, *arguments: str, check: bool = True) -> str:
        """What it said; without ``check``, also what it said of its failure."""
        result = self.run("virsh", "--quiet", *arguments, check=check)
        return (result.stdout + result.stderr).strip()

    def start_libvirtd(self) -> None:
        log = self.scratch / "libvirtd.log"
        with log.open("a") as out:
            self._libvirtd = daemon = self.popen("libvirtd", stdin=subprocess.DEVNULL, stdout=out, stderr=out)

        def there() -> bool:
            assert daemon.poll() is None, f"libvirtd ended with {daemon.returncode}: {log.read_text()[-2000:]}"
            return not self.run("virsh", "--quiet", "list", check=False).returncode

        until(there, "libvirtd is there")

    @property
    def libvirtd(self) -> Inside:
        assert self._libvirtd
        return self._libvirtd

    def end_libvirtd(self, number: int = signal.SIGTERM) -> None:
        self.libvirtd.send_signal(number)
        self.libvirtd.wait(PATIENCE_S)

    def restart_libvirtd(self, number: int = signal.SIGTERM, *, boot: bool = False) -> None:
        """``boot``: it thinks that the host has just started."""
        self.end_libvirtd(number)
        if boot:
            self.path("/run/libvirt/qemu/autostarted").unlink(missing_ok=True)
        self.start_libvirtd()

    def install_from(self, release: str, *packages: str) -> None:
        """The files of these packages (globs) become those of another release's root, each replaced at once, as dpkg does
        it; settings stay. What runs has the old ones open."""
        other = find_root(release)
        lists = {found for name in packages for found in (other / "var/lib/dpkg/info").glob(f"{name}.list")}
        assert lists, f"{release} has no {packages}"
        paths = {line for found in lists for line in found.read_text().splitlines() if not line.startswith("/etc")}
        for path in sorted(paths):
            source, target = other / path.lstrip("/"), self.path(path)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif source.is_symlink() or source.is_file():  # some were left out of the root
                new = target.with_name(f"{target.name}.dpkg-new")
                shutil.copy2(source, new, follow_symlinks=False)
                new.replace(target)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """``pid`` is one of the bed's own."""
        self.run("bash", "-c", f"kill -{int(number)} {pid}")

    def close(self) -> None:
        self._outer.communicate("", timeout=PATIENCE_S)


@contextlib.contextmanager
def bed(release: str, scratch: Path, shm: Path) -> Iterator[Bed]:
    """With libvirtd running."""
    made = Bed(release, scratch, shm)
    try:
        made.start_libvirtd()
        yield made
    finally:
        made.close()

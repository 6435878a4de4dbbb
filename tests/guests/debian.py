# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest with systemd, on an overlay over the host VM's image. What it does all the time is in debian-guest; the
other end of its TCP connection is here, in a network namespace."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.hostvm.image import Image, find_image
from scripts.hostvm.qemu import loader_command
from scripts.hostvm.vm import COMMAND_LINE, pack_payload
from tests.lab import DAEMON, PATIENCE_S, Lab, until

HERE = Path(__file__).parent
HOST, GUEST, PORT = "192.0.2.1", "192.0.2.2", 7
BOOT_S = 900.0
CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def network(tap: str, *options: str) -> Iterator[Path]:
    """A network namespace with a tap device of that name; yields the namespace's path."""
    name = f"cpr-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in (
            f"tuntap add dev {tap} mode tap {' '.join(options)}",
            f"address add {HOST}/24 dev {tap}",
            f"link set {tap} up",
        ):
            subprocess.run(["ip", "-netns", name, *command.split()], check=True)
        yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


class Peer:
    """Takes one connection, hears 1, 2, 3, …, and says 1, 2, 3, … at its own pace, until it hears "bye". ``problem`` says
    what was not so."""

    def __init__(self, namespace: Path) -> None:
        self.heard = 0
        self.said = 0
        self.problem = ""
        self.over = threading.Event()
        self._listener = _socket_in(namespace)
        self._listener.bind((HOST, PORT))
        self._listener.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()  # whoever lost the connection gets no other
        with connection:
            saying = threading.Thread(target=self._say, args=(connection,))
            saying.start()
            self._guarded(lambda: self._hear(connection))
            self.over.set()
            saying.join()

    def _hear(self, connection: socket.socket) -> None:
        for line in connection.makefile("rb"):
            if line == b"bye\n":
                return
            if line != b"%d\n" % (self.heard + 1):
                self.problem = f"heard {line!r} after {self.heard}"
                return
            self.heard += 1
        self.problem = "the guest closed the connection without a bye"

    def _say(self, connection: socket.socket) -> None:
        def say() -> None:
            while not self.over.wait(0.1):
                connection.sendall(b"%d\n" % (self.said + 1))
                self.said += 1

        self._guarded(say)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.problem = self.problem or f"the connection: {error}"

    def until_heard(self, more: int = 20) -> None:
        had = self.heard
        until(lambda: self.heard >= had + more or self.problem, f"the peer hears {more} more", BOOT_S)
        assert not self.problem, self.problem

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.over.set()


def _socket_in(namespace: Path) -> socket.socket:
    """A socket of another network namespace, made by a thread that goes there and ends."""
    made: list[socket.socket] = []

    def make() -> None:
        with namespace.open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.socket())

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


class Nic(NamedTuple):
    """The arguments of QEMU's two halves of it."""

    netdev: str
    device: str


class Debian:
    """The guest, its peer and its disk."""

    def __init__(self, lab: Lab, namespace: Path, nic: Nic, qemu: str, smp: int = 4) -> None:
        self.image = find_image()
        self.peer = Peer(namespace)
        self._work = lab.root
        self._namespace = namespace
        self.disk, payload = lab.root / "debian.qcow2", lab.root / "payload.tar"
        pack_payload(payload, HERE / "debian-guest")
        make_overlay(self.image, self.disk)
        kernel, initrd = self.image.kernel("cloud")
        lab.end_agent()
        lab.start_agent(("nsenter", f"--net={namespace}", *DAEMON))  # and its QEMUs
        self.guest = guest = lab.guest(
            "debian",
            *(
                "-smp",
                str(smp),
                "-chardev",
                f"file,id=log,path={lab.root / 'debian.log'},append=on",
                "-serial",
                "chardev:log",
            ),
            *disk_arguments(self.disk, payload),
            *("-netdev", nic.netdev, "-device", nic.device, "-device", "virtio-rng-pci", *lab.agent_port()),
            *("-initrd", str(initrd), "-append", f"{command_line()} cpr.net={GUEST}/24,{HOST}:{PORT}"),
            qemu=qemu,
            size="768M",
        )
        arguments = guest.definition["vm"]["arguments"]
        arguments[arguments.index("-kernel") + 1] = str(kernel)
        guest.definition["vm"]["shutdown-timeout"] = f"{BOOT_S:.0f}s"
        lab.define(guest)
        guest.start()
        until(lambda: guest.console.exists() and guest.report.last > 0, "the Debian guest is up", BOOT_S)
        self.goes_on()

    def goes_on(self) -> None:
        """It counts, writes, and talks with its peer, as ever."""
        self.peer.until_heard()
        files = len(told_files(self.guest.console)[0])
        until(lambda: len(told_files(self.guest.console)[0]) > files + 10, "it writes files", BOOT_S)
        self.guest.assert_unbroken()

    def shut_down(self) -> None:
        """In order; and what it has left is what it has told."""
        done = self.guest.lab.cprctl("stop", self.guest.name)
        assert done.returncode == 0, done.stderr
        assert self.peer.over.wait(PATIENCE_S)
        assert self.peer.problem == ""
        judge(self.image, self.guest.console, self.disk, self._work)

    def close(self) -> None:
        self.peer.close()


def command_line() -> str:
    """The first serial port is the guest's own, the second has the rest of what it says."""
    return COMMAND_LINE.replace("console=ttyS0", "console=ttyS1")


def disk_arguments(disk: Path, payload: Path) -> list[str]:
    return [
        *("-drive", f"if=none,id=root,format=qcow2,file={disk}", "-device", "virtio-blk-pci,drive=root"),
        *("-drive", f"if=none,id=payload,format=raw,readonly=on,file={payload}"),
        *("-device", "virtio-blk-pci,drive=payload,serial=payload"),
    ]


def make_overlay(image: Image, disk: Path) -> None:
    _qemu_img(image, "create", "-q", "-f", "qcow2", "-b", str(image.base), "-F", "raw", str(disk))


def rebase(image: Image, disk: Path) -> None:
    """An overlay from elsewhere, where the image had another name."""
    _qemu_img(image, "rebase", "-u", "-f", "qcow2", "-b", str(image.base), "-F", "raw", str(disk))


def _qemu_img(image: Image, *words: str) -> None:
    subprocess.run([*loader_command(image.root, "usr/bin/qemu-img"), *words], check=True)


def told_files(console: Path) -> tuple[dict[str, str], set[str]]:
    """The files that the guest has told of as durable, with their sums, and those of them that it has removed since."""
    text = console.read_bytes().decode(errors="replace")
    files = dict(re.findall(r"^file (\S+) ([0-9a-f]{64})\n", text, re.MULTILINE))
    return files, set(re.findall(r"^gone (\S+)\n", text, re.MULTILINE))


def judge(image: Image, console: Path, disk: Path, work: Path) -> None:
    """After an orderly end: what the guest found on its disk, and what is found there from outside."""
    said = console.read_bytes().decode(errors="replace")
    checked = re.findall(r"^checked boot=\S+ files=(\d+) wrong=(.*)\n", said, re.MULTILINE)
    files, gone = told_files(console)
    kept = files.keys() - gone
    assert checked == [(str(len(kept)), "0")], said[-2000:]

    raw, found = work / "disk.raw", work / "found"
    _qemu_img(image, "check", "-q", str(disk))
    _qemu_img(image, "convert", "-O", "raw", str(disk), str(raw))
    clean = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert clean.returncode == 0, clean.stdout
    found.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump /srv/load {found}", raw], check=True, capture_output=True)
    raw.unlink()
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (found / "load").iterdir()}
    assert sums == {name: files[name] for name in kept}
    print(f"{console.stem}: {len(kept)} files of {len(files)} kept, as they were written; its file system is clean")

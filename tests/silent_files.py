# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system that stops to answer, as one of a server that is gone does: FUSE, spoken by a process of its own.

    python -m tests.silent_files FD

The protocol is that of linux/fuse.h. One file, ``disk``, is in it. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MNT_DETACH = 2
SIZE = 1 << 20
FIRST, DISK = 1, 2
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = (
    *(1, 2, 3, 4, 14, 15, 16, 17, 18, 20, 25, 26),
    *(27, 28, 29),
)
ACCESS, INTERRUPT, BATCH_FORGET = 34, 36, 42
UNANSWERED = (FORGET, BATCH_FORGET, INTERRUPT)
EMPTY = (RELEASE, FSYNC, FLUSH, RELEASEDIR, ACCESS, READDIR)


class Server:
    """Answers until SIGUSR1, and again from SIGUSR2 on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._content = bytearray(SIZE)
        self._silent = False
        signal.signal(signal.SIGUSR1, lambda *_: self._set(silent=True))
        signal.signal(signal.SIGUSR2, lambda *_: self._set(silent=False))

    def _set(self, *, silent: bool) -> None:
        self._silent = silent
        os.write(1, b"heard\n")

    def serve(self) -> None:
        print("serves", flush=True)
        waiting: list[bytes] = []
        while True:
            if waiting and not self._silent:
                for request in waiting:
                    self._answer(request)
                waiting.clear()
            if select.select([self._fd], [], [], 0.1)[0]:
                request = os.read(self._fd, SIZE + 4096)
                if self._silent:
                    waiting.append(request)
                else:
                    self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode in UNANSWERED:
            return
        body = self._body(opcode, node, request[40:])
        error, body = (-body, b"") if isinstance(body, int) else (0, body)
        with contextlib.suppress(FileNotFoundError):  # who asked was interrupted
            os.write(self._fd, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def _body(self, opcode: int, node: int, rest: bytes) -> bytes | int:
        """What is answered, or an errno."""
        if opcode == INIT:
            _, minor, readahead = struct.unpack_from("<III", rest)
            return struct.pack("<IIIIHHIIHHIIHH", 7, min(minor, 31), readahead, 0, 16, 12, 1 << 17, 1, 32, 0, 0, 0, 0, 0)
        if opcode == LOOKUP:
            return self._entry() if rest.rstrip(b"\0") == b"disk" else errno.ENOENT
        if opcode in (GETATTR, SETATTR):
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<QII", 1, 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", rest)
            return bytes(self._content[offset : offset + size])
        if opcode == WRITE:
            _, offset, size = struct.unpack_from("<QQI", rest)
            self._content[offset : offset + size] = rest[40 : 40 + size]
            return struct.pack("<II", size, 0)
        if opcode == STATFS:
            return struct.pack("<QQQQQIIII24x", SIZE, SIZE, SIZE, 9, 9, 512, 255, 512, 0)
        return b"" if opcode in EMPTY else errno.ENOSYS

    def _entry(self) -> bytes:
        return struct.pack("<QQQQII", DISK, 1, 0, 0, 0, 0) + self._attributes(DISK)

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == FIRST else stat.S_IFREG | 0o666
        size = 0 if node == FIRST else SIZE
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 512, 0)


class SilentFiles:
    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self.disk = directory / "disk"
        self._process = process

    def fall_silent(self) -> None:
        self._tell(signal.SIGUSR1)

    def speak(self) -> None:
        self._tell(signal.SIGUSR2)

    def stop(self) -> None:
        """It does not even hear what it is asked from now on: SIGKILL ends who waits, as it does for NFS."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _tell(self, number: int) -> None:
        """Returns when it has heard it."""
        self._process.send_signal(number)
        assert self._process.stdout
        self._process.stdout.readline()


@contextlib.contextmanager
def silent_files(directory: Path) -> Iterator[SilentFiles]:
    """Mounted at ``directory``. Who waits for it at the end gets an error."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"silent", os.fsencode(directory), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    program = [sys.executable, "-m", "tests.silent_files", str(fd)]
    process = subprocess.Popen(program, pass_fds=(fd,), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    os.close(fd)
    assert process.stdout
    assert process.stdout.readline() == "serves\n"
    try:
        yield SilentFiles(directory, process)
    finally:
        process.kill()
        process.communicate()
        libc.umount2(os.fsencode(directory), MNT_DETACH)


if __name__ == "__main__":
    Server(int(sys.argv[1])).serve()

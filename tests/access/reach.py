#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What belongs to a VM, and what of it can be reached. Runs in the host VM.

reach.py targets VM     as root: all that there is, by enumeration, as JSON
reach.py try            as anybody: those on stdin that can be reached, as JSON
reach.py table FILE…    answers of both, as a table; fails if a VM reaches another one's, or nothing of its own
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RUN, STATE, LOGS = Path("/run/cpr-agent"), Path("/var/lib/cpr-agent"), Path("/var/log/cpr-agent")
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
OF_OTHERS = ("auxv", "environ", "maps", "mem", "pagemap", "smaps", "fd", "fdinfo", "root", "cwd", "exe", "map_files")
"""What /proc tells of a process to those alone who may trace it (proc(5)); the rest any user of the host can read."""
MODES = {"user": "as its user", "unit": "in its unit", "profile": "with AppArmor"}

Target = dict[str, Any]


def targets(vm: str) -> Iterator[Target]:
    pid = next((pid for place in (vm, f"{vm}:b") if (pid := main_pid(place))), 0)
    seen = {link.name: os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").glob("*")} if pid else {}
    yield from files_of(vm, {*seen.values(), *nodes(vm)})
    if pid:
        yield from process_of(pid, seen)


def files_of(vm: str, opened: set[str]) -> Iterator[Target]:
    for place in (vm, f"{vm}:b"):
        yield target("QMP and other sockets", "directory", RUN / "vm" / place)
        yield from (target("QMP and other sockets", "socket", path) for path in (RUN / "vm" / place).glob("*"))
        yield target("tickets", "directory", RUN / "tickets" / place)
    for name in sorted(opened):
        for prefix, what in {"/dev/dax": "RAM in /dev/dax", "/dev/shm/": "RAM in /dev/shm", "/srv/disks/": "disks"}.items():
            if name.startswith(prefix):
                yield target(what, "file", name)
    for path in (*LOGS.glob(f"{vm}.log*"), *Path("/srv/consoles").glob(f"{vm}.*")):
        yield target("logs", "file", path)
    for root in (STATE, *(RUN / name for name in ("launched", "setup", "second"))):
        for path in (root, *root.rglob("*")):
            yield target("state and records", "directory" if path.is_dir() else "file", path)


def process_of(pid: int, seen: dict[str, str]) -> Iterator[Target]:
    names = [*OF_OTHERS, *(f"fd/{number}" for number, path in seen.items() if path.startswith("/"))]
    yield from (target("its process in /proc", "file", f"/proc/{pid}/{name}") for name in names)
    yield from (target("signals, ptrace, its descriptors", kind, pid) for kind in ("signal", "ptrace", "descriptor"))


def target(what: str, kind: str, name: object) -> Target:
    return {"what": what, "kind": kind, "name": str(name)}


def main_pid(place: str) -> int:
    command = ["systemctl", "show", "--property=MainPID", "--value", f"cpr-vm@{place}.service"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def nodes(vm: str) -> list[str]:
    records = [json.loads(path.read_text()) for path in (RUN / "launched").glob(f"{vm}*.json")]
    return [str(node) for record in records if record["vm"] == vm for node in record["nodes"]]


# -- attempts ------------------------------------------------------------------------------------------------------------


def opens(name: str) -> bool:
    for way in (os.O_RDONLY, os.O_WRONLY):
        with contextlib.suppress(OSError):
            os.close(os.open(name, way | os.O_NONBLOCK | os.O_CLOEXEC))
            return True
    return False


def connects(name: str) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as connection:
            connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):  # its queue is full
                connection.connect(name)
            return True
    return False


def enters(name: str) -> bool:
    """Reads what is in it, or makes something there."""
    with contextlib.suppress(OSError):
        list(Path(name).iterdir())
        return True
    with contextlib.suppress(OSError):
        (forged := Path(name) / "forged").mkdir()
        forged.rmdir()
        return True
    return False


def signals(pid: str) -> bool:
    with contextlib.suppress(OSError):
        os.kill(int(pid), 0)
        return True
    return False


def traces(pid: str) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_SEIZE, int(pid), None, None) != 0:
        return False
    libc.ptrace(PTRACE_DETACH, int(pid), None, None)
    return True


def takes_a_descriptor(pid: str) -> bool:
    """pidfd_getfd(2), number 438."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        pidfd = os.pidfd_open(int(pid))
    except OSError:
        return False
    got = libc.syscall(438, pidfd, 10, 0)
    os.close(pidfd)
    return bool(got >= 0)


ATTEMPTS: dict[str, Callable[[str], bool]] = {
    "file": opens,
    "socket": connects,
    "directory": enters,
    "signal": signals,
    "ptrace": traces,
    "descriptor": takes_a_descriptor,
}


# -- the table -----------------------------------------------------------------------------------------------------------


def table(targets_file: str, files: list[str]) -> bool:
    """Files are named ATTACKER.MODE. Whether each VM reaches its own, and no other one's."""
    known = json.loads(Path(targets_file).read_text())
    tried: Counter[tuple[str, str]] = Counter()
    own: Counter[str] = Counter()
    harm: list[tuple[str, str, str]] = []
    for path in map(Path, files):
        attacker, mode = path.name.split(".")
        reached = json.loads(path.read_text())
        tried.update((one["what"], mode) for one in known if one["vm"] != attacker)
        own[mode] += sum(one["vm"] == attacker for one in reached)
        harm += [(one["what"], mode, f"{attacker} -> {one['name']}") for one in reached if one["vm"] != attacker]
    counts = Counter((what, mode) for what, mode, _ in harm)
    print(f"{'of another VM, reached of tried':36}" + "".join(f"{name:>16}" for name in MODES.values()))
    for what in sorted({what for what, _ in tried}):
        print(f"{what:36}" + "".join(f"{f'{counts[what, mode]} of {tried[what, mode]}':>16}" for mode in MODES))
    print(f"{'of its own, reached':36}" + "".join(f"{own[mode]:>16}" for mode in MODES))
    for what, mode, name in harm:
        print(f"REACHED {what}, {MODES[mode]}: {name}")
    return not harm and bool(tried) and all(own[mode] for mode in MODES)


def main(arguments: list[str]) -> int:
    if arguments[1] == "table":
        return 0 if table(arguments[2], arguments[3:]) else 1
    if arguments[1] == "targets":
        json.dump([{"vm": vm, **one} for vm in arguments[2:] for one in targets(vm)], sys.stdout)
    else:
        found = [one for one in json.load(sys.stdin) if ATTEMPTS[one["kind"]](one["name"])]
        json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

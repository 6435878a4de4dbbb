# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent weighs when nothing happens, and how long one waits for it and for its command."""

from __future__ import annotations

import compileall
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.bench.figures import Figure, Runs
from scripts.bench.goals import GOALS
from scripts.bench.machine import Machine, machine
from scripts.cpu import cpu_s
from tests.lab import DAEMON, PATIENCE_S, ROOT

DEFINED, RUNNING = 100, 50
IDLE_S = 60
ROUNDS = 15
_WATCHDOG_S = 60
"""WatchdogSec= of cpr-agent.service; feeding it is a part of being idle."""


def at_rest() -> Iterator[Figure]:
    """Resident memory by /proc/PID/smaps_rollup; CPU time by the process's CPU clock."""
    with machine(agent=False) as here, _notified(here.directory / "notify"):
        guests = [here.lab.guest(f"web{number}") for number in range(DEFINED)]
        here.lab.start_agent()
        for guest in guests[:RUNNING]:
            guest.start()
        for guest in guests[:RUNNING]:
            guest.until_counts()
        pid = here.agent_pid
        here.lab.client(lambda client: client.manager("ListVMs"))
        before_s = cpu_s(pid)
        time.sleep(IDLE_S)  # being idle is what is measured
        used_s = cpu_s(pid) - before_s
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    resident, share = (int(re.findall(rf"^{what}: +(\d+) kB$", rollup, re.MULTILINE)[0]) / 1024 for what in ("Rss", "Pss"))
    raw = {"Rss of smaps_rollup": Runs([resident], "MiB"), "Pss, shared pages by their share": Runs([share], "MiB")}
    yield Figure("memory", GOALS["memory"], resident, raw)
    idle = {f"CPU time in {IDLE_S} s": Runs([used_s * 1000], "ms")}
    yield Figure("idle", GOALS["idle"], used_s / IDLE_S * 100, idle, "with the watchdog of its unit")


def start() -> Iterator[Figure]:
    """From the fork to READY=1, and to the end of the imports, of the modules from outside the standard library that the
    agent has imported by then. No VM is defined; the page cache is warm, and byte code is compiled."""
    compileall.compile_dir(ROOT / "agent", quiet=1)  # no import does it where PYTHONDONTWRITEBYTECODE is set
    modules = _third_party_modules()
    imports = f"import {', '.join(modules)}; import os; os.write(1, b'.')"
    ours: list[float] = []
    theirs: list[float] = []
    with machine(agent=False) as here:
        for round_number in range(ROUNDS + 1):
            imported_s, ready_s = _seconds_to_output(sys.executable, "-c", imports), _seconds_to_ready(here)
            if round_number:  # the first warms up
                theirs.append(imported_s)
                ours.append(ready_s)
    raw = {"agent": Runs(ours), "imports alone": Runs(theirs)}
    packages = sorted({name.partition(".")[0] for name in modules})
    yield Figure("start", GOALS["start"], raw["agent"].median / raw["imports alone"].median, raw, ", ".join(packages))


def status() -> Iterator[Figure]:
    """A new process each time, with a warm page cache. busctl gets all objects and properties by one call."""
    ours: list[float] = []
    theirs: list[float] = []
    with machine() as here:
        here.guest("web1", 16)
        busctl = ["busctl", f"--address={here.lab.address}", "call", "org.cpragent1", "/org/cpragent1"]
        busctl += ["org.freedesktop.DBus.ObjectManager", "GetManagedObjects"]
        for round_number in range(ROUNDS + 1):
            begun = time.monotonic()
            subprocess.run(busctl, check=True, stdout=subprocess.DEVNULL)
            called = time.monotonic()
            if (done := here.lab.cprctl("status")).returncode:
                raise RuntimeError(f"cprctl status: {done.stderr}")
            ended = time.monotonic()
            if round_number:
                theirs.append(called - begun)
                ours.append(ended - called)
    raw = {"cprctl status": Runs(ours), "busctl call": Runs(theirs)}
    value = raw["cprctl status"].median - raw["busctl call"].median
    yield Figure("status", GOALS["status"], value, raw, "1 VM, which runs")


def _third_party_modules() -> list[str]:
    """What cpr_agent.daemon imports from outside the standard library, itself aside; as Python names it."""
    program = "import cpr_agent.daemon, sys\nfor n, m in list(sys.modules.items()): print(n, getattr(m, '__file__', None))"
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    modules = [one.partition(" ") for one in said.splitlines()]
    return [
        name
        for name, _, path in modules
        if "/site-packages/" in path and not name.startswith(("__editable__", "_distutils_hack"))
    ]


def _seconds_to_output(*command: str) -> float:
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        if not process.stdout.read(1):
            raise RuntimeError(f"{command[-1]}: no output")
        return time.monotonic() - begun


def _seconds_to_ready(here: Machine) -> float:
    with _notified(here.directory / "notify") as notifications:
        command = [*DAEMON, f"--root={here.lab.root}", f"--bus-address={here.lab.address}"]
        begun = time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as agent:
            while b"READY=1" not in notifications.recv(4096):
                pass
            ready_s = time.monotonic() - begun
            agent.terminate()
    return ready_s


@contextlib.contextmanager
def _notified(path: Path) -> Iterator[socket.socket]:
    """Be, to what is started meanwhile, what systemd is to a unit with Type=notify and WatchdogSec=."""
    given = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(_WATCHDOG_S * 1_000_000)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(path))
        notifications.settimeout(PATIENCE_S)
        os.environ.update(given)
        try:
            yield notifications
        finally:
            for name in given:
                del os.environ[name]
            path.unlink()

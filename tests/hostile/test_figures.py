# SPDX-License-Identifier: GPL-2.0-or-later
"""The bounds in figures: each is measured, printed, and compared with what may be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from cpr_agent.bus.client import CallError
from tests.hostile.conftest import assert_contained
from tests.lab import DAEMON, ROOT, Lab, until

READY_S = 3.0
SILENT, VMS = 3, 10


def figure(what: str, value: float, limit: float, unit: str) -> None:
    print(f"figure: {what}: {value:.2f} {unit}, at most {limit:.2f}", file=sys.stderr)
    assert value <= limit, what


def test_ready_beside_silent_qemus(lab: Lab) -> None:
    """Stopped processes, whose sockets still accept."""
    guests = [lab.running(f"vm{number}") for number in range(VMS)]
    guests[-1].save()
    silent = guests[:SILENT]
    pids = [guest.pid for guest in silent]
    lab.end_agent()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        before = lab.log.stat().st_size
        began = time.monotonic()
        with lab.log.open("ab") as log:
            program = [*DAEMON, f"--root={lab.root}", f"--bus-address={lab.address}"]
            lab._agent = subprocess.Popen(program, cwd=ROOT, stderr=log)
        until(lambda: b"run as processes" in lab.log.read_bytes()[before:], "READY")
        ready_s = time.monotonic() - began
        states = lab.client(lambda client: client.manager("ListVMs"))
        assert {state for name, state, _ in states if name in ("vm0", "vm1", "vm2")} == {"recovering"}
        try:
            silent[0].call("Resume")
        except CallError as error:
            assert error.kind == "Busy"
            assert "recovery" in str(error)
        else:
            raise AssertionError("an act on a VM that is not recovered")
        assert lab.job("LoadAll") == "done"  # once all are recovered
        assert [guest.state for guest in silent] == ["unreachable"] * SILENT
        assert {guest.state for guest in guests[SILENT:]} == {"running"}
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    figure(f"READY with {VMS} VMs of which {SILENT} are silent", ready_s, READY_S, "s")
    lab.client(lambda client: client.manager("Reload"))
    assert {guest.state for guest in guests} == {"running"}
    assert_contained(lab, *guests)

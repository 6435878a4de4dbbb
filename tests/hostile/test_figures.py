# SPDX-License-Identifier: GPL-2.0-or-later
"""The bounds in figures: each is measured, printed, and compared with what may be."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from cpr_agent.bus.client import CallError
from tests.hostile.conftest import MAX_RSS_MIB, Evil, Polkit, User, assert_contained, figure, rss_mib, saved_all_in_s
from tests.hostile.test_qemus import FLOODS
from tests.lab import DAEMON, ROOT, Lab, until

CASE_S = float(os.environ.get("CPR_TEST_CASE_S", "10"))
"""How long each flood lasts whose memory is measured."""
READY_S = 3.0
SILENT, VMS = 3, 10


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


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("what", ["list", "managed", "properties", "check", "deep key", "report", "elsewhere"])
def test_a_save_of_all_beside_a_user_who_calls_without_end(lab: Lab, polkit: Polkit, what: str) -> None:
    """His allowance is used up before, so that he is refused most of the time; he goes on as fast as he is answered."""
    polkit("looking")
    guests = [lab.running(f"vm{number}") for number in range(4)]
    alone = min(saved_all_in_s(lab) for _ in range(3))
    user = User(lab, f"storm of {what}", calls=30, connections=4)
    beside = sorted(saved_all_in_s(lab) for _ in range(5))[2]
    print(user.answers())
    figure(f"SaveAll beside a storm of {what}, against alone ({alone:.3f} s)", beside / alone, 2.0, "times")
    assert_contained(lab, *guests)


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_memory_after_a_flood_of_a_qemu(lab: Lab, evil: Evil, flood: str) -> None:
    """Each look connects anew, and the flood begins again."""
    liar = evil()
    liar.lie({"on": "query-status", "flood": flood})
    end = time.monotonic() + CASE_S
    while time.monotonic() < end:
        lab.client(lambda client: client.manager("Reload"))
    figure(f"the agent's peak RSS after {CASE_S:.0f} s of it", rss_mib(lab), MAX_RSS_MIB, "MiB")
    assert_contained(lab)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("what", ["list", "managed", "deep key", "shorter pattern", "report", "elsewhere"])
def test_memory_after_a_storm_of_a_user(lab: Lab, polkit: Polkit, what: str) -> None:
    polkit("looking")
    guest = lab.running("good")
    user = User(lab, f"storm of {what}", calls=100, connections=4)
    end = time.monotonic() + CASE_S
    while time.monotonic() < end:
        guest.save()
        guest.load()
    user.answers()
    figure(f"the agent's peak RSS after {CASE_S:.0f} s of {what}", rss_mib(lab), MAX_RSS_MIB, "MiB")
    assert_contained(lab, guest)

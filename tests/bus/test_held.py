# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose memory was proved to be changed, while the QEMU that saved it is still there: nothing lets it run but the
memory that it had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.cancel_lab import rollback
from tests.kexec_lab import KexecLab
from tests.lab import Guest, Lab, until
from tests.terminal import Terminal

SPOILT = 5 << 20, 4 << 20
"""Where in the RAM, and how much of it (bytes)."""


def spoil(guest: Guest) -> bytes:
    """Overwrite a part of its RAM; returns what was there."""
    at, size = SPOILT
    with guest.ram.open("r+b") as ram:
        ram.seek(at)
        was = ram.read(size)
        ram.seek(at)
        ram.write(b"\xaa" * size)
    return was


def mend(guest: Guest, was: bytes) -> None:
    with guest.ram.open("r+b") as ram:
        ram.seek(SPOILT[0])
        ram.write(was)


def assert_stands(guest: Guest, pid: int, last: int) -> None:
    """In the QEMU that saved it, and it has not run since."""
    assert guest.state == "held"
    assert guest.pid == pid
    assert guest.admin("query-status")["status"] == "postmigrate"
    assert guest.report.last == last
    assert "manifest.json" in guest.checkpoint_files()


@pytest.mark.parametrize("act", ["load", "resume"])
def test_no_act_lets_it_run_before_its_memory_is_right_again(each_lab: Lab, act: str) -> None:
    guest = each_lab.running()
    guest.save()
    pid, last = guest.pid, guest.report.last
    was = spoil(guest)
    for refused in (act, "resume", "load", "start"):
        shown = each_lab.cprctl(refused, "web1")
        assert shown.returncode == (1 if refused == "start" else 4), shown
        words = ("is saved",) if refused == "start" else ("its RAM is not what it was: witness ", ", found ")
        assert all(word in shown.stderr for word in words), shown.stderr
        assert_stands(guest, pid, last)
    assert "held" in each_lab.cprctl("list").stdout
    ((what, expected, found),) = guest.properties["Held"]["evidence"]
    status = each_lab.cprctl("status", "web1").stdout
    assert all(words in status for words in (what, expected, found))
    mend(guest, was)
    shown = each_lab.cprctl("resume", "web1")
    assert shown.returncode == 0, shown.stderr
    assert (guest.state, guest.pid, guest.properties["Held"]) == ("running", pid, {})
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_its_state_is_told_everywhere_and_a_discard_asks_and_ends_it(lab: Lab, tmp_path: Path) -> None:
    lab.end_agent()
    metrics = lab.root / "var/lib/prometheus/node-exporter/cpr-agent.prom"
    motd = lab.root / "run/motd.d/50-cpr-agent"
    for path in (metrics, motd):
        path.parent.mkdir(parents=True)
    lab.start_agent()
    guest = lab.running()
    guest.save()
    pid, last = guest.pid, guest.report.last
    spoil(guest)
    with pytest.raises(CallError, match="its RAM is not what it was"):
        guest.load()
    assert_stands(guest, pid, last)
    until(lambda: 'cpr_guest_held{vm="web1"} 1\n' in metrics.read_text(), "the metrics tell")
    assert 'cpr_guests{state="held"} 1\n' in metrics.read_text()
    until(lambda: motd.exists() and "Held, and waiting for you: web1" in motd.read_text(), "the line at login tells")

    command = f"{sys.executable} -c 'from cpr_agent.cli.main import main; main()' discard web1"
    for answer, ended in (("n", 1), ("y", 0)):
        terminal = Terminal(tmp_path, command, CPR_AGENT_BUS_ADDRESS=lab.address)
        terminal.until_shows("The saved guest of web1 will be lost. Go on?")
        assert_stands(guest, pid, last)
        terminal.type(f"{answer}\n")
        assert (terminal.ended() == 0) == (ended == 0)
    assert (guest.state, guest.pid) == ("stopped", 0)
    assert not Path(f"/proc/{pid}").exists()
    assert guest.checkpoint_files() == ["manifest.json.discarded", "vmstate.discarded"]
    until(lambda: 'cpr_guest_held{vm="web1"} 0\n' in metrics.read_text(), "the metrics tell")
    guest.start()
    until(lambda: len(guest.report.boots) == 2, "it boots")
    assert guest.state == "running"


def test_an_agent_that_is_restarted_finds_it_held(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    pid, last = guest.pid, guest.report.last
    spoil(guest)
    with pytest.raises(CallError, match="its RAM is not what it was"):
        guest.call("Resume")
    lab.end_agent()
    lab.start_agent()
    assert_stands(guest, pid, last)


def test_a_roll_back_holds_the_one_of_three_whose_memory_has_changed(lab: Lab) -> None:
    kexec_lab = KexecLab(lab, 3)
    assert lab.job("SaveAll") == "done"
    spoilt = kexec_lab.guests[1]
    pids = [guest.pid for guest in kexec_lab.guests]
    last = spoilt.report.last
    was = spoil(spoilt)
    result = rollback(kexec_lab)
    assert "not every guest could be resumed" in result
    assert "he others were resumed (web1, web3), but not VM web2: its RAM is not what it was" in result
    assert_stands(spoilt, pids[1], last)
    for guest in (kexec_lab.guests[0], kexec_lab.guests[2]):
        assert guest.state == "running"
        guest.assert_unbroken()
    assert [guest.pid for guest in kexec_lab.guests] == pids, "they went on in their own QEMUs"
    mend(spoilt, was)
    spoilt.call("Resume")
    spoilt.assert_unbroken()
    assert spoilt.pid == pids[1]

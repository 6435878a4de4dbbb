# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent is killed at each record of its journal and each act of its store; the next one finishes or takes back."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable

import pytest

from cpr_agent.bus.client import CallError
from cpr_agent.bus.client import options as variants
from tests.lab import Guest, Lab, until


def dies(lab: Lab, guest: Guest, point: str, member: str) -> None:
    """The agent is replaced by one that is killed at ``point`` of this call, and that one by an ordinary one."""
    lab.end_agent()
    lab.start_agent((sys.executable, "-m", "tests.bus.mortal_agent", point))
    acts: dict[str, Callable[[], object]] = {
        "save": guest.save,
        "load": guest.load,
        "resume": lambda: guest.call("Resume"),
        "refresh": lambda: guest.call("Refresh", "a{sv}", {}),
        "refresh in turn": lambda: guest.call("Refresh", "a{sv}", variants(in_turn=True)),
    }
    with pytest.raises(CallError) as caught:
        acts[member]()
    assert caught.value.kind == "org.freedesktop.DBus.Error.NoReply"
    assert lab.agent_ended() == -signal.SIGKILL
    lab.start_agent()


@pytest.mark.parametrize(
    ("point", "state"),
    [
        ("after save-begin", "running"),
        ("before seal", "running"),
        ("before commit", "running"),
        ("after commit", "saved"),
    ],
)
def test_killed_during_a_save(lab: Lab, point: str, state: str) -> None:
    guest = lab.running()
    dies(lab, guest, point, "save")
    guest.until_state(state)
    if state == "running":
        guest.assert_unbroken()
        guest.save()
    guest.load()
    guest.assert_unbroken()


def test_killed_during_the_save_of_a_paused_guest(lab: Lab) -> None:
    """QEMU has written its state, and would not do it again: it is stored now."""
    guest = lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    last = guest.report.last
    dies(lab, guest, "before seal", "save")
    guest.until_state("saved")
    guest.load()
    assert guest.state == "paused"
    assert guest.report.last == last
    guest.call("Resume")
    guest.assert_unbroken()


@pytest.mark.parametrize(
    "point",
    [
        *("after load-begin", "before resume", "before consume"),
        *("after consume", "before resumed", "after resumed"),
    ],
)
def test_killed_during_a_load(lab: Lab, point: str) -> None:
    """A load that began is repeated or finished by the next agent."""
    guest = lab.running()
    guest.save()
    dies(lab, guest, point, "load")
    guest.until_state("running")
    guest.assert_unbroken()
    assert "manifest.json" not in guest.checkpoint_files()
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_killed_during_the_load_of_a_paused_guest(lab: Lab) -> None:
    guest = lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    guest.save()
    dies(lab, guest, "after consume", "load")
    guest.until_state("paused")
    guest.call("Resume")
    guest.assert_unbroken()


@pytest.mark.parametrize("point", ["after rollback", "after discard-files"])
def test_killed_while_a_save_is_taken_back(lab: Lab, point: str) -> None:
    guest = lab.running()
    guest.save()
    pid = guest.pid
    dies(lab, guest, point, "resume")
    guest.until_state("running" if point == "after discard-files" else "saved")
    if guest.state == "saved":
        guest.call("Resume")
    assert guest.pid == pid
    guest.assert_unbroken()
    assert "manifest.json" not in guest.checkpoint_files()


def test_an_agent_that_loses_its_bus_ends_and_its_guests_go_on(lab: Lab) -> None:
    guest = lab.running()
    lab.end_bus()
    assert lab.agent_ended() == 1
    guest.until_counts()
    assert guest.report.problems == ()


def test_a_guest_that_an_admin_migrated_away_is_not_resumed(lab: Lab) -> None:
    """It runs elsewhere then. The agent knows of an older save of it, which says nothing about this."""
    guest = lab.running()
    guest.save()
    guest.load()
    guest.until_counts()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(lab.root / "away"))
        listener.listen()
        guest.admin("migrate", uri=f"unix:{lab.root}/away")
        stream, _ = listener.accept()
        with stream:
            while stream.recv(65536):
                pass
    until(lambda: guest.admin("query-status")["status"] == "postmigrate", "the guest is away")
    last = guest.report.last
    lab.end_agent(signal.SIGKILL)
    lab.start_agent()
    guest.until_state("paused")
    assert guest.admin("query-status")["status"] == "postmigrate"
    assert guest.report.last == last
    result = lab.job("SaveAll", survives="qemu-restart")
    assert "VM web1: can't be saved: its guest stands where a migration has left it" in result

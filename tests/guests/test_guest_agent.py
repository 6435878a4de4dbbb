# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest agents that hang, lie or speak garbage, in a real Linux: its guest is as before, and the error says what to do.

What they say is scripts/guest/lying-agent's; more of what one could say is in tests/unit/test_guest_agent.py.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.guests.tally import case
from tests.guests.test_sleep import sleepy
from tests.lab import Guest, Lab, refused, until

MEND = "start, or restart, qemu-guest-agent in the guest"


def as_before(guest: Guest) -> None:
    assert guest.state == "running"
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


@pytest.mark.parametrize(
    ("lies", "why"),
    [
        ("hang", "did not answer guest-sync-delimited within 5 s"),
        ("garbage", "answered guest-sync-delimited with garbage"),
        ("flood", "answered guest-sync-delimited with garbage"),
    ],
)
def test_one_that_makes_no_sense_is_not_asked_to_put_its_guest_to_sleep(
    lab: Lab, linux_with_agent: Path, lies: str, why: str
) -> None:
    guest = sleepy(lab, linux_with_agent, f"cpr.lies={lies}")
    with case(f"a guest agent in the way of {lies}, asked for sleep"):
        assert MEND in refused(guest, "Blocked", why, "The guest was not touched", member="CprSave")
        as_before(guest)
        found = lab.cprctl("check", guest.name)
        assert why in found.stdout
        assert MEND in found.stdout
        as_before(guest)


@pytest.mark.parametrize(
    ("lies", "why"),
    [
        ("claim", "was asked to sleep, and did not within 5 s"),
        ("refuse", "refused guest-suspend-ram: [2J[/b] not me."),
    ],
)
def test_one_that_does_not_put_its_guest_to_sleep(lab: Lab, linux_with_agent: Path, lies: str, why: str) -> None:
    guest = sleepy(lab, linux_with_agent, f"cpr.lies={lies}", timeout_s=5)
    with case(f"a guest agent in the way of {lies}, asked for sleep"):
        remedy = "the guest's own log says what keeps it awake"
        assert remedy in refused(guest, "SaveFailed", why, "The guest was not stopped", member="CprSave").lower()
        as_before(guest)
        shown = lab.cprctl("status", guest.name)
        assert shown.returncode == 0, shown.stderr
        as_before(guest)


def test_a_guest_that_goes_to_sleep_when_nobody_waits_any_more_is_woken(lab: Lab, linux_with_agent: Path) -> None:
    guest = sleepy(lab, linux_with_agent, "cpr.lies=late", timeout_s=5)
    with case("a guest agent that puts its guest to sleep late"):
        refused(guest, "SaveFailed", "did not within 5 s", "should it go to sleep late, it is woken", member="CprSave")
        until(lambda: "its guest went to sleep late" in lab.log.read_text(), "the guest sleeps, and is woken")
        guest.until_state("running")
        as_before(guest)


@pytest.mark.parametrize(
    ("lies", "why"),
    [
        ("hang", "did not answer guest-sync-delimited"),
        ("flood", "with garbage"),
        ("claim", "says that it has set the clock, which is "),
        ("refuse", "refused guest-set-time: [2J[/b] not me"),
    ],
)
def test_one_that_does_not_set_the_clock(lab: Lab, linux_with_agent: Path, lies: str, why: str) -> None:
    """Its guest runs all the same, and the history tells."""
    guest = lab.linux_guest("web1", linux_with_agent, f"cpr.lies={lies}", *lab.agent_port())
    guest.start()
    guest.until_counts()
    with case(f"a guest agent in the way of {lies}, asked to set the clock"):
        guest.save()
        threading.Event().wait(5)  # so that its clock is behind
        guest.load()
        guest.assert_unbroken()
        (told,) = until(
            lambda: [
                h for h in lab.client(lambda client: client.manager("ListHistory", "a{sv}", {})) if h["clock-problem"]
            ],
            "it is told",
        )
        assert why in told["clock-problem"]
        shown = lab.cprctl("history")
        assert shown.returncode == 0, shown.stderr
        assert f"its clock was not set: {told['clock-problem']}" in shown.stdout.replace("\n", " ")
        guest.assert_unbroken()

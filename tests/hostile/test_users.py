# SPDX-License-Identifier: GPL-2.0-or-later
"""Local users, who may look by default: what one of them sends costs little, and ends nothing."""

from __future__ import annotations

import os

import pytest

from tests.bus.conftest import qemu_of
from tests.hostile.conftest import Polkit, User, assert_contained, figure, saved_all_in_s
from tests.hostile.test_qemus import saved_in_s
from tests.lab import Guest, Lab, script, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.mark.parametrize("what", ["NUL in TOML", "NUL in a name", "surrogate", "long key", "deep key", "slow pattern"])
def test_a_text_of_a_caller_ends_nothing(lab: Lab, good: Guest, polkit: Polkit, what: str) -> None:
    polkit("looking")
    answers = User(lab, what).answers()
    assert set(answers) <= {"InvalidDefinition", "InvalidArgument", "ok"}
    assert_contained(lab, good)


@pytest.mark.parametrize(("how", "answer"), [("looking", "InvalidArgument"), ("no", "AccessDenied")])
def test_arguments_of_many_values_are_not_read(lab: Lab, good: Guest, polkit: Polkit, how: str, answer: str) -> None:
    """64 KiB of them took up to a second, in which nothing else was done."""
    polkit(how)
    for what in ("check of many values", "list of many values"):
        assert User(lab, what).answers() == {answer: 1}
    assert ("too many values" in lab.log.read_text()) == (how == "looking")
    assert_contained(lab, good)


FLOODS = [
    ("deep key", 20, 1),
    ("shorter pattern", 20, 1),
    ("managed", 120, 4),
    ("properties", 120, 4),
    ("check", 100, 2),
    ("report", 120, 2),
]


@pytest.mark.parametrize("flood", FLOODS, ids=[what for what, _, _ in FLOODS])
def test_many_calls_cost_roots_save_little(lab: Lab, good: Guest, polkit: Polkit, flood: tuple[str, int, int]) -> None:
    what, calls, connections = flood
    polkit("looking")
    good.save()
    good.load()
    before = saved_in_s(lab)
    user = User(lab, what, calls=calls, connections=connections)
    good.save()
    assert saved_in_s(lab) <= max(2 * before, before + 0.5)
    good.load()
    answers = user.answers()
    assert sum(answers.values()) == calls * connections
    assert "Internal" not in answers
    assert_contained(lab, good)


@pytest.mark.parametrize("what", ["calls", "variants", "lists", "signals"])
def test_messages_that_want_no_answer_cost_roots_save_little(lab: Lab, good: Guest, polkit: Polkit, what: str) -> None:
    """As fast as the bus takes them, and from a user who may nothing: no call of root's fails, and none waits for long. It
    took 38 s, and answers of the bus came too late for root to be known."""
    polkit("no")
    other = lab.running("other")
    alone_s = min(saved_all_in_s(lab) for _ in range(2))
    user = User(lab, "flood of pings of the bus", connections=2)
    bus_s = max(saved_all_in_s(lab) for _ in range(2))
    user.answers()
    user = User(lab, f"flood of {what}", connections=2)
    lab.client(lambda client: client.manager("ListVMs"))
    beside_s = min(saved_all_in_s(lab) for _ in range(3))
    assert user.answers()["frames"] > 100
    compared = f"SaveAll beside {what} (alone {alone_s:.2f} s, beside pings of the bus {bus_s:.2f} s)"
    figure(compared, beside_s, 4 * max(alone_s, bus_s) + 2.0, "s")
    assert_contained(lab, good, other)


def test_questions_change_nothing_in_a_qemu_that_hands_its_guest_over(lab: Lab, polkit: Polkit) -> None:
    """A question for blockers once set the mode of a migration, also in the middle of one."""
    polkit("looking")
    guest = lab.guest("good", "-machine", "aux-ram-share=on", qemu=qemu_of("10.0"))
    guest.start()
    guest.until_counts()
    how = guest.call("Refresh", "a{sv}", {})
    user = User(lab, "storm of properties", calls=2)
    assert [guest.call("Refresh", "a{sv}", {}) for _ in range(3)] == [how] * 3
    assert set(user.answers()) <= {"ok", "LimitsExceeded"}
    assert_contained(lab, guest)


def test_a_look_runs_no_program_of_roots(lab: Lab, good: Guest, polkit: Polkit) -> None:
    hooks = lab.root / "etc/cpr-agent/hooks.d/check.d"
    hooks.mkdir(parents=True)
    ran = lab.root / "ran"
    script(hooks / "10-hook", f"#!/bin/sh\necho ran >>{ran}\n")
    polkit("looking")
    refused = "KernelRefused"  # without systemd there is no kexec
    for what, answer in (("check", "ok"), ("check-good", "ok"), ("check of an upgrade", refused)):
        assert User(lab, what).answers() == {answer: 1}
    assert not ran.exists()
    good.call("Check")  # as root
    assert ran.exists()


def test_a_look_at_an_upgrade_opens_no_file_that_its_caller_names(lab: Lab, good: Guest, polkit: Polkit) -> None:
    """The kernel's initrd would be unpacked by root."""
    polkit("looking")
    for what in ("check of a kernel's file", "check of an initrd"):
        assert User(lab, what).answers() == {"AccessDenied": 1}
    assert_contained(lab, good)


def test_questions_to_polkit_are_few_and_end_with_their_caller(lab: Lab, good: Guest, polkit: Polkit) -> None:
    process = polkit("looking")
    user = User(lab, "reload, interactively", calls=120, connections=4)
    assert process.stdout
    assert [process.stdout.readline() for _ in range(4)] == ["asked\n"] * 4
    assert User(lab, "list", uid=1).answers() == {"ok": 1}
    good.save()
    good.load()
    user.end()
    assert [process.stdout.readline() for _ in range(4)] == ["cancelled\n"] * 4
    other = User(lab, "reload, interactively")  # it has its turn again
    assert process.stdout.readline() == "asked\n"
    other.end()
    assert process.stdout.readline() == "cancelled\n"
    assert_contained(lab, good)


def test_calls_of_what_is_not_there_are_counted_and_not_logged(lab: Lab, good: Guest, polkit: Polkit) -> None:
    polkit("looking")
    had = lab.log.stat().st_size
    answers = User(lab, "elsewhere", calls=100, connections=40).answers()
    assert set(answers) == {"UnknownObject", "LimitsExceeded"}
    assert lab.log.stat().st_size - had < 4096
    assert_contained(lab, good)


def test_signals_tell_those_alone_who_may_ask(lab: Lab, good: Guest, polkit: Polkit) -> None:
    polkit("no")
    listener = User(lab, "listen")
    good.save()
    good.load()
    lab.job("SaveAll", survives="qemu-restart")
    assert lab.job("LoadAll") == "done"
    assert listener.signals() == []


def test_a_definition_that_cannot_be_read_keeps_no_other_from_starting(lab: Lab, good: Guest) -> None:
    texts = {
        "inf": '[vm]\narguments = []\n[memory]\nsize = inf\ndevice = "/dev/shm/x"\n',
        "nested": f"a = {'[' * 3000}{']' * 3000}",
        "digits": f"a = {'9' * 5000}",
        "nul": '[vm]\ndescription = "\\u0000"\narguments = []\n[memory]\nsize = "16M"\ndevice = "/dev/shm/x"\n',
        "utf": "\udcff",
    }
    for name, text in texts.items():
        (lab.definitions / f"{name}.toml").write_text(text, errors="surrogateescape")
    os.mkfifo(lab.definitions / "fifo.toml")
    bad = lab.client(lambda client: client.manager("Reload"))
    assert {name for name, _ in bad} <= {*texts, "fifo"}
    assert lab.end_agent() == 0
    lab.start_agent()
    until(lambda: good.state == "running", "the good one is there")
    assert_contained(lab, good)

# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that a signal has ended leaves no words: the agent says which it was, and what helps."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, refused, script, until

SIGNALS = pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SYS", ("SIGSYS", "its sandbox forbids a system call", "type=1326", "-sandbox in vm.arguments")),
        ("KILL", ("SIGKILL", "no memory left", "oom-kill")),
        ("SEGV", ("SIGSEGV", "it crashed", "coredumpctl")),
        ("BUS", ("SIGBUS", "memory that it has mapped is not there")),
        ("USR1", ("SIGUSR1",)),
    ],
)


def ending(lab: Lab, words: str) -> tuple[Guest, Path]:
    """A guest whose QEMU runs these words of a shell first, while the file is there."""
    there = lab.root / "ends"
    qemu = script(lab.root / "qemu", f'#!/bin/sh\n[ -e {there} ] && {words}\nexec {lab.qemu} "$@"\n')
    return lab.guest(qemu=qemu), there


@SIGNALS
def test_at_a_start(each_lab: Lab, name: str, words: tuple[str, ...]) -> None:
    guest, there = ending(each_lab, f"kill -{name} $$")
    there.touch()
    with pytest.raises(CallError) as caught:
        guest.start()
    for word in words:
        assert word in str(caught.value)
    assert guest.state == "stopped"
    there.unlink()
    guest.start()
    guest.assert_unbroken()


@SIGNALS
def test_at_a_load(each_lab: Lab, name: str, words: tuple[str, ...]) -> None:
    guest, there = ending(each_lab, f"kill -{name} $$")
    guest.start()
    guest.until_counts()
    guest.save()
    guest.call("Stop", "s", "hard")
    there.touch()
    refused(guest, "LoadFailed", *words, "the load can be repeated")
    assert guest.state == "saved"
    there.unlink()
    guest.load()
    guest.assert_unbroken()


def test_while_its_guest_runs(each_lab: Lab) -> None:
    """As the kernel does it that has no memory left."""
    guest = each_lab.running()
    os.kill(guest.pid, signal.SIGKILL)
    until(lambda: guest.state == "stopped", "the agent sees its end")
    assert "ended by SIGKILL: the kernel had no memory left" in each_lab.cprctl("status", "web1").stdout
    guest.start()
    assert "SIGKILL" not in each_lab.cprctl("status", "web1").stdout
    guest.call("Stop", "s", "hard")
    assert "ended by" not in each_lab.cprctl("status", "web1").stdout


def test_by_its_real_sandbox(each_lab: Lab) -> None:
    """A network's script that no definition names. QEMU 7.2 is killed for it; later ones are told that it can't be."""
    guest, there = ending(each_lab, f'exec {each_lab.qemu} "$@" -netdev tap,id=n0,ifname=cprtest0')
    there.touch()
    with pytest.raises(CallError) as caught:
        guest.start()
    said = str(caught.value)
    assert "SIGSYS" in said or "could not launch network script" in said, said
    assert guest.state == "stopped"


def test_of_a_qemu_that_the_agent_ends_nobody_is_told(each_lab: Lab) -> None:
    """It stands still, and gives no monitor."""
    each_lab.settings(agent={"qemu-start-timeout": "2s"}, files={"directories": [str(each_lab.exports)]})
    each_lab.end_agent()
    each_lab.start_agent()
    guest, there = ending(each_lab, "exec sleep 1000")
    there.touch()
    with pytest.raises(CallError) as caught:
        guest.start()
    assert "SIGKILL" not in str(caught.value), caught.value
    assert guest.state == "stopped"

# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that hangs, or whose socket somebody holds, while the agent starts: others are saved and loaded meanwhile."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.lab import Guest, Lab


@contextmanager
def hung(guest: Guest) -> Iterator[None]:
    pid = guest.pid
    guest.lab.end_agent()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def held(guest: Guest) -> Iterator[None]:
    """QEMU serves one client of a monitor; the agent's has another."""
    guest.lab.end_agent()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(guest.lab.run / "vm" / guest.name / "agent.sock"))
        assert other.recv(1)
        yield


@pytest.mark.parametrize("trouble", [hung, held])
def test_others_are_saved_and_loaded(each_lab: Lab, trouble: Callable[[Guest], AbstractContextManager[None]]) -> None:
    silent, other = each_lab.running("web1"), each_lab.running("web2")
    with trouble(silent):
        each_lab.start_agent()
        assert silent.state == "unreachable"
        other.save()
        other.load()
        other.assert_unbroken()
    each_lab.client(lambda client: client.manager("Reload"))
    silent.until_state("running")
    for guest in (silent, other):
        guest.save()
        guest.load()
        guest.assert_unbroken()

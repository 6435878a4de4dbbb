# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: a lab with an agent, guests whose QEMU lies, and local users who may only look."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bus.conftest import any_qemu, interruptible, lab, tiny
from tests.hostile import liar
from tests.hostile.tally import note_case
from tests.lab import PATIENCE_S, ROOT, Guest, Lab, let_others_in, script

__all__ = ["any_qemu", "interruptible", "lab", "tiny"]

MAX_RSS_MIB = 120
NOBODY = 65534


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz: a campaign, which counts its inputs itself")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and not report.skipped and "fuzz" not in item.keywords:
        note_case(contained=report.passed)
    return report


@dataclass
class Liar:
    """A guest whose QEMU is compromised."""

    guest: Guest
    lies: Path

    def lie(self, *rules: dict[str, Any]) -> None:
        """From the next message on."""
        draft = self.lies.with_suffix(".draft")
        draft.write_text(json.dumps(rules))
        draft.rename(self.lies)


Evil = Callable[..., Liar]


@pytest.fixture
def evil(lab: Lab) -> Evil:
    """Starts a guest ``name`` whose QEMU can be told to lie."""

    def start(name: str = "evil", *more: str) -> Liar:
        lies = lab.root / f"{name}.lies"
        program = script(
            lab.root / f"{name}-qemu", f'#!/bin/sh\nexec {sys.executable} {liar.__file__} {lab.qemu} {lies} "$@"\n'
        )
        guest = lab.guest(name, *more, qemu=program)
        guest.start()
        guest.until_counts()
        return Liar(guest, lies)

    return start


@pytest.fixture
def good(lab: Lab) -> Guest:
    return lab.running("good")


def agent_pid(lab: Lab) -> int:
    assert lab._agent
    return lab._agent.pid


def rss_mib(lab: Lab) -> int:
    """The most that the agent ever had."""
    for line in Path(f"/proc/{agent_pid(lab)}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("the agent is gone")


def figure(what: str, value: float, limit: float, unit: str) -> None:
    print(f"figure: {what}: {value:.2f} {unit}, at most {limit:.2f}", file=sys.stderr)
    assert value <= limit, what


def assert_contained(lab: Lab, *others: Guest) -> None:
    """The agent lives, small and without an error of its own, and other guests never noticed."""
    assert lab._agent
    assert lab._agent.poll() is None, lab.log.read_text()[-2000:]
    assert "Traceback" not in lab.log.read_text()
    assert rss_mib(lab) <= MAX_RSS_MIB
    for guest in others:
        guest.assert_unbroken()


def saved_all_in_s(lab: Lab) -> float:
    """How long root's SaveAll takes. Nothing is saved afterwards."""
    began = time.monotonic()
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    took_s = time.monotonic() - began
    assert lab.job("LoadAll") == "done"
    return took_s


Polkit = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def polkit(lab: Lab) -> Iterator[Polkit]:
    """Starts a polkit of tests/hostile/polkit.py with its one answer."""
    with contextlib.ExitStack() as stack:

        def start(answer: str) -> subprocess.Popen[str]:
            program = [sys.executable, "-m", "tests.hostile.polkit", lab.address, answer]
            process = stack.enter_context(subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT))
            stack.callback(process.terminate)
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            return process

        let_others_in(lab)
        yield start


class User:
    """A local user's own program, which sends what it likes."""

    def __init__(self, lab: Lab, what: str, *, calls: int = 1, connections: int = 1, uid: int = NOBODY) -> None:
        program = [sys.executable, "-m", "tests.hostile.user", lab.address, str(uid), what, str(calls), str(connections)]
        self._process = subprocess.Popen(program, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout
        assert self._process.stdout.readline() == "sent\n"

    def answers(self) -> dict[str, int]:
        """How often each answer came: "ok", or the last part of an error's name; "hung up" if the bus did."""
        out, _ = self._process.communicate(timeout=PATIENCE_S)
        found: dict[str, int] = json.loads(out)
        return found

    def signals(self) -> list[str]:
        """Of a listener: what it heard, until now."""
        return list(self.answers())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE_S)

# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of commands, then a save and a load or a refresh: the same guest, or a refusal after which it runs on.

CPR_TEST_SEQUENCES says how many (500), CPR_TEST_SEED which.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cpr_agent.bus.client import CallError
from tests.bus.conftest import QEMUS, running_lab, tiny
from tests.lab import Lab
from tests.reports.sequences import STEPS, Step, Subject, harms, look, subject
from tests.reports.tally import note_sequence

__all__ = ["tiny"]

COUNT = int(os.environ.get("CPR_TEST_SEQUENCES", "500"))
SEED = int(os.environ.get("CPR_TEST_SEED") or random.randrange(1 << 32))
ENDS = ("save and load", "refresh")


@contextmanager
def labs(tmp_path: Path, tiny: Path) -> Iterator[dict[str, Lab]]:
    """One for each QEMU, with an agent each."""
    with ExitStack() as stack:
        found = {}
        for version, qemu in QEMUS.items():
            (tmp_path / version).mkdir()
            found[version] = stack.enter_context(contextmanager(running_lab)(tmp_path / version, tiny, qemu))
        yield found


def end(on: Subject, how: str) -> str:
    """Returns why it was refused, or ""."""
    pid = on.guest.pid
    try:
        if how == "refresh":
            on.guest.call("Refresh", "a{sv}", {})
        else:
            on.guest.save()
    except CallError as error:
        assert on.guest.pid == pid, f"{error}; and it is in another QEMU"
        return str(error)
    if how != "refresh":
        on.guest.load()
    assert on.guest.pid != pid
    return ""


def live(lab: Lab, name: str, steps: list[Step], how: str) -> str:
    """Through one sequence; returns why it was refused, or "". Anything that must not be raises."""
    on = subject(lab, name)
    try:
        for step in steps:
            on.take(step)
        before = look(on)
        refused = end(on, how)
        assert harms(on, before) == [], refused or "after the load"
        return refused
    finally:
        with suppress(CallError):  # of what could not be loaded, no QEMU may be left
            on.guest.call("Stop", "s", "hard")


def wrong_medium(on: Subject) -> None:
    on.take(Step("change_medium", 1))


def write(on: Subject) -> None:
    on.take(Step("write", 0))


def grow(on: Subject) -> None:
    on.take(Step("resize", 0))


def plug(on: Subject) -> None:
    on.take(Step("plug_usb", 0))


def plug_cpu(on: Subject) -> None:
    on.take(Step("plug_cpu", 0))


def pause(on: Subject) -> None:
    on.take(Step("pause", 0))


def reset(on: Subject) -> None:
    on.take(Step("reset", 0))


def count_again(on: Subject) -> None:
    """As a guest does that is loaded twice."""
    with on.guest.console.open("rb+") as console:
        lines = console.read().splitlines(keepends=True)
        console.write(b"".join(lines[-3:]))


@pytest.mark.parametrize("change", [wrong_medium, write, grow, plug, plug_cpu, pause, reset, count_again])
def test_the_judge_tells_a_guest_from_another(tmp_path: Path, tiny: Path, change: Callable[[Subject], None]) -> None:
    version, qemu = next(iter(QEMUS.items()))
    with contextmanager(running_lab)(tmp_path, tiny, qemu) as lab:
        on = subject(lab, f"web{version}")
        before = look(on)
        assert harms(on, before) == []
        change(on)
        assert harms(on, before) != []


def test_after_any_sequence_a_guest_is_the_same_or_was_refused(tmp_path: Path, tiny: Path) -> None:
    print(f"{COUNT} sequences, seed {SEED}")
    wrong = []
    with labs(tmp_path, tiny) as found:
        turns = cycle(found.items())
        step = st.builds(Step, st.sampled_from(sorted(STEPS)), st.integers(0, 255))

        @seed(SEED)
        @settings(max_examples=COUNT, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(st.lists(step, min_size=1, max_size=6, unique=True), st.sampled_from(ENDS))
        def sequence(steps: list[Step], how: str) -> None:
            version, lab = next(turns)
            number = len(list(lab.definitions.iterdir()))
            said = f"QEMU {version}: {' '.join(f'{step.name}:{step.number}' for step in steps)}, {how}"
            try:
                refused = live(lab, f"web{number}", steps, how)
            except (AssertionError, CallError, OSError) as error:
                wrong.append(f"{said}: {error}")
                print(f"WRONG {wrong[-1]}", flush=True)
                note_sequence(version, "wrong")
                return
            print(f"{'refused' if refused else 'same'} {said}{f': {refused}' if refused else ''}", flush=True)
            note_sequence(version, "refused" if refused else "same")

        sequence()
    if wrong:
        pytest.fail(f"seed {SEED}:\n" + "\n".join(wrong))

# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab whose agent cancels its own jobs at one point, and again as they are being taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.kexec_lab import KexecLab, settled
from tests.lab import Guest, until

REFUSALS = {"Busy", "AlreadyRunning", "AlreadySaved"}
"""Answers to a Start of a VM whose guest must not be booted."""
UNDOING = ("save-undone", "abort")
"""Points at which the VM of a save is in the middle of its undo."""


class Found(NamedTuple):
    """A guest, as somebody sees it who has nothing but its QEMU and its console."""

    status: str
    counted: int


class Story(NamedTuple):
    """A job that is cancelled. ``settle`` does the rest, by the job's result: after it each guest is what it was before."""

    prepare: Callable[[KexecLab], None]
    act: Callable[[KexecLab], str]
    settle: Callable[[KexecLab, str], None]


def save_all(lab: KexecLab) -> str:
    return lab.lab.job("SaveAll")


def load_all(lab: KexecLab) -> str:
    return lab.lab.job("LoadAll")


def rollback(lab: KexecLab) -> str:
    return str(lab.lab.client(lambda client: client.run_job("Rollback", None)).result)


def saved(lab: KexecLab) -> None:
    assert save_all(lab) == "done"


def rolled_back(lab: KexecLab, result: str) -> None:
    """What was saved before it could be cancelled is taken back by an admin. The point may lie in that: then the rollback
    is the job that is cancelled, and comes to its end all the same."""
    if result == "done":
        said = rollback(lab)
        assert said in ("done", "cancelled"), said


def loaded(lab: KexecLab, result: str) -> None:
    """What the cancelled job has not loaded can still be loaded."""
    again = load_all(lab)
    assert again in ("done", "nothing to do"), f"after {result!r}: {again}"


def called_off(lab: KexecLab, result: str) -> None:
    """The cancellation came too late for one whose kexec is under way."""
    if not result:
        lab.call_off()
        until(lambda: settled(lab), "the upgrade is taken back")


def nothing(lab: KexecLab, result: str = "") -> None:
    """All is as it was."""


def refresh_all(**options: bool) -> Callable[[KexecLab], str]:
    return lambda lab: lab.lab.job("RefreshAll", **options)


STORIES = {
    "SaveAll": Story(nothing, save_all, rolled_back),
    "LoadAll": Story(saved, load_all, loaded),
    "Rollback": Story(saved, rollback, nothing),
    "RefreshAll": Story(nothing, refresh_all(), nothing),
    "RefreshAll in turn": Story(nothing, refresh_all(in_turn=True), nothing),
    "Upgrade": Story(nothing, KexecLab.upgrade, called_off),
}


class CancelLab:
    """``paused`` of the lab's guests, those that come first, stand still from the beginning."""

    def __init__(self, lab: KexecLab, paused: int = 0) -> None:
        self.lab = lab
        for guest in lab.guests[:paused]:
            guest.admin("stop")
            guest.until_state("paused")
        self.before = [self.found(guest) for guest in lab.guests]

    def found(self, guest: Guest) -> Found:
        return Found(str(guest.admin("query-status")["status"]), guest.report.last)

    def points(self, name: str) -> list[str]:
        """The points that a job passes which is not cancelled."""
        self.live(name, 0, "never")
        return (self.lab.lab.root / "points").read_text().splitlines()

    def live(self, name: str, times: int, point: str) -> str:
        """Through the story, with a job that is cancelled so often from that point on; returns its result."""
        story, root = STORIES[name], self.lab.lab.root
        story.prepare(self.lab)
        for left in ("points", "starts"):
            (root / left).unlink(missing_ok=True)
        wanted = root / "cancel.new"
        wanted.write_text(f"{times} {point}")
        wanted.rename(root / "cancel")
        result = story.act(self.lab)
        starts = list(self._starts(root / "starts"))
        story.settle(self.lab, result)
        assert {answer for _, answer in starts} <= REFUSALS, starts
        if len(self.lab.guests) == 1:
            undoing = {answer for at, answer in starts if at.split()[1] in UNDOING}
            assert undoing <= {"Busy"}, starts
        return result

    def _starts(self, path: Path) -> Iterator[tuple[str, str]]:
        for line in path.read_text().splitlines() if path.exists() else ():
            at, _, answer = line.rpartition(": ")
            yield at, answer.split()[1]

    def assert_nothing_is_left(self) -> None:
        """Each guest is what it was, in one QEMU, and no checkpoint of it can be loaded."""
        for guest, before in zip(self.lab.guests, self.before, strict=True):
            until(partial(has_one_qemu, guest), f"{guest.name} has one QEMU, not {qemus(guest)}")
            now = self.found(guest)
            assert now.status == before.status, f"{guest.name} is {now.status}, and was {before.status}"
            if before.status == "paused":
                assert now.counted == before.counted
                assert guest.report.problems == ()
            else:
                guest.until_counts(1)
                assert guest.report.problems == (), str(guest.report)
            left = {name for name in guest.checkpoint_files() if not name.endswith((".loaded", ".discarded"))}
            assert left == set()
        assert not self.lab.promised

    def assert_all_go_on(self) -> None:
        """At last also those that stood still."""
        for guest, before in zip(self.lab.guests, self.before, strict=True):
            if before.status == "paused":
                guest.call("Resume")
            guest.assert_unbroken()


def has_one_qemu(guest: Guest) -> bool:
    return len(qemus(guest)) == 1


def qemus(guest: Guest) -> list[int]:
    """The processes that have the guest's RAM mapped."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(guest.ram).encode() in maps.read_bytes():
                found.append(int(maps.parent.name))
        except OSError:
            continue
    return found

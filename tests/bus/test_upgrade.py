# SPDX-License-Identifier: GPL-2.0-or-later
"""The upgrade with real QEMUs, up to the kexec, which is the lab's; the real one is in tests/host."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.bus.mortal_agent import STORE
from tests.kexec_lab import NEVER, KexecLab, Story, assert_nobody_noticed, every_point, kill_and_wait, kill_at, settled
from tests.lab import Lab, until


@pytest.fixture
def five(lab: Lab) -> KexecLab:
    return KexecLab(lab, 5)


@pytest.fixture
def two(lab: Lab) -> KexecLab:
    return KexecLab(lab, 2)


def last_upgrade(lab: KexecLab) -> dict[str, object]:
    shown = lab.lab.client(lambda client: client.properties("/org/cpragent1", "Manager"))
    return dict(shown["LastUpgrade"])


def test_five_guests_go_through(five: KexecLab) -> None:
    assert five.upgrade() == ""
    assert five.promised
    assert {guest.state for guest in five.guests} == {"saved"}
    five.reboot()
    five.agent(NEVER)
    assert last_upgrade(five)["phase"] == "booted"
    assert five.lab.job("LoadAll") == "done"
    assert_nobody_noticed(five)
    history = json.loads(five.lab.cprctl("history", "--json").stdout)
    assert {load["upgrade"] for load in history} == {last_upgrade(five)["id"]}
    assert (last_upgrade(five)["phase"], last_upgrade(five)["failures"]) == ("done", [])
    status = five.lab.cprctl("status").stdout
    assert "last upgrade" in status
    assert f"kernel {os.uname().release}, newest of its flavour: 6.12.2" in status


def the_others_run_on(lab: KexecLab, lost: str, result: list[str]) -> None:
    assert f"VM {lost}" in result[0]
    assert not lab.under_way
    assert not lab.promised
    assert last_upgrade(lab)["phase"] == "rolled-back"
    for guest in lab.guests:
        if guest.name != lost:
            assert guest.state == "running"
            guest.assert_unbroken()
            assert "manifest.json" not in guest.checkpoint_files()


def test_one_of_five_whose_qemu_is_killed(five: KexecLab) -> None:
    last = _saves_last(five, "web3")
    pids = [guest.pid for guest in five.guests]
    with five.stopped_at("before save-begin 5") as result:
        kill_and_wait(pids[2])
    the_others_run_on(five, last, result)
    assert [guest.pid for guest in five.guests] == [*pids[:2], 0, *pids[3:]], "they went on in their own QEMUs"


def test_one_of_five_for_which_the_disk_is_full(five: KexecLab) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    last = _saves_last(five, "web3")
    checkpoints = five.lab.state / "checkpoints"
    checkpoints.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,mode=700", "tmpfs", checkpoints], check=True)
    try:
        with five.stopped_at("before save-begin 5") as result:
            room = os.statvfs(checkpoints)
            (checkpoints / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - 65536))
        assert "No space left" in result[0]
        the_others_run_on(five, last, result)
        five.guests[2].assert_unbroken()
    finally:
        five.lab.close()
        subprocess.run(["umount", "--lazy", checkpoints], check=True)


def test_one_of_five_with_a_blocker_that_comes_late(five: KexecLab) -> None:
    """Nobody is asked once guests stand still: it is QEMU that can't save then."""
    last = _saves_last(five, "web3")
    with five.stopped_at("before save-begin 4") as result:
        colo = [{"capability": name, "state": True} for name in ("return-path", "x-colo")]
        five.guests[2].admin("migrate-set-capabilities", capabilities=colo)
    assert "VM web3: could not be saved" in result[0]
    the_others_run_on(five, last, result)
    five.guests[2].assert_unbroken()


def _saves_last(lab: KexecLab, name: str) -> str:
    """A low order saves later."""
    for guest in lab.guests:
        guest.definition["save"] = {"order": 1 if guest.name == name else 100}
        lab.lab.define(guest)
    return name


def test_a_bus_that_is_restarted_in_the_middle(five: KexecLab) -> None:
    """The agent ends with its bus; the next one takes back what it finds."""
    with five.stopped_at("before save-begin 4") as result:
        five.lab.end_bus()
    assert result == ["the agent is gone"]
    five.lab.agent_ended()
    five.lab.restart_bus()
    five.agent(NEVER)
    until(lambda: settled(five), "the upgrade is taken back")
    assert last_upgrade(five)["phase"] == "rolled-back"
    assert_nobody_noticed(five)


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_clock_that_is_stepped_by_an_hour(two: KexecLab, step_s: int) -> None:
    """While guests are saved, and again over the kexec: they come back."""
    clock = two.lab.root / "stepped-s"
    assert two.lab.job("SaveAll") == "done"
    clock.write_text(str(step_s))
    assert two.lab.job("LoadAll") == "done"
    assert two.upgrade() == ""
    clock.write_text(str(2 * step_s))
    two.reboot()
    two.agent(NEVER)
    assert two.lab.job("LoadAll") == "done"
    assert_nobody_noticed(two)


@pytest.mark.parametrize("story", ["upgrade", "rollback", "load"])
def test_an_agent_that_is_killed_after_any_record_of_its_journal(two: KexecLab, story: str) -> None:
    """The records are those that a life without a kill has written: a new one is covered by itself. `make test-faults`
    kills before each one too, at each repetition, and around each act of the store."""
    points = list(dict.fromkeys(point.rpartition(" ")[0] for point in every_point(two, Story(story))))
    records = [point for point in points if point.startswith("after ") and point.split()[1] not in STORE]
    assert len(records) > 5
    for point in records:
        print(f"{story}: killed {point}", flush=True)
        assert kill_at(two, Story(story), point)


@pytest.fixture
def slow_unit(two: KexecLab) -> Path:
    """A unit of the host that is to stop first."""
    unit = two.lab.root / "units/slow.service"
    unit.parent.mkdir()
    unit.write_text("active")
    two.lab.end_agent()
    two.agent(NEVER)
    return unit


def test_a_unit_has_stopped_before_the_first_guest_does(two: KexecLab, slow_unit: Path) -> None:
    with two.stopped_at("before save-begin 1") as result:
        assert slow_unit.read_text() == "inactive"
        for guest in two.guests:
            guest.until_counts()
    assert result == [""]
    assert last_upgrade(two)["stopped-first"] == ["slow.service"]
    two.call_off()
    until(lambda: settled(two), "the upgrade is taken back")
    assert slow_unit.read_text() == "active"
    assert_nobody_noticed(two)


def test_a_unit_that_never_stops_stops_no_guest(two: KexecLab, slow_unit: Path) -> None:
    slow_unit.write_text("stuck")
    assert "slow.service did not stop within 2.00 s. No guest was stopped; started again: slow.service" in two.upgrade()
    assert last_upgrade(two)["phase"] == "rolled-back"
    assert slow_unit.read_text() == "active"
    assert_nobody_noticed(two)
    shown = two.lab.cprctl("report")
    assert shown.returncode == 0, shown.stderr
    assert "stop first" in shown.stdout
    assert "not on record" in two.lab.cprctl("report", "--blame").stdout


@pytest.mark.parametrize(
    "point", ["after upgrade-stopping", "before upgrade-saving", "after saved 1", "after upgrade-saved"]
)
def test_a_unit_is_back_after_an_agent_that_was_killed(two: KexecLab, slow_unit: Path, point: str) -> None:
    two.lab.end_agent()
    two.agent(point)
    assert two.upgrade() == "the agent is gone"
    two.agent(NEVER)
    until(lambda: settled(two), "the upgrade is taken back")
    assert last_upgrade(two)["phase"] == "rolled-back"
    assert slow_unit.read_text() == "active"
    assert_nobody_noticed(two)


def test_an_agent_without_systemd_refuses_the_upgrade(lab: Lab) -> None:
    refused = lab.cprctl("upgrade")
    assert refused.returncode == 4, refused.stderr
    assert "does not run under systemd" in refused.stderr
    assert lab.cprctl("drill", "--dry-run").returncode == 4
    assert lab.cprctl("rollback").returncode == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "0.0"}, "does not run under systemd"),
        ({"policy": "hope"}, "there is no policy 'hope'"),
        ({"max-pause": "10"}, "it must be 'd'"),
        ({"colour": "red"}, "unknown option 'colour'"),
    ],
)
def test_an_upgrade_that_makes_no_sense_is_refused(lab: Lab, options: dict[str, str], words: str) -> None:
    with pytest.raises(CallError, match=words):
        lab.job("Upgrade", **options)

# SPDX-License-Identifier: GPL-2.0-or-later
"""How the role deals with batches and with bad settings, on hosts that are none: nothing is upgraded here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.fleet import Controller

HERE = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": "/usr/bin/python3"}
WELL = {**HERE, "cpr_agent_upgrade_kernel": "6.2"}
DONE = {**HERE, "cpr_agent_upgrade_kernel": "6.1"}
REFUSES = {**HERE, "cpr_agent_upgrade_kernel": "bad"}
LOST = {
    **WELL,
    "ansible_host": "127.0.0.1",
    "ansible_port": 1,
    "ansible_connection": "{{ 'ssh' if __cpr_agent_upgrade_record.result | default('') == 'unfinished' else 'local' }}",
}
"""A host that goes away as its upgrade begins."""


@pytest.fixture(autouse=True)
def cprctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cprctl").symlink_to(Path(__file__).parent / "fake-cprctl")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def upgraded(*, kernel: str = "6.2", state: str = "running", held: str = "", **upgrade: object) -> dict[str, Any]:
    """What is known of a host after its upgrade from 6.1 to 6.2, on which web1 ran."""
    done = {"phase": "done", "reason": "", "failures": [], "cold_started": []}
    told = {name.replace("_", "-"): value for name, value in (done | upgrade).items()}
    vms = [{"Name": "web1", "State": state, "Held": {"error": held} if held else {}, "Problem": held}] if state else []
    return {
        **HERE,
        "__cpr_agent_upgrade_needed": True,
        "__cpr_agent_upgrade_wanted": "6.2",
        "__cpr_agent_upgrade_ran": {"web1": "running"},
        "__cpr_agent_upgrade_status": {"Kernel": kernel, "VMs": vms, "LastUpgrade": told},
    }


AFTERWARDS = {
    "well": (upgraded(), None),
    "other-kernel": (upgraded(kernel="6.1"), "it runs kernel 6.1, wanted is 6.2"),
    "taken-back": (
        upgraded(kernel="6.1", phase="rolled-back", reason="the kexec did not happen"),
        "it runs kernel 6.1, wanted is 6.2; its upgrade ended as rolled-back: the kexec did not happen",
    ),
    "held": (
        upgraded(phase="held", failures=["VM web1: memory changed"], state="held", held="memory changed"),
        "its upgrade ended as held: VM web1: memory changed; web1 is held: memory changed",
    ),
    "lost-memory": (
        upgraded(cold_started=["web1: the device is another one"]),
        "memory was lost, and the guest booted anew: web1: the device is another one",
    ),
    "stopped": (upgraded(state="stopped"), "web1 was running, and is stopped"),
    "paused": (upgraded(state="paused"), "web1 was running, and is paused"),
    "gone": (upgraded(state=""), "web1 was running, and is gone"),
}


def test_a_host_that_is_not_well_after_its_upgrade_fails_with_what_is_wrong(tmp_path: Path) -> None:
    hosts = {name: host for name, (host, _) in AFTERWARDS.items()}
    play = Controller(tmp_path / "admin", hosts, Path(__file__).parent / "health.yml").play()
    assert play.failed == {name: words for name, (_, words) in AFTERWARDS.items() if words}


def admin(home: Path, *hosts: dict[str, Any]) -> Controller:
    return Controller(home / "admin", {f"kvm{number}": host for number, host in enumerate(hosts, 1)})


def test_a_batch_is_brought_to_its_end_and_the_next_is_not_begun(tmp_path: Path) -> None:
    play = admin(tmp_path, WELL, REFUSES, WELL, WELL).play("--check", serial=[1, 2])
    assert play.code != 0
    assert play.results == {
        "kvm1": "would be upgraded",
        "kvm2": "failed",
        "kvm3": "would be upgraded",
        "kvm4": "not begun",
    }
    assert "no guest was stopped; web1: it blocks (unplug it)" in play.table


def test_more_failures_in_a_batch_than_are_allowed_end_the_run(tmp_path: Path) -> None:
    hosts = (REFUSES, WELL, REFUSES, REFUSES, WELL)
    play = admin(tmp_path, *hosts).play("--check", serial=2, max_fail_percentage=50)
    assert play.code != 0
    assert [*play.results.values()] == ["failed", "would be upgraded", "failed", "failed", "not begun"]


def test_a_host_that_can_not_be_reached_has_failed(tmp_path: Path) -> None:
    nowhere = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    play = admin(tmp_path, nowhere, WELL).play("--check")
    assert play.code != 0
    assert play.results == {"kvm1": "failed", "kvm2": "not begun"}
    assert "Connection refused" in play.table


def test_a_host_that_is_lost_on_its_way_ends_the_run(tmp_path: Path) -> None:
    """Ansible itself would go on: a host that became unreachable is no failed one."""
    play = admin(tmp_path, LOST, DONE, DONE).play(serial=2, max_fail_percentage=50)
    assert play.code != 0
    assert play.results == {"kvm1": "unfinished", "kvm2": "unchanged", "kvm3": "not begun"}
    assert "kvm1 has not been heard of since its upgrade began" in play.said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernal": "6.2"}, "There is no setting cpr_agent_upgrade_kernal"),
        ({"policy": "hope"}, "cpr_agent_upgrade_policy must be one of"),
        ({"max_pause": "short"}, "unable to convert to float"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    play = admin(tmp_path, WELL).play("--check", **settings)
    assert play.code != 0
    assert words in play.said
    assert not play.summary


def test_a_kernel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    play = admin(tmp_path, {**WELL, "cpr_agent_upgrade_kernel": "missing"}).play("--check")
    assert play.results == {"kvm1": "failed"}
    assert "no guest was stopped; cprctl: kernel missing is not installed" in play.table


def test_a_host_without_the_agent_fails(tmp_path: Path) -> None:
    (tmp_path / "cprctl").unlink()
    play = admin(tmp_path, WELL).play("--check")
    assert play.code != 0
    assert "Ask the agent how it stands: Error executing command" in play.table


@pytest.mark.parametrize(
    ("host", "words"), [(DONE, "web1 is held: its memory changed"), (WELL, "web1 is held since before")]
)
def test_a_guest_that_is_held_ends_the_run(
    host: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HELD", "its memory changed")
    play = admin(tmp_path, host, WELL).play("--check")
    assert play.code != 0
    assert play.results == {"kvm1": "failed", "kvm2": "not begun"}
    assert words in play.table


def test_each_own_check_that_fails_is_named(tmp_path: Path) -> None:
    checks = {"health_commands": ["test -e /nowhere", "true", "no-such-command"], "health_retries": 1, "health_delay": 1}
    play = admin(tmp_path, DONE).play(**checks)
    assert play.code != 0
    assert "test -e /nowhere: non-zero return code; no-such-command: Error executing command" in play.table
